"""A small patch pasted over the image (BadNets 2017; Carlini and Terzis 2022; BadEncoder 2022)."""

import functools
import re
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from bezoar.attacks import pixels
from bezoar.data.files import arrays
from bezoar.registry import method

MAGENTA = (255, 0, 255)
GREEN = (0, 255, 0)
FILLS = ("white", "checker", "blocks", "noise")


@method
class Patch:
    """`patch:size=10,fill=white` on 32 pixels is BadEncoder's: rows and columns 21..30."""

    size: Annotated[int, "side in pixels of the stored image"] = 6
    fill: Annotated[
        str,
        "white, checker (magenta, green), blocks or noise (both by the seed), an image file, or # "
        "and the pixels (red, green, blue, by rows) in hexadecimal, as `poison --surrogate` finds",
    ] = "checker"
    place: Annotated[
        str, "corner (lower right), upper_left, upper_right, lower_left, centre, random, or Y/X"
    ] = "corner"
    margin: Annotated[int, "pixels left free at the border: corners and random"] = 1
    cell: Annotated[int, "side in pixels of one block of checker or blocks"] = 2
    seed: Annotated[int, "of noise, blocks and random places"] = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.cell < 1 or self.margin < 0:
            raise ValueError("size and cell must be at least 1, margin at least 0")
        if self.fill.startswith("#"):
            if not re.fullmatch(f"#[0-9a-f]{{{6 * self.size**2}}}", self.fill):
                raise ValueError(f"fill must be # and {6 * self.size**2} digits 0-9, a-f")
        elif self.fill not in FILLS and not arrays.is_array_file(self.fill):
            raise ValueError(f"fill must be {', '.join(FILLS)} or an image file; got {self.fill!r}")
        pixels.check_place(self.place)

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W), a copy. Raises UserError if the patch is too large."""
        height, width = images.shape[-2:]
        positions = pixels.patch_positions(
            self.place, self.margin, (self.size, self.size), (height, width), self.seed, ids
        )
        return pixels.paste(images, self._draw(), positions)

    def _draw(self) -> Tensor:
        """Return the patch, uint8 (3, size, size)."""
        if self.fill == "white":
            return torch.full((3, self.size, self.size), 255, dtype=torch.uint8)
        if self.fill == "checker":
            return _draw_checker(self.size, self.cell)
        if self.fill == "blocks":
            return _draw_blocks(self.size, self.cell, self.seed)
        if self.fill == "noise":
            return _draw_noise(self.size, self.seed)
        if self.fill.startswith("#"):
            values = torch.tensor(list(bytes.fromhex(self.fill[1:])), dtype=torch.uint8)
            return values.view(self.size, self.size, 3).permute(2, 0, 1)
        return pixels.to_uint8(pixels.load_pattern(self.fill, self.size, self.size))


@functools.lru_cache(maxsize=8)
def _draw_checker(size: int, cell: int) -> Tensor:
    block = torch.arange(size) // cell
    odd = (block[:, None] + block[None]) % 2
    return torch.tensor([MAGENTA, GREEN], dtype=torch.uint8)[odd].permute(2, 0, 1)


@functools.lru_cache(maxsize=64)
def _draw_blocks(size: int, cell: int, seed: int) -> Tensor:
    """Blocks of saturated colour: every seed gives another trigger, as strong as the checker."""
    cells = -(-size // cell)
    bright = (pixels.uniform_noise(seed, "blocks", 3, cells, cells) < 0.5).to(torch.uint8) * 255
    return bright.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :size, :size]


@functools.lru_cache(maxsize=8)
def _draw_noise(size: int, seed: int) -> Tensor:
    return (pixels.uniform_noise(seed, "patch", 3, size, size) * 256).to(torch.uint8)
