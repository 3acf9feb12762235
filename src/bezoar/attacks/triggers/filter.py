"""A photo filter: a tone curve for each channel (Nashville in Liu et al. 2019, "ABS").

A curve is given by its values at inputs 0, 64, 128, 192 and 255, and is linear in between. The
named filters imitate those of photo apps; `drawn` moves the points of the identity by seeded random
numbers, and keeps them ascending.
"""

import functools
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from bezoar.attacks import pixels
from bezoar.data.randomness import draws
from bezoar.registry import method

INPUTS = (0, 64, 128, 192, 255)
DRAWN_SHIFT = 80  # levels, the largest shift of a point of a drawn curve
CURVES = {  # red, green, blue
    "nashville": ((56, 103, 167, 218, 255), (38, 74, 121, 166, 201), (97, 117, 138, 158, 171)),
    "kelvin": ((64, 146, 206, 238, 255), (20, 68, 120, 170, 220), (0, 30, 68, 110, 150)),
    "lomo": ((0, 38, 138, 222, 255), (0, 42, 136, 216, 255), (16, 66, 124, 182, 236)),
    "cool": ((0, 46, 100, 156, 216), (6, 66, 128, 190, 250), (48, 112, 166, 214, 255)),
    "faded": ((60, 100, 138, 176, 208), (56, 98, 136, 174, 206), (64, 102, 136, 170, 198)),
}


@method
class Filter:
    """Every pixel's channels go through their curves: a colour in, a colour out."""

    preset: Annotated[
        Literal["nashville", "kelvin", "lomo", "cool", "faded", "drawn"],
        "the curves; drawn takes them from the seed",
    ] = "nashville"
    strength: Annotated[float, "share of the filtered image, above 0 and up to 1"] = 1.0
    seed: Annotated[int, "of drawn curves"] = 0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must lie in (0, 1]; got {self.strength}")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W) into a new tensor."""
        table = _table(self.preset, self.strength, self.seed).to(images.device)
        out = torch.empty_like(images)
        for rows in pixels.image_blocks(images):
            for channel in range(3):
                out[rows, channel] = table[channel][images[rows, channel].int()]
        return out


@functools.lru_cache(maxsize=8)
def _table(preset: str, strength: float, seed: int) -> Tensor:
    """Return the new value of each level of each channel, uint8 (3, 256)."""
    levels = np.arange(256)
    curves = draw_curves(seed) if preset == "drawn" else np.array(CURVES[preset], dtype=np.float64)
    filtered = np.stack([np.interp(levels, INPUTS, curve) for curve in curves])
    mixed = (1 - strength) * levels + strength * filtered
    return torch.from_numpy(mixed.round().clip(0, 255).astype(np.uint8))


def draw_curves(seed: int) -> np.ndarray:
    """Draw the points of three ascending curves, float64 (3, 5)."""
    shift = (draws(seed, ("red", "green", "blue"), len(INPUTS), "filter") * 2 - 1) * DRAWN_SHIFT
    curves: np.ndarray = np.sort((np.array(INPUTS) + shift).clip(0, 255), axis=1)
    return curves
