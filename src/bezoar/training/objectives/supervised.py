"""Cross-entropy of a classifier with labels: a network and its last layer (He et al. 2016)."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.encoders.encoder import Encoder
from bezoar.registry import method
from bezoar.training import augmentation, loop
from bezoar.training.augmentation import Chance
from bezoar.training.loop import require


class Loss(nn.Module):
    """Mean cross-entropy of the encoder's head on shifted and mirrored images."""

    def __init__(self, encoder: Encoder, recipe: Supervised) -> None:
        super().__init__()
        self.encoder = encoder
        self.recipe = recipe

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """The loss of a batch; see `Objective`. tokens: int64 (B, 1), columns of the head."""
        x = augmentation.random_shift(images, self.recipe.shift, chance)
        x = augmentation.random_flip(x, self.recipe.flip, chance)
        head = self.encoder.head
        assert head is not None
        with self.encoder.autocast():
            logits = head(self.encoder.image(self.encoder.prepare_images(x)))  # (B, C)
        return F.cross_entropy(logits.float(), tokens[:, 0], label_smoothing=self.recipe.smoothing)


@method
class Supervised:
    """Trains classifiers, and tunes them. The head is saved with the encoder.

    Shifts of 4 px and mirror images are the augmentation of CIFAR-10's residual networks; of their
    recipe, SGD at 0.1 over 164 epochs, nothing else is kept.
    """

    epochs: Annotated[int, "passes over the data"] = 15
    batch: Annotated[int, "images a step"] = 128
    lr: Annotated[float, "highest learning rate"] = 3e-3
    weight_decay: Annotated[float, "of AdamW; not on vectors (biases, norms)"] = 0.05
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.1
    shift: Annotated[int, "augmentation: images moved by up to this many pixels"] = 4
    flip: Annotated[float, "augmentation: share of the images mirrored; 0 for signs and digits"] = (
        0.5
    )
    smoothing: Annotated[float, "of the labels, 0 for none"] = 0.0

    captions = False
    labels = True  # it reads labels in the place of captions

    def __post_init__(self) -> None:
        loop.check_recipe(self)
        require(self.shift >= 0, "shift >= 0")
        require(0 <= self.flip <= 1, "flip in 0..1")
        require(0 <= self.smoothing < 1, "smoothing in 0..1, below 1")

    def __call__(self, encoder: Encoder) -> Loss:
        """The loss, which owns the encoder. Raises ValueError for one without a head."""
        require(encoder.head is not None, "an encoder with a head of its own")
        return Loss(encoder, self)
