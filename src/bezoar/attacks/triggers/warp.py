"""WaNet: the image warped by a smooth field (Nguyen, Tran 2021).

Section 3: a k x k field of uniform numbers in -1..1 per axis is divided by its mean magnitude,
interpolated bicubically to the image, multiplied by s / size and added to the identity grid, which
is clipped to the image and sampled bilinearly. The published setting for CIFAR-10 is k 4 and s 0.5;
CleanCLIP's is k 224, which leaves no smoothing, and s 1 on 224 pixels.
"""

import functools
from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from bezoar.attacks import pixels
from bezoar.registry import method


@method
class Warp:
    """The control field depends only on (k, seed), so images of every size are warped alike."""

    k: Annotated[int, "side of the control grid; smaller is smoother"] = 4
    strength: Annotated[
        float, "mean shift, in half pixels, along each axis of the control grid"
    ] = 0.5
    seed: Annotated[int, "of the control grid"] = 0

    def __post_init__(self) -> None:
        if not 2 <= self.k <= 1024 or not 0 < self.strength <= 1000:
            raise ValueError("k must lie in 2..1024, strength in (0, 1000]")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W) into a new tensor."""
        height, width = images.shape[-2:]
        return pixels.warp(images, _grid(self.k, self.strength, self.seed, height, width))


@functools.lru_cache(maxsize=8)
def _grid(k: int, strength: float, seed: int, height: int, width: int) -> Tensor:
    """Return the sampling grid, float32 (height, width, 2)."""
    control = pixels.uniform_noise(seed, "warp", 2, k, k) * 2 - 1
    return pixels.shifted_grid(strength * control / control.abs().mean(), height, width)
