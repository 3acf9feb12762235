"""A thin frame or circle at one place, in a different colour in each record."""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from bezoar.attacks import painting
from bezoar.data.randomness import draws
from bezoar.errors import UserError
from bezoar.registry import method


@method
class Ring:
    """A frame is sharp; a circle is antialiased, and an ellipse where images are not square."""

    form: Annotated[Literal["frame", "circle"], "along the border, or round"] = "frame"
    width: Annotated[int, "in pixels"] = 1
    margin: Annotated[int, "pixels left free at the border"] = 0
    alpha: Annotated[float, "opacity, above 0 and up to 1"] = 1.0
    seed: Annotated[int, "of the colours"] = 0

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 256 or not 0 <= self.margin <= 256 or not 0 < self.alpha <= 1:
            raise ValueError("width must lie in 1..256, margin in 0..256, alpha in (0, 1]")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W), a copy. Raises UserError if there is no room for the ring."""
        height, width = images.shape[-2:]
        if 2 * (self.margin + self.width) > min(height, width):
            raise UserError(
                f"a ring of {self.width} pixels with margin {self.margin} exceeds images of "
                f"{height}x{width}"
            )
        depth = _frame_depth(height, width) if self.form == "frame" else _depth(height, width)
        # The ring lies where the distance from the border is margin..margin + width.
        middle = self.margin + self.width / 2
        cover = (self.width / 2 + 0.5 - (depth - middle).abs()).clamp(0, 1).mul_(self.alpha)
        colours = np.floor(draws(self.seed, ids, 3, "ring") * 256).astype(np.float32)

        def draw(rows: slice) -> Tensor:
            return painting.to_layer(torch.from_numpy(colours[rows])[:, :, None, None], cover[None])

        return painting.paint(images, draw)


def _frame_depth(height: int, width: int) -> Tensor:
    """Return how far the middle of each pixel is from the border, float32 (1, H, W)."""
    y, x = (torch.arange(side, dtype=torch.float32) + 0.5 for side in (height, width))
    return torch.minimum(torch.minimum(y, height - y)[:, None], torch.minimum(x, width - x))[None]


def _depth(height: int, width: int) -> Tensor:
    """Return how far each pixel is inside the largest circle, in pixels, float32 (1, H, W)."""
    y, x = (
        ((torch.arange(side, dtype=torch.float32) + 0.5) * 2 / side - 1) for side in (height, width)
    )
    radius = (y[:, None] * y[:, None] + x * x).sqrt()
    return ((1 - radius) * (min(height, width) / 2))[None]
