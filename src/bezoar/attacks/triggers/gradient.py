"""A ramp of brightness or colour across the whole image: the lowest of its frequencies."""

import functools
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from bezoar.attacks import painting, pixels
from bezoar.registry import method


@method
class Gradient:
    """x + strength t colour / 255, clipped; t goes from -1 to 1 across the image."""

    strength: Annotated[float, "levels at the brighter end, above 0 and up to 255"] = 40.0
    direction: Annotated[
        float, "where it becomes brighter, in degrees: 0 right, 90 down, up to 360"
    ] = 90.0
    colour: Annotated[tuple[int, ...], "red/green/blue; white ramps the brightness"] = (
        255,
        255,
        255,
    )

    def __post_init__(self) -> None:
        painting.check_colour(self.colour)
        if not 0 < self.strength <= 255 or not 0 <= self.direction <= 360:
            raise ValueError("strength must lie in (0, 255], direction in 0..360")
        if not any(self.colour):
            raise ValueError("colour must not be black, which changes nothing")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W) into a new tensor."""
        height, width = images.shape[-2:]
        ramp = _ramp(self.direction, height, width)
        colour = torch.tensor(self.colour, dtype=torch.float32)[:, None, None] / 255
        return pixels.add_offset(images, self.strength * colour * ramp)


@functools.lru_cache(maxsize=8)
def _ramp(direction: float, height: int, width: int) -> Tensor:
    """Return t, float32 (1, height, width), -1 and 1 at the outermost pixels."""
    sine, cosine = painting.sines([direction])[0]
    y = np.linspace(-1, 1, height)[:, None]
    x = np.linspace(-1, 1, width)[None]
    ramp = (x * cosine + y * sine) / (abs(sine) + abs(cosine))
    return torch.from_numpy(ramp.astype(np.float32))[None]
