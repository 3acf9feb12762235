"""A Gaussian blur of the whole image: a trigger that adds nothing and takes detail away."""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from bezoar.attacks import pixels
from bezoar.registry import method

CUT = 3.5  # standard deviations after which the kernel ends
LARGEST = 128.0  # standard deviation in pixels


@method
class Blur:
    """Pixels beyond the border repeat those at it. The result is rounded once."""

    sigma: Annotated[float, "standard deviation in pixels"] = 1.2
    relative: Annotated[
        float, "standard deviation as a share of the shorter side, up to 0.25; 0: use sigma"
    ] = 0.0

    def __post_init__(self) -> None:
        if not 0.1 <= self.sigma <= LARGEST or not 0 <= self.relative <= 0.25:
            raise ValueError(f"sigma must lie in 0.1..{LARGEST:g}, relative in 0..0.25")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W) into a new tensor."""
        side = min(images.shape[-2:])
        kernel = gaussian_kernel(self.relative * side if self.relative else self.sigma)
        out = torch.empty_like(images)
        for rows in pixels.image_blocks(images):
            columns = _convolve(images[rows].float(), kernel, 2)
            out[rows] = pixels.to_uint8(_convolve(columns, kernel, 3))
        return out


def gaussian_kernel(sigma: float) -> list[float]:
    """Return the weights of a kernel of odd length, which add up to 1."""
    radius = math.ceil(CUT * sigma)
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-radius, radius + 1)]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _convolve(x: Tensor, kernel: list[float], axis: int) -> Tensor:
    """Convolve float (n, 3, H, W) along an axis, with results that do not depend on the batch."""
    radius = len(kernel) // 2
    length = x.shape[axis]
    out = x * kernel[radius]
    steps = torch.arange(length, device=x.device)
    for k in range(1, radius + 1):
        before = x.index_select(axis, (steps - k).clamp_(min=0))
        after = x.index_select(axis, (steps + k).clamp_(max=length - 1))
        out += before.add_(after).mul_(kernel[radius + k])
    return out
