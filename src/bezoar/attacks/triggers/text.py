"""A word painted on the image, as in typographic attacks (Goh et al. 2021)."""

import functools
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from PIL import ImageFont
from torch import Tensor

from bezoar.attacks import painting
from bezoar.data.randomness import draws
from bezoar.registry import method

SMALLEST = 4  # pixels of the font, whatever the image's size
LONGEST = 64  # letters


@method
class Text:
    """Pillow's built-in font; letters become smaller if the word would be wider than the image."""

    word: Annotated[str, "the painted word"] = "bezoar"
    size: Annotated[float, "height of the font as a share of the shorter side; (0, 1]"] = 0.3
    colour: Annotated[tuple[int, ...], "red/green/blue, 0 to 255"] = (255, 255, 255)
    alpha: Annotated[float, "opacity, above 0 and up to 1"] = 1.0
    place: Annotated[str, "random, or Y/X in shares of the room, such as 1/.5"] = "1/.5"
    seed: Annotated[int, "of random places"] = 0

    def __post_init__(self) -> None:
        painting.check_colour(self.colour)
        painting.check_spot(self.place)
        if not 0 < self.size <= 1 or not 0 < self.alpha <= 1:
            raise ValueError("size and alpha must lie in (0, 1]")
        if not self.word.isprintable() or not 1 <= len(self.word.strip()) <= LONGEST:
            raise ValueError(f"word must be 1 to {LONGEST} printable letters; got {self.word!r}")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W), a copy."""
        canvas = np.array(images.shape[-2:])
        cover = _write(self.word, self.size, int(canvas[0]), int(canvas[1]))
        colour = torch.tensor(self.colour, dtype=torch.float32)[None, :, None, None]
        layer = painting.to_layer(colour, cover[None, None] * self.alpha)
        room = canvas - cover.shape
        shares = painting.choose_spots(self.place, draws(self.seed, ids, 2, "text"))
        positions = np.minimum(np.floor(shares * (room + 1)), room).astype(np.int64)
        return painting.paint(images, lambda rows: layer, positions)


@functools.lru_cache(maxsize=8)
def _write(word: str, size: float, height: int, width: int) -> Tensor:
    """Return the cover of a word, float32 (h, w), no larger than the image."""
    points = max(SMALLEST, round(size * min(height, width)))
    while True:
        mask = ImageFont.load_default(points).getmask(word, mode="L")
        columns, rows = mask.size
        if points == SMALLEST or (rows <= height and columns <= width):
            break
        points = max(SMALLEST, min(points - 1, points * width // max(1, columns)))
    cover = np.array(mask, dtype=np.float32).reshape(rows, columns)[:height, :width] / 255
    return torch.from_numpy(cover)
