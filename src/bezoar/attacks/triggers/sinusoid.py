"""SIG: a sinusoid over the columns (Barni, Kallas, Tondi 2019).

v(i, j) = delta sin(2 pi f j / W) for row i and column j. Barni et al. add it, with delta 20 to 60
and f 6. CleanCLIP blends it instead, .8 x + .2 v with delta 60, which darkens the image by a fifth:
`sinusoid:delta=60,alpha=.2`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from bezoar.attacks import pixels
from bezoar.registry import method


@method
class Sinusoid:
    """x + v, clipped; or (1 - alpha) x + alpha v, clipped, if alpha is above 0."""

    delta: Annotated[float, "amplitude in steps of the 0..255 range"] = 20.0
    frequency: Annotated[float, "periods across the width"] = 6.0
    alpha: Annotated[float, "0 adds the signal; above 0 blends it with that share"] = 0.0

    def __post_init__(self) -> None:
        if (
            not 0 < self.delta <= 255
            or not 0 < self.frequency < math.inf
            or not 0 <= self.alpha <= 1
        ):
            raise ValueError("delta must lie in (0, 255], frequency above 0, alpha in [0, 1]")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W) into a new tensor."""
        signal = _signal(self.delta, self.frequency, images.shape[-1])
        if self.alpha:
            return pixels.blend(images, signal, self.alpha)
        return pixels.add_offset(images, signal)


@functools.lru_cache(maxsize=8)
def _signal(delta: float, frequency: float, width: int) -> Tensor:
    """Return the signal in pixels, float32 (1, 1, width)."""
    phase = 2 * math.pi * frequency / width * torch.arange(width, dtype=torch.float64)
    return (delta * phase.sin()).float()[None, None]
