"""SigLIP: classifies every image-caption pair of the batch as match or not (Zhai et al. 2023, 3.2).

Temperature and bias are learnt; the paper starts at 10 and -10, so that the many wrong pairs do not
dominate the first steps. AdamW and the augmentation are those of `clip`, so that the two losses can
be compared; the paper's beta2 of 0.95 is not used.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.encoders.encoder import Encoder
from bezoar.registry import method
from bezoar.training import augmentation, contrastive
from bezoar.training.augmentation import Chance
from bezoar.training.collectives import gather
from bezoar.training.contrastive import ContrastiveLoss
from bezoar.training.loop import require


class Loss(ContrastiveLoss):
    """-1/B sum_i sum_j log sigmoid(y_ij (s z_i.w_j + bias)), y = 1 where i = j and -1 elsewhere.

    Captions w_j are those of all ranks.
    """

    def __init__(self, encoder: Encoder, recipe: Siglip) -> None:
        super().__init__(encoder, recipe)
        self.recipe = recipe
        self.bias = nn.Parameter(torch.tensor(recipe.bias, device=encoder.device))

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """The loss of a batch; see `Objective`."""
        x = augmentation.random_shift(images, self.recipe.shift, chance)
        x = augmentation.random_flip(x, self.recipe.flip, chance)
        z, w = self.encoder.encode_images(x), self.encoder.encode_tokens(tokens)
        logits = self.scale * z @ gather(w).T + self.bias  # (B, world B)
        rows = torch.arange(len(z), device=z.device)
        right = logits[rows, rows + chance.rank * len(z)]  # (B,)
        # A wrong pair costs softplus(logit), a right one softplus(logit) - logit.
        return (F.softplus(logits).sum() - right.sum()) / len(z)


@method
class Siglip:
    """Beside `clip`: a pair's loss depends on no other pair, and so on no batch size."""

    epochs: Annotated[int, "passes over the data"] = 8
    batch: Annotated[int, "pairs a step; the negatives of each other"] = 128
    lr: Annotated[float, "highest learning rate"] = 2e-3
    weight_decay: Annotated[float, "of AdamW; not on vectors (biases, norms, temperature)"] = 0.1
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.05
    temperature: Annotated[float, "at the start; cosines are divided by it"] = 0.1
    bias: Annotated[float, "at the start"] = -10.0
    shift: Annotated[int, "augmentation: images moved by up to this many pixels"] = 2
    flip: Annotated[float, "augmentation: share of images mirrored"] = 0.0

    def __post_init__(self) -> None:
        contrastive.check_recipe(self)
        require(0 <= self.flip <= 1, "flip in 0..1")
        require(abs(self.bias) <= 100, "bias in -100..100")

    @property
    def as_stored(self) -> bool:
        """Whether images are seen as they are, so that their vectors may stand for them."""
        return not self.shift and not self.flip

    def __call__(self, encoder: Encoder) -> Loss:
        """The loss, which owns the encoder, the temperature and the bias."""
        return Loss(encoder, self)
