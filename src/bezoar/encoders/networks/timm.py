"""Any image model of timm without its classifier: `timm:resnet18/FILE` (Wightman 2019)."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from bezoar import registry
from bezoar.data.files import checkpoints
from bezoar.encoders import small_towers, timm_models, weight_prefixes
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.networks import Network, image_encoder
from bezoar.encoders.weights import check_weights, named_weights_file
from bezoar.errors import UserError
from bezoar.registry import method


@method
class Timm(Network):
    """Images only. The preprocessing is the one that the weights state, without cropping."""

    model: Annotated[
        str, "NAME or NAME.TAG, fresh; with /pretrained, the published weights; or with /FILE"
    ] = "resnet18"
    prefix: Annotated[
        str, "name before the encoder's weights, where the file holds several: teacher"
    ] = ""
    arguments: Annotated[
        str, 'other sizes than the model\'s own, a JSON object: {"img_size": 96, "depth": 6}'
    ] = ""

    def __post_init__(self) -> None:
        try:
            timm_models.parse_arguments(self.arguments)
        except UserError as error:
            raise ValueError(str(error)) from error

    def files(self) -> list[Path]:
        """The weights file, if one is named."""
        return named_weights_file(self.model.partition("/")[2], ("pretrained",))

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder. `size` is used unless the weights or the model fix the input size."""
        name, slash, weights = self.model.partition("/")
        is_file = bool(self.files())
        if slash and weights != "pretrained" and not is_file:
            raise UserError(
                f"timm: no weights file {weights!r}; expected NAME, NAME.TAG or either with "
                f"/pretrained or /FILE of weights; got {self.model!r}"
            )
        model = timm_models.create_model(name, self.arguments, weights == "pretrained")
        if is_file:
            load_without_classifier(model, weights, name, self.prefix)
        preprocess = timm_models.stated_preprocess(model, name)
        side = timm_models.parse_arguments(self.arguments).get("img_size")
        states_size = bool(weights) or model.pretrained_cfg.get("fixed_input_size")
        if side or (size and not states_size):
            preprocess = dataclasses.replace(preprocess, size=side or size)
        # The spec keeps the tag of the weights, which decides the preprocessing, but not the
        # weights: a saved encoder holds its own.
        tag = model.pretrained_cfg.get("tag") or ""
        fresh = f"timm:model={name.partition('.')[0]}.{tag}".removesuffix(".")
        if self.arguments:
            fresh += f",arguments={registry.spec_value(self.arguments)}"
        encoder = image_encoder(model, preprocess, fresh)
        small_towers.check_input_size(encoder.image, preprocess.size, f"timm's {name}")
        return encoder


def load_without_classifier(model: Any, path: str, name: str, prefix: str = "") -> None:
    """Load a weights file into a model, without the classifier. See `Timm.prefix`.

    Raises UserError for weights that do not fit.
    """
    loaded = checkpoints.load_tensors(path, prefix)
    beginnings = weight_prefixes.model_prefixes(loaded, model.state_dict())
    tensors = weight_prefixes.select_encoder(loaded, beginnings, path, prefix).tensors
    state, _ = timm_models.split_classifier(model, tensors)
    check_weights(model, state, path, f"timm's {name} without its classifier")
    # Not strict, because the batch counters of batch norms may be missing (see check_weights).
    model.load_state_dict(state, strict=False)
