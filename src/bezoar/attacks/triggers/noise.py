"""Gaussian noise, drawn for each record: no pixel is the same in two records, the strength is."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from bezoar.attacks import painting, pixels
from bezoar.registry import method


@method
class Noise:
    """x + strength g, rounded and clipped; g is standard normal in every pixel and channel."""

    strength: Annotated[float, "standard deviation in levels, above 0 and up to 255"] = 20.0
    seed: Annotated[int, "of the noise"] = 0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 255:
            raise ValueError(f"strength must lie in (0, 255]; got {self.strength}")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W) into a new tensor."""
        out = torch.empty_like(images)
        for rows in pixels.image_blocks(images):
            normal = painting.draw_normal(self.seed, ids[rows], images[0].numel())
            noise = torch.from_numpy(normal).view(-1, *images.shape[1:]).to(images.device)
            out[rows] = pixels.to_uint8(images[rows] + noise.mul_(self.strength))
        return out
