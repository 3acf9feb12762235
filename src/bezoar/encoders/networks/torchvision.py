"""Any torchvision classifier without its last layer: `torchvision:resnet50/IMAGENET1K_V2`."""

from typing import Annotated, Any

from torch import nn
from torchvision import models

from bezoar.encoders import small_towers, torchvision_models
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.encoders.networks import Network, image_encoder
from bezoar.errors import UserError, first_line
from bezoar.registry import method


@method
class Torchvision(Network):
    """Images only. The preprocessing is the one that the weights state, without cropping."""

    model: Annotated[str, "NAME, or NAME/WEIGHTS with weights that torchvision publishes"] = (
        "resnet18"
    )
    fresh: Annotated[
        bool, "the architecture and preprocessing that belong to WEIGHTS, but not the weights"
    ] = False

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder. Published weights state the input size; otherwise it is `size`, or 224."""
        name, _, tag = self.model.partition("/")
        classifiers = models.list_models(module=models)
        if name not in classifiers:
            raise UserError(
                f"torchvision has no classifier {name!r}; it has: {', '.join(classifiers)}"
            )
        published = models.get_model_weights(name)
        if tag and tag not in published.__members__:
            raise UserError(
                f"torchvision has no weights {tag!r} for {name}; "
                f"it has: {', '.join(published.__members__)}"
            )
        weights = published[tag] if tag else None
        preprocess = (
            small_towers.named_preprocess(size or 224, "imagenet", "bilinear")
            if weights is None
            else stated_preprocess(weights)
        )
        options = {"image_size": preprocess.size} if name.startswith("vit_") else {}
        try:
            model = models.get_model(name, weights=None if self.fresh else weights, **options)
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"torchvision could not make {self.model!r} for {preprocess.size} px: "
                f"{first_line(error)}"
            ) from error
        remove_classifier(model, name)
        encoder = image_encoder(model, preprocess, f"torchvision:model={self.model},fresh=true")
        small_towers.check_input_size(encoder.image, preprocess.size, f"torchvision's {name}")
        return encoder


def stated_preprocess(weights: Any) -> Preprocess:
    """The preprocessing of published weights: images are resized to the size of their crop."""
    transforms = weights.transforms()
    return Preprocess(
        transforms.crop_size[0],
        tuple(transforms.mean),
        tuple(transforms.std),
        transforms.interpolation.value,
    )


def remove_classifier(model: nn.Module, name: str) -> None:
    """Replace a classifier's last layer by the identity.

    Raises UserError for the few models that do not end in a linear layer, or have auxiliary
    classifiers.
    """
    path = torchvision_models.last_layer(model)
    if not path or hasattr(model, "aux_logits"):
        raise UserError(
            f"torchvision's {name} does not end in one linear layer, so its features cannot be read"
        )
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Identity())
