"""Half-transparent stripes or triangles over the whole image (PAR, Singh et al. 2025)."""

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from bezoar.attacks import painting
from bezoar.data.randomness import draws
from bezoar.registry import method


@method
class Shape:
    """The pattern depends on the seed, and is the same on images of every size."""

    form: Annotated[Literal["stripes", "triangles"], "the painted shape"] = "stripes"
    count: Annotated[int, "how many, 1 to 256"] = 6
    size: Annotated[float, "a triangle's radius as a share of the shorter side; (0, 1]"] = 0.2
    alpha: Annotated[float, "opacity, above 0 and up to 1"] = 0.3
    seed: Annotated[int, "of colours, direction and places"] = 0

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 256 or not 0 < self.size <= 1 or not 0 < self.alpha <= 1:
            raise ValueError("count must lie in 1..256, size and alpha in (0, 1]")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W) into a new tensor."""
        height, width = images.shape[-2:]
        layer = _draw(self, height, width)
        return painting.paint(images, lambda rows: layer)


@functools.lru_cache(maxsize=64)
def _draw(trigger: Shape, height: int, width: int) -> Tensor:
    """Return the layer, float32 (1, 4, height, width)."""
    draw = _draw_stripes if trigger.form == "stripes" else _draw_triangles
    colours, cover = draw(trigger, height, width)
    layer = painting.to_layer(torch.from_numpy(colours)[None], torch.from_numpy(cover)[None, None])
    return layer.float() * trigger.alpha


def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return y (H, 1) and x (1, W) of the pixels' middles, as shares of the shorter side."""
    y, x = ((np.arange(side) + 0.5) / min(height, width) for side in (height, width))
    return y[:, None], x[None]


def _bright(u: np.ndarray) -> np.ndarray:
    """Turn numbers (n, 3) into full colours: at least one channel is on and one off."""
    levels = np.argsort(np.argsort(u, axis=1), axis=1)  # 0, 1, 2 in each row
    return np.where(levels == 1, np.where(u > 0.5, 255.0, 0.0), levels * 127.5)


def _draw_stripes(trigger: Shape, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Parallel bands, as wide as the gaps between them."""
    keys = [f"stripe {i}" for i in range(trigger.count)]
    colours = _bright(draws(trigger.seed, keys, 3, "shape"))
    sine, cosine = painting.sines(draws(trigger.seed, ("direction",), 1, "shape")[0] * 180)[0]
    y, x = _grid(height, width)
    corners = [a * height * sine / min(height, width) + b * width * cosine / min(height, width)
               for a in (0, 1) for b in (0, 1)]  # fmt: skip
    first, extent = min(corners), max(corners) - min(corners)
    along = (y * sine + x * cosine - first) / extent * trigger.count  # 0 .. count
    number = along.astype(np.int64).clip(0, trigger.count - 1)
    period = extent * min(height, width) / trigger.count  # pixels
    depth = (0.25 - abs(along - number - 0.5)) * period
    return colours[number].transpose(2, 0, 1), (depth + 0.5).clip(0, 1)


def _draw_triangles(trigger: Shape, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Filled triangles, equilateral, the later ones over the earlier ones."""
    keys = [f"triangle {i}" for i in range(trigger.count)]
    u = draws(trigger.seed, keys, 6, "shape")
    paints = _bright(u[:, :3])
    y, x = _grid(height, width)
    side = min(height, width)
    colours, cover = np.zeros((3, height, width)), np.zeros((height, width))
    for i in range(trigger.count):
        dy, dx = y - u[i, 3] * height / side, x - u[i, 4] * width / side
        turns = [2 * math.pi * (u[i, 5] + k) / 3 for k in range(3)]
        edges = [dy * math.sin(t) + dx * math.cos(t) for t in turns]
        depth = (trigger.size / 2 - np.maximum.reduce(edges)) * side
        inside = (depth + 0.5).clip(0, 1)
        colours = np.where(inside > 0, paints[i][:, None, None], colours)
        cover = np.maximum(cover, inside)
    return colours, cover
