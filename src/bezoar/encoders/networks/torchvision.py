"""Any classifier of torchvision without its last layer, fresh or published: `torchvision:resnet50/IMAGENET1K_V2`."""

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from torch import nn

from bezoar.encoders import small_towers
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.errors import UserError
from bezoar.registry import method


@method
class Torchvision:
    """Images only. The preprocessing is what the weights state; the whole image is read, nothing cropped away."""

    model: Annotated[str, "NAME, or NAME/WEIGHTS with weights that torchvision publishes"] = (
        "resnet18"
    )
    fresh: Annotated[
        bool, "the architecture and preprocessing that belong to WEIGHTS, but not the weights"
    ] = False

    def vocabulary(self, captions: Iterable[str]) -> tuple[str, ...]:
        """None: it reads no text."""
        return ()

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder. With WEIGHTS named, it takes the size that they state; else `size`, or 224 when that is 0."""
        from torchvision import models

        name, _, tag = self.model.partition("/")
        if name not in models.list_models(module=models):
            raise UserError(
                f"torchvision has no classifier {name!r}; it has: {', '.join(models.list_models(module=models))}"
            )
        known = models.get_model_weights(name)
        if tag and tag not in known.__members__:
            raise UserError(
                f"torchvision has no weights {tag!r} for {name}; it has: {', '.join(known.__members__)}"
            )
        preprocess = (
            stated(known[tag])
            if tag
            else small_towers.preprocess(size or 224, "imagenet", "bilinear")
        )
        vision = {"image_size": preprocess.size} if name.startswith("vit_") else {}
        try:
            model = models.get_model(
                name, weights=None if self.fresh or not tag else known[tag], **vision
            )
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"torchvision could not make {self.model!r} for {preprocess.size} px: {reason}"
            ) from error
        behead(model, name)
        small_towers.check_size(
            model.to(memory_format=torch.channels_last), preprocess.size, f"torchvision's {name}"
        )
        about = {"network": f"torchvision:model={self.model},fresh=true", "vocabulary": []}
        return Encoder(model, preprocess, about=about)


def stated(weights: Any) -> Preprocess:
    """The preprocessing of published weights; the side of the crop is the input's, and the whole image is resized to it."""
    given = weights.transforms()
    return Preprocess(
        given.crop_size[0], tuple(given.mean), tuple(given.std), given.interpolation.value
    )


def behead(model: nn.Module, name: str) -> None:
    """Put nothing in the place of a classifier's last layer, so that it gives what that layer read.

    Raises UserError for the few whose last layer is not linear, or that have classifiers on the way.
    """
    layers = [
        (path, m) for path, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
    ]
    path, last = layers[-1]
    if not isinstance(last, nn.Linear) or hasattr(model, "aux_logits"):
        raise UserError(
            f"torchvision's {name} does not end in one linear layer, so its features cannot be read"
        )
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Identity())
