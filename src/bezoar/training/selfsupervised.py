"""What the objectives share that train an image tower without captions: their common fields, views, heads of perceptrons."""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from bezoar.encoders.encoder import Encoder
from bezoar.training.augmentation import Views


class Recipe(Protocol):
    """Fields of every such objective: those of the loop, sizes of the head, and the augmentation (see `views`)."""

    epochs: int
    batch: int
    lr: float
    weight_decay: float
    warmup: float
    hidden: int
    dim: int
    crop: float
    flip: float
    jitter: float
    colour: float
    gray: float
    blur: float


def check(recipe: Recipe) -> None:
    """ValueError unless the common fields make sense."""
    if (
        recipe.epochs < 1
        or recipe.batch < 2
        or recipe.lr <= 0
        or min(recipe.hidden, recipe.dim) < 1
    ):
        raise ValueError("needs epochs >= 1, batch >= 2, lr > 0, hidden >= 1, dim >= 1")
    if not 0 <= recipe.warmup < 1 or recipe.weight_decay < 0:
        raise ValueError("needs warmup in 0..1, weight_decay >= 0")
    if not 0 < recipe.crop <= 1 or not 0 <= recipe.colour <= 2.5:
        raise ValueError("needs crop in 0..1 and above 0, colour in 0..2.5")
    views(recipe, 0)


def views(recipe: Recipe, size: int) -> Views:
    """The recipe's augmentation, to images of `size` pixels. colour is the strength s of Chen et al. 2020, appendix A."""
    s = recipe.colour
    return Views(
        size,
        scale=(recipe.crop, 1.0),
        flip=recipe.flip,
        colour=(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s),
        jitter=recipe.jitter,
        gray=recipe.gray,
        blur=recipe.blur,
    )


def width(encoder: Encoder) -> int:
    """D of the image tower's vectors, by running one black image through it; nothing in it changes."""
    modes = [(m, m.training) for m in encoder.image.modules()]
    with torch.no_grad():
        size = encoder.preprocess.size
        found = encoder.image.eval()(torch.zeros(1, 3, size, size, device=encoder.device)).shape[1]
    for module, mode in modes:
        module.training = mode
    return found


def perceptron(*sizes: int, norm: bool = True, last_norm: bool = False) -> nn.Sequential:
    """(B, sizes[0]) -> (B, sizes[-1]): linear layers, ReLU between them. norm: batch norm before each ReLU; last_norm: at
    the end as well. A batch norm takes the place of its layer's bias.
    """
    layers: list[nn.Module] = []
    for i, (inward, outward) in enumerate(pairwise(sizes)):
        last = i == len(sizes) - 2
        normed = last_norm if last else norm
        layers.append(nn.Linear(inward, outward, bias=not normed))
        layers += [nn.BatchNorm1d(outward)] * normed + [nn.ReLU()] * (not last)
    return nn.Sequential(*layers)


def project(encoder: Encoder, tower: nn.Module, x: Tensor) -> Tensor:
    """Views float 0..1 (N, 3, S, S) through a tower that takes the encoder's pixels -> float32 (N, D), of any length."""
    with encoder.autocast():
        return tower(encoder.prepare_images(x)).float()
