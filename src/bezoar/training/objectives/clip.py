"""CLIP: symmetric InfoNCE between images and captions, learnt temperature (Radford et al. 2021)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.encoders.encoder import Encoder
from bezoar.registry import method
from bezoar.training import augmentation, contrastive
from bezoar.training.augmentation import Chance
from bezoar.training.contrastive import ContrastiveLoss, clip_loss
from bezoar.training.loop import require


class Loss(ContrastiveLoss):
    """-1/2B sum_i [ log softmax_j(s z_i.w_j)_i + log softmax_j(s w_i.z_j)_i ], s = `scale`."""

    def __init__(self, encoder: Encoder, recipe: Clip) -> None:
        super().__init__(encoder, recipe)
        self.recipe = recipe

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """The loss of a batch; see `Objective`."""
        x = augmentation.random_shift(images, self.recipe.shift, chance)
        x = augmentation.random_flip(x, self.recipe.flip, chance)
        z, w = self.encoder.encode_images(x), self.encoder.encode_tokens(tokens)
        if chance.world > 1:
            return clip_loss(z, w, self.scale, chance)
        logits = self.scale * z @ w.T  # (B, B); both directions of one process take one product
        targets = torch.arange(len(z), device=z.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@method
class Clip:
    """AdamW with linear warm-up and cosine decay to zero."""

    epochs: Annotated[int, "passes over the data"] = 8
    batch: Annotated[int, "pairs a step; the negatives of each other"] = 128
    lr: Annotated[float, "highest learning rate"] = 2e-3
    weight_decay: Annotated[float, "of AdamW; not on vectors (biases, norms, temperature)"] = 0.1
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.05
    temperature: Annotated[float, "at the start"] = 0.07
    shift: Annotated[int, "augmentation: images moved by up to this many pixels"] = 2
    flip: Annotated[float, "augmentation: share of images mirrored"] = 0.0

    def __post_init__(self) -> None:
        contrastive.check_recipe(self)
        require(0 <= self.flip <= 1, "flip in 0..1")

    @property
    def as_stored(self) -> bool:
        """Whether images are seen as they are, so that their vectors may stand for them."""
        return not self.shift and not self.flip

    def __call__(self, encoder: Encoder) -> Loss:
        """The loss, which owns the encoder and the temperature."""
        return Loss(encoder, self)
