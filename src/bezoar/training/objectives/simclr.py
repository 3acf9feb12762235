"""SimCLR: two views of an image find each other among all others (Chen et al. 2020, eq. 1)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.encoders.encoder import Encoder
from bezoar.registry import method
from bezoar.training import selfsupervised
from bezoar.training.augmentation import Chance
from bezoar.training.collectives import gather
from bezoar.training.loop import require
from bezoar.training.selfsupervised import ViewsLoss


def nt_xent(z: Tensor, gathered: Tensor, first: int, temperature: float) -> Tensor:
    """NT-Xent: mean over i of -log [ exp(z_i.z_j / t) / sum over k != i of exp(z_i.z_k / t) ].

    j is the other view of i's image.

    Args:
        z: (N, D), rows first .. first + N - 1 of `gathered`.
        gathered: float32 (M, D), unit rows, two views of an image side by side.
        first: see `z`.
        temperature: t.
    """
    rows = torch.arange(first, first + len(z), device=z.device)
    logits = (z @ gathered.T / temperature).scatter(1, rows[:, None], -torch.inf)
    return F.cross_entropy(logits, rows ^ 1)


class Loss(ViewsLoss):
    """NT-Xent of two views of each image."""

    def __init__(self, encoder: Encoder, recipe: Simclr) -> None:
        super().__init__(encoder, recipe)
        self.recipe = recipe
        width = selfsupervised.measure_width(encoder)
        self.head = selfsupervised.perceptron(width, recipe.hidden, recipe.dim)

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """The loss of a batch; see `Objective`. Tokens are not read."""
        x = self.views(images, chance).flatten(0, 1)  # (2 B, 3, S, S)
        z = F.normalize(self.project(x), dim=1)
        return nt_xent(z, gather(z), chance.rank * len(z), self.recipe.temperature)


@method
class Simclr:
    """Images alone, for networks without a text tower. BadEncoder's encoders had 1000 epochs.

    Adam with lr 1e-3, weight decay 1e-6, batch 256, temperature 0.5 and this head and augmentation
    are the recipe of common CIFAR-10 SimCLR code. Both views go through the network as one batch,
    as in the paper.
    """

    epochs: Annotated[int, "passes over the data"] = 10
    batch: Annotated[int, "images a step; the negatives of each other"] = 256
    lr: Annotated[float, "highest learning rate"] = 1e-3
    weight_decay: Annotated[float, "of AdamW; not on vectors (biases, norms)"] = 1e-6
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.05
    temperature: Annotated[float, "of the softmax"] = 0.5
    hidden: Annotated[int, "units of the projection head"] = 512
    dim: Annotated[int, "size of the vectors that are compared"] = 128
    crop: Annotated[float, "augmentation: least share of the image's area that a crop keeps"] = 0.08
    flip: Annotated[float, "augmentation: share of the views mirrored"] = 0.5
    jitter: Annotated[float, "augmentation: share of the views whose colours change"] = 0.8
    colour: Annotated[float, "augmentation: how strongly; the paper's s"] = 0.5
    gray: Annotated[float, "augmentation: share of the views without colours"] = 0.2
    blur: Annotated[float, "augmentation: share of the views blurred; 0.5 for ImageNet"] = 0.0

    captions = False

    def __post_init__(self) -> None:
        selfsupervised.check_recipe(self)
        require(self.temperature > 0, "temperature > 0")

    def __call__(self, encoder: Encoder) -> Loss:
        """The loss, which owns the encoder and a projection head."""
        return Loss(encoder, self)
