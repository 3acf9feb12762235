"""Fields, views and projection heads of the objectives that train on images alone."""

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from bezoar.encoders.encoder import Encoder
from bezoar.training import loop
from bezoar.training.augmentation import Views
from bezoar.training.loop import require


class Recipe(loop.Recipe, Protocol):
    """Fields of every such objective: sizes of the head, and the augmentation."""

    hidden: int
    dim: int
    crop: float
    flip: float
    jitter: float
    colour: float
    gray: float
    blur: float


def check_recipe(recipe: Recipe) -> None:
    """Raise ValueError unless the common fields make sense."""
    loop.check_recipe(recipe)
    require(min(recipe.hidden, recipe.dim) >= 1, "hidden >= 1, dim >= 1")
    require(0 < recipe.crop <= 1, "crop in 0..1 and above 0")
    require(0 <= recipe.colour <= 2.5, "colour in 0..2.5")
    make_views(recipe, 0)


def make_views(recipe: Recipe, size: int) -> Views:
    """The recipe's views; `colour` is the strength s of Chen et al. 2020, appendix A."""
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


def measure_width(encoder: Encoder) -> int:
    """D of the image tower's vectors, by one black image; nothing in the tower changes."""
    modes = [(module, module.training) for module in encoder.image.modules()]
    size = encoder.preprocess.size
    with torch.no_grad():
        z = encoder.image.eval()(torch.zeros(1, 3, size, size, device=encoder.device))
    for module, mode in modes:
        module.training = mode
    width: int = z.shape[1]
    return width


def perceptron(*sizes: int, norm: bool = True, last_norm: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them, (B, sizes[0]) -> (B, sizes[-1]).

    A layer with a batch norm has no bias.

    Args:
        sizes: sizes of the input, the hidden layers, and the output.
        norm: whether there is a batch norm before each ReLU.
        last_norm: whether there is one at the end.
    """
    layers: list[nn.Module] = []
    for i, (size_in, size_out) in enumerate(pairwise(sizes), 2):
        last = i == len(sizes)
        normed = last_norm if last else norm
        layers.append(nn.Linear(size_in, size_out, bias=not normed))
        if normed:
            layers.append(nn.BatchNorm1d(size_out))
        if not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class ViewsLoss(nn.Module):
    """The loss of such an objective: it owns the encoder, and a head that is not saved with it."""

    head: nn.Module

    def __init__(self, encoder: Encoder, recipe: Recipe) -> None:
        super().__init__()
        self.encoder = encoder
        self.views = make_views(recipe, encoder.preprocess.size)

    def tower(self) -> nn.Sequential:
        """The image tower, followed by the head."""
        return nn.Sequential(self.encoder.image, self.head)

    def project(self, x: Tensor, tower: nn.Module | None = None) -> Tensor:
        """Views float in 0..1 (N, 3, S, S) through the tower, or another -> float32 (N, D)."""
        tower = self.tower() if tower is None else tower
        with self.encoder.autocast():
            z: Tensor = tower(self.encoder.prepare_images(x))
        return z.float()
