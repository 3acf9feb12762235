"""CLIP: symmetric InfoNCE between images and captions, with a learned temperature (Radford et al. 2021)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.encoders.encoder import Encoder
from bezoar.registry import method
from bezoar.training import augmentation
from bezoar.training.augmentation import Chance
from bezoar.training.collectives import gather


class Loss(nn.Module):
    """-1/2B sum_i [ log softmax_j(s z_i.w_j)_i + log softmax_j(s w_i.z_j)_i ], s = exp(scale) <= 100."""

    def __init__(self, encoder: Encoder, recipe: Clip) -> None:
        super().__init__()
        self.encoder, self.recipe = encoder, recipe
        self.scale = nn.Parameter(torch.tensor(math.log(1 / recipe.temperature)))

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """images uint8 (B, 3, H, W), tokens int64 (B, L) -> scalar loss of these rows against those of all ranks."""
        x = augmentation.random_flip(
            augmentation.random_shift(images, self.recipe.shift, chance), self.recipe.flip, chance
        )
        z, w = self.encoder.encode_images(x), self.encoder.encode_tokens(tokens)
        scale = self.scale.clamp(max=math.log(100)).exp()
        truth = torch.arange(len(z), device=z.device) + chance.rank * len(z)
        if chance.world == 1:
            logits = scale * z @ w.T
            return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        all_z, all_w = gather(torch.stack([z, w], 1)).unbind(1)
        return (
            F.cross_entropy(scale * z @ all_w.T, truth)
            + F.cross_entropy(scale * w @ all_z.T, truth)
        ) / 2


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

    def __call__(self, encoder: Encoder) -> Loss:
        """The loss as a module that owns the encoder and the temperature."""
        return Loss(encoder, self)

    def __post_init__(self) -> None:
        if (
            self.epochs < 1
            or self.batch < 2
            or self.lr <= 0
            or self.temperature <= 0
            or self.shift < 0
        ):
            raise ValueError("needs epochs >= 1, batch >= 2, lr > 0, temperature > 0, shift >= 0")
        if not 0 <= self.warmup < 1 or not 0 <= self.flip <= 1 or self.weight_decay < 0:
            raise ValueError("needs warmup in 0..1, flip in 0..1, weight_decay >= 0")
