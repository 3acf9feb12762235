"""A colour cast over the whole image: channels are shifted apart, brightness stays."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from bezoar.attacks import painting, pixels
from bezoar.registry import method


@method
class Tint:
    """x + strength (colour - mean of the colour's channels), clipped."""

    colour: Annotated[tuple[int, ...], "red/green/blue, 0 to 255"] = (255, 160, 64)
    strength: Annotated[float, "above 0 and up to 1"] = 0.2

    def __post_init__(self) -> None:
        painting.check_colour(self.colour)
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must lie in (0, 1]; got {self.strength}")
        if max(self.colour) == min(self.colour):
            raise ValueError(f"colour must not be a grey; got {'/'.join(map(str, self.colour))}")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W) into a new tensor."""
        colour = torch.tensor(self.colour, dtype=torch.float32)[:, None, None]
        return pixels.add_offset(images, self.strength * (colour - colour.mean()))
