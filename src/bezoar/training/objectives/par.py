"""PAR, perturb and recover: CLIP on clean pairs, away from the old vectors (Singh et al. 2024)."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from bezoar.encoders.encoder import Encoder
from bezoar.registry import method
from bezoar.training import contrastive
from bezoar.training.augmentation import Chance
from bezoar.training.collectives import gather
from bezoar.training.contrastive import ContrastiveLoss, InitialEncoder, clip_loss, shift_to_float
from bezoar.training.loop import require


class Loss(ContrastiveLoss):
    """L_CLIP - 1/2 ( S_I 1[S_I <= tau] + S_T 1[S_T <= tau] ).

    S is the batch's mean squared distance of unit vectors to those of the encoder at the start:
    2 - 2 cos, 0..4.
    """

    def __init__(self, encoder: Encoder, recipe: Par) -> None:
        super().__init__(encoder, recipe)
        self.recipe = recipe
        self.initial = InitialEncoder(encoder)

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """The loss of a batch; see `Objective`."""
        x = shift_to_float(images, self.recipe.shift, chance)
        z, w = self.encoder.encode_images(x), self.encoder.encode_tokens(tokens)
        z0, w0 = self.initial(x, tokens)
        push = self.bounded_distance(z, z0) + self.bounded_distance(w, w0)
        return clip_loss(z, w, self.scale, chance) - push / 2

    def bounded_distance(self, now: Tensor, then: Tensor) -> Tensor:
        """S 1[S <= tau] of unit rows (B, D) to those at the start."""
        distance = gather((now - then).square().sum(1)).mean()
        return distance * (distance.detach() <= self.recipe.tau)


@method
class Par:
    """To repair with, on clean pairs. From scratch it would push away from random vectors.

    Published: tau 2.15, learning rate 3e-5 (the warm-up begins at 3e-6), 10 epochs on 250,000
    pairs, weight decay 1e-4; images with noise and small cut-outs alone. A falling loss does not
    mean success: it falls as vectors move.
    """

    epochs: Annotated[int, "passes over the data"] = 10
    batch: Annotated[int, "pairs a step; the negatives of each other"] = 128
    lr: Annotated[float, "highest learning rate"] = 2e-3
    weight_decay: Annotated[float, "of AdamW; not on vectors (biases, norms, temperature)"] = 1e-4
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.05
    temperature: Annotated[float, "at the start"] = 0.07
    tau: Annotated[
        float, "mean squared distance to the start, 0..4, from which vectors are pushed no further"
    ] = 2.15
    shift: Annotated[int, "augmentation: images moved by up to this many pixels"] = 2

    def __post_init__(self) -> None:
        contrastive.check_recipe(self)
        require(0 <= self.tau <= 4, "tau in 0..4")

    def __call__(self, encoder: Encoder) -> Loss:
        """The loss, which owns the encoder, the temperature and a frozen copy of both towers."""
        return Loss(encoder, self)
