"""Any image model of timm without its classifier: `timm:resnet18/FILE` (Wightman 2019)."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import timm
from timm.data.config import resolve_model_data_config

from bezoar.data.files import checkpoints
from bezoar.encoders import small_towers, weight_prefixes
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.encoders.networks import Network, image_encoder
from bezoar.encoders.weights import check_weights, named_weights_file
from bezoar.errors import UserError, first_line
from bezoar.registry import method


@method
class Timm(Network):
    """Images only. The preprocessing is what the weights state, but nothing is cropped."""

    model: Annotated[
        str, "NAME or NAME.TAG, fresh; with /pretrained, the published weights; or with /FILE"
    ] = "resnet18"
    prefix: Annotated[
        str, "name before the encoder's weights, where the file holds several: teacher"
    ] = ""

    def files(self) -> list[Path]:
        """The weights file, where one is named."""
        return named_weights_file(self.model.partition("/")[2], ("pretrained",))

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder.

        Published weights, and models that take one size only, state theirs; others take `size`.
        """
        name, slash, weights = self.model.partition("/")
        is_file = bool(self.files())
        if slash and weights != "pretrained" and not is_file:
            raise UserError(
                f"timm: no weights file {weights!r}; expected NAME, NAME.TAG or either with /pretrained "
                f"or /FILE of weights; got {self.model!r}"
            )
        if not timm.is_model(name):
            similar = timm.list_models(f"*{name.partition('.')[0][:6]}*")[:6]
            names = ", ".join(similar) or "see timm.list_models()"
            raise UserError(f"timm has no model {name!r}; it has, among others: {names}")
        try:
            model: Any = timm.create_model(name, pretrained=weights == "pretrained", num_classes=0)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"timm could not make {self.model!r}: {first_line(error)}") from error
        if is_file:
            load_without_classifier(model, weights, name, self.prefix)
        preprocess = stated_preprocess(model, name)
        states_size = bool(weights) or model.pretrained_cfg.get("fixed_input_size")
        if size and not states_size:
            preprocess = dataclasses.replace(preprocess, size=size)
        # The spec has the tag of the weights, which decides the preprocessing, but not the weights:
        # a saved encoder has its own.
        tag = model.pretrained_cfg.get("tag") or ""
        fresh = f"timm:model={name.partition('.')[0]}.{tag}".removesuffix(".")
        encoder = image_encoder(model, preprocess, fresh)
        small_towers.check_input_size(encoder.image, preprocess.size, f"timm's {name}")
        return encoder


def load_without_classifier(model: Any, path: str, name: str, prefix: str = "") -> None:
    """Fill a model from a weights file, whose classifier is left out.

    prefix: of the encoder's weights, where the file holds several.

    Raises UserError for weights that do not fit.
    """
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = [classifier] if isinstance(classifier, str) else classifier
    prefixes = tuple(f"{head}." for head in heads)
    loaded = checkpoints.load_tensors(path, prefix)
    beginnings = weight_prefixes.model_prefixes(loaded, model.state_dict())
    tensors = weight_prefixes.select_encoder(loaded, beginnings, path, prefix).tensors
    state = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefixes)}
    check_weights(model, state, path, f"timm's {name} without its classifier")
    # Not strict, because the batch counters of batch norms may be missing (see check_weights).
    model.load_state_dict(state, strict=False)


def stated_preprocess(model: Any, name: str) -> Preprocess:
    """A timm model's data configuration. Raises UserError unless RGB, bicubic or bilinear."""
    config = resolve_model_data_config(model)
    channels, side, _ = config["input_size"]
    if channels != 3 or config["interpolation"] not in ("bilinear", "bicubic"):
        raise UserError(
            f"timm's {name} takes {channels} channels by {config['interpolation']}; "
            "expected RGB, bicubic or bilinear"
        )
    return Preprocess(side, tuple(config["mean"]), tuple(config["std"]), config["interpolation"])
