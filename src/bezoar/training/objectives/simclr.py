"""SimCLR: two views of an image find each other among the views of all others (NT-Xent, Chen et al. 2020, eq. 1)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.encoders.encoder import Encoder
from bezoar.registry import method
from bezoar.training import selfsupervised
from bezoar.training.augmentation import Chance
from bezoar.training.collectives import gather


def nt_xent(z: Tensor, every: Tensor, first: int, temperature: float) -> Tensor:
    """Mean over i of -log [ exp(z_i.z_j / t) / sum over k != i of exp(z_i.z_k / t) ], j being the other view of i's image.

    every: float32 (M, D), unit rows, two views of an image side by side. z: (N, D), its rows first .. first+N-1.
    """
    own = torch.arange(first, first + len(z), device=z.device)
    logits = (z @ every.T / temperature).scatter(1, own[:, None], -torch.inf)
    return F.cross_entropy(logits, own ^ 1)


class Loss(nn.Module):
    """Owns the encoder and the projection head, which is not part of the encoder that is saved."""

    def __init__(self, encoder: Encoder, recipe: Simclr) -> None:
        super().__init__()
        self.encoder, self.recipe = encoder, recipe
        self.views = selfsupervised.views(recipe, encoder.preprocess.size)
        self.head = selfsupervised.perceptron(
            selfsupervised.width(encoder), recipe.hidden, recipe.dim
        )

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """images uint8 (B, 3, H, W), tokens not read -> scalar loss of these images' views against those of all ranks."""
        x = self.views(images, chance).flatten(0, 1)
        z = F.normalize(
            selfsupervised.project(self.encoder, nn.Sequential(self.encoder.image, self.head), x),
            dim=1,
        )
        return nt_xent(z, gather(z), chance.rank * len(z), self.recipe.temperature)


@method
class Simclr:
    """Images alone, for networks without a text tower. AdamW, warm-up and cosine; BadEncoder's encoders had 1000 epochs.

    Adam with lr 1e-3, weight decay 1e-6, batch 256, temperature 0.5 and this head and augmentation are the recipe of common
    CIFAR-10 SimCLR code. Both views go through the network as one batch, as in the paper.
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

    def __call__(self, encoder: Encoder) -> Loss:
        """The loss as a module that owns the encoder and a head of its own."""
        return Loss(encoder, self)

    def __post_init__(self) -> None:
        selfsupervised.check(self)
        if self.temperature <= 0:
            raise ValueError("needs temperature > 0")
