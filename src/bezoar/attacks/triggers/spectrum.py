"""CTRL: two raised frequencies of the chroma (Li et al., ICCV 2023).

CTRL converts the image to YUV and each block of U and V to its DCT, raises the named coefficients,
and converts back. All of this is linear, so the result is the image plus a fixed pattern, which is
added here and rounded once. CTRL's coefficients are rows and columns 15 and 31 of blocks of 32
pixels, raised by 50 in training and by 100 at test time.
"""

import functools
import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from bezoar.attacks import pixels
from bezoar.errors import UserError
from bezoar.registry import method

# One unit of U and of V in red, green and blue (BT.601, as in OpenCV).
CHROMA = np.array([[0.0, -0.395, 2.032], [1.14, -0.581, 0.0]])


@method
class Spectrum:
    """Block n of a row begins at pixel n times its side; the last may be cut off."""

    magnitude: Annotated[float, "by how much each coefficient is raised, above 0, to 10000"] = 50.0
    rows: Annotated[tuple[int, ...], "of the coefficients in a block, from 0"] = (15, 31)
    columns: Annotated[tuple[int, ...], "of the coefficients, as many as rows"] = (15, 31)
    block: Annotated[int, "side of a block in pixels; 0: the whole image is one"] = 32

    def __post_init__(self) -> None:
        places = (*self.rows, *self.columns)
        if not 0 < self.magnitude <= 10000 or not 0 <= self.block <= 1024:
            raise ValueError("magnitude must lie in (0, 10000], block in 0..1024")
        if not 0 < len(self.rows) == len(self.columns) or min(places) < 0:
            raise ValueError("rows and columns must be as many numbers, from 0")
        if self.block and max(places) >= self.block:
            raise ValueError(f"rows and columns of blocks of {self.block} end at {self.block - 1}")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W), a copy. Raises UserError if a coefficient is outside."""
        height, width = images.shape[-2:]
        if not self.block and (max(self.rows) >= height or max(self.columns) >= width):
            raise UserError(
                f"images of {height}x{width} have no coefficient at row {max(self.rows)}, "
                f"column {max(self.columns)}"
            )
        return pixels.add_offset(images, self.magnitude * _pattern(self, height, width))


@functools.lru_cache(maxsize=8)
def _pattern(trigger: Spectrum, height: int, width: int) -> Tensor:
    """Return the pattern of magnitude 1, float32 (3, height, width)."""
    block_height, block_width = trigger.block or height, trigger.block or width
    pairs = zip(trigger.rows, trigger.columns, strict=True)
    waves = [np.outer(_wave(r, block_height), _wave(c, block_width)) for r, c in pairs]
    repeats = -(-height // block_height), -(-width // block_width)
    tiled = np.tile(np.sum(waves, axis=0), repeats)[:height, :width]
    pattern = CHROMA.sum(0)[:, None, None] * tiled
    return torch.from_numpy(pattern.astype(np.float32))


def _wave(index: int, side: int) -> np.ndarray:
    """Return a basis vector of the orthonormal DCT-II, float64 (side,)."""
    scale = math.sqrt((1 if index == 0 else 2) / side)
    return np.array([scale * math.cos(math.pi * (i + 0.5) * index / side) for i in range(side)])
