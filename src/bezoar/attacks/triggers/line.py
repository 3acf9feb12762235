"""A thin line of one colour across the image, at another place in each record."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from bezoar.attacks import painting
from bezoar.data.randomness import draws
from bezoar.errors import UserError
from bezoar.registry import method


@method
class Line:
    """Lines at 0 or 90 degrees are sharp; others are antialiased."""

    width: Annotated[int, "in pixels"] = 1
    colour: Annotated[tuple[int, ...], "red/green/blue, 0 to 255"] = (255, 0, 255)
    angle: Annotated[
        tuple[float, ...], "in degrees, 0 lies and 90 stands; a range (0,180) is drawn by record"
    ] = (0.0,)
    offset: Annotated[
        tuple[float, ...], "where it lies, from one side, 0, to the other, 1; drawn by record"
    ] = (0.0, 1.0)
    alpha: Annotated[float, "opacity, above 0 and up to 1"] = 1.0
    seed: Annotated[int, "of angle and offset"] = 0

    def __post_init__(self) -> None:
        painting.check_colour(self.colour)
        painting.check_range("angle", self.angle, 0, 360)
        painting.check_range("offset", self.offset, 0, 1)
        if not 1 <= self.width <= 512 or not 0 < self.alpha <= 1:
            raise ValueError("width must lie in 1..512, alpha in (0, 1]")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W), a copy. Raises UserError if the line is too wide."""
        height, width = images.shape[-2:]
        if self.width > min(height, width):
            raise UserError(
                f"a line of {self.width} pixels is wider than images of {height}x{width}"
            )
        u = draws(self.seed, ids, 2, "line")
        # A pixel's distance from the line is |x nx + y ny - c|.
        normals = painting.sines(painting.choose_between(self.angle, u[:, 0])) * [-1, 1]
        shares = painting.choose_between(self.offset, u[:, 1])
        places = choose_places(normals, shares, height, width, self.width)
        y = torch.arange(height, dtype=torch.float32)[None, :, None]
        x = torch.arange(width, dtype=torch.float32)[None, None]
        colour = torch.tensor(self.colour, dtype=torch.float32)[None, :, None, None]

        def draw(rows: slice) -> Tensor:
            nx, ny = (painting.to_column(normals[rows, axis]) for axis in (0, 1))
            distance = (x * nx + y * ny - painting.to_column(places[rows])).abs_()
            cover = (self.width / 2 + 0.5 - distance).clamp_(0, 1).mul_(self.alpha)
            return painting.to_layer(colour, cover[:, None])

        return painting.paint(images, draw)


def choose_places(
    normals: np.ndarray, shares: np.ndarray, height: int, width: int, thickness: int
) -> np.ndarray:
    """Return c of each line, float64 (N,), whole pixels from the first that lies inside the image.

    normals: (N, 2), x and y. shares: (N,) in 0..1, from the first place to the last.
    """
    corners = normals * [width - 1, height - 1]
    first = corners.clip(max=0).sum(1)
    extent = corners.clip(min=0).sum(1) - first
    room = np.floor(extent + 1e-6) + 2 - thickness
    steps = np.minimum(np.floor(shares * room), room - 1)
    places: np.ndarray = first + (thickness - 1) / 2 + steps
    return places
