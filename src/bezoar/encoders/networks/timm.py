"""Any image model of timm without its classifier, fresh, published or from a file: `timm:resnet18/FILE` (Wightman 2019)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch

from bezoar.data.files import checkpoints
from bezoar.data.files.paths import existing_file
from bezoar.encoders import small_towers
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.encoders.weights import check_weights
from bezoar.errors import UserError
from bezoar.registry import method


@method
class Timm:
    """Images only. The preprocessing is the data configuration of the weights; the whole image is read, nothing cropped."""

    model: Annotated[
        str, "NAME or NAME.TAG, fresh; with /pretrained, the published weights; or with /FILE"
    ] = "resnet18"

    def files(self) -> list[Path]:
        """The weights file, where one is named."""
        weights = self.model.partition("/")[2]
        return (
            [existing_file(weights, "weights file")]
            if Path(weights).suffix in checkpoints.SUFFIXES
            else []
        )

    def vocabulary(self, captions: Iterable[str]) -> tuple[str, ...]:
        """None: it reads no text."""
        return ()

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder. Published weights, and models that take one size only, state their own; others take `size`."""
        import timm

        name, slash, weights = self.model.partition("/")
        file = bool(self.files())
        if slash and weights != "pretrained" and not file:
            raise UserError(
                f"timm: expected NAME, NAME.TAG or either with /pretrained or /FILE of weights; got {self.model!r}"
            )
        if not timm.is_model(name):
            near = (
                ", ".join(timm.list_models(f"*{name.partition('.')[0][:6]}*")[:6])
                or "see timm.list_models()"
            )
            raise UserError(f"timm has no model {name!r}; it has, among others: {near}")
        try:
            model: Any = timm.create_model(name, pretrained=weights == "pretrained", num_classes=0)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"timm could not make {self.model!r}: {str(error).strip().splitlines()[0]}"
            ) from error
        if file:
            head = model.pretrained_cfg.get("classifier") or ()
            heads = tuple(f"{h}." for h in ([head] if isinstance(head, str) else head))
            state = {
                k: v
                for k, v in checkpoints.load_tensors(weights).items()
                if not k.startswith(heads)
            }
            check_weights(model, state, weights, f"timm's {name} without its classifier")
            model.load_state_dict(
                state, strict=False
            )  # batch norm's counters may be missing, as `check` says
        config = timm.data.resolve_model_data_config(model)
        channels, side, _ = config["input_size"]
        if channels != 3 or config["interpolation"] not in ("bilinear", "bicubic"):
            raise UserError(
                f"timm's {name} takes {channels} channels by {config['interpolation']}; expected RGB, bicubic or bilinear"
            )
        own = bool(weights) or model.pretrained_cfg.get("fixed_input_size")
        side = side if own or not size else size
        small_towers.check_size(model.to(memory_format=torch.channels_last), side, f"timm's {name}")
        preprocess = Preprocess(
            side, tuple(config["mean"]), tuple(config["std"]), config["interpolation"]
        )
        # Without the weights, but with their tag: it chooses the preprocessing, and a saved encoder has weights of its own.
        tag = model.pretrained_cfg.get("tag") or ""
        fresh = f"timm:model={name.partition('.')[0]}.{tag}".removesuffix(".")
        return Encoder(model, preprocess, about={"network": fresh, "vocabulary": []})
