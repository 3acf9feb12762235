"""A transparent picture at a different place, size, rotation and light in each record."""

import functools
import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from bezoar.attacks import painting, pixels
from bezoar.data.files import arrays
from bezoar.data.randomness import draws
from bezoar.registry import method

DRAWN_SIDE, DRAWN_CELLS, WAVES = (
    64,
    5,
    4,
)  # of a drawn sticker: pixels, blocks of colour, waves of its outline


@method
class Sticker:
    """It is resampled bilinearly, and lies inside the image wherever there is room."""

    image: Annotated[str, "drawn (by the seed), or a file, with its transparency"] = "drawn"
    size: Annotated[
        tuple[float, ...], "its longer side as a share of the image's shorter one; drawn by record"
    ] = (0.3,)
    turn: Annotated[tuple[float, ...], "in degrees; a range is drawn by record"] = (-30.0, 30.0)
    light: Annotated[tuple[float, ...], "factor of its brightness; drawn by record"] = (0.8, 1.2)
    alpha: Annotated[float, "opacity, multiplied with the image's own, above 0 and up to 1"] = 1.0
    place: Annotated[str, "random, or Y/X in shares of the room, such as .8/.8"] = "random"
    seed: Annotated[int, "of a drawn sticker, and of what is drawn by record"] = 0

    def __post_init__(self) -> None:
        painting.check_range("size", self.size, 0.02, 2)
        painting.check_range("turn", self.turn, -360, 360)
        painting.check_range("light", self.light, 0, 4)
        painting.check_spot(self.place)
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1]; got {self.alpha}")
        if self.image != "drawn" and not arrays.is_array_file(self.image):
            raise ValueError(f"image must be drawn, or a png or jpg file; got {self.image!r}")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W), a copy. Raises UserError if the file is no picture."""
        canvas = images.shape[-2:]
        largest = max(2, math.ceil(self.size[-1] * min(canvas)))
        source = self._load(largest)  # (4, h, w)
        shape = np.array(source.shape[1:])
        u = draws(self.seed, ids, 5, "sticker")
        factor = painting.choose_between(self.size, u[:, 0]) * min(canvas) / shape.max()
        turns = painting.sines(painting.choose_between(self.turn, u[:, 1]))  # (N, 2)
        light = painting.choose_between(self.light, u[:, 2])
        # Half of the upright box around the turned sticker, float64 (N, 2): rows, columns.
        boxes = np.stack((abs(turns[:, ::-1]) @ shape, abs(turns) @ shape), axis=1)
        boxes *= factor[:, None] / 2
        room = np.maximum(np.array(canvas) - 2 * boxes, 0)
        free = np.minimum(boxes, np.array(canvas) / 2)
        middles = free + painting.choose_spots(self.place, u[:, 3:]) * room  # pixel edges
        window = np.minimum(
            math.ceil(float(np.hypot(*shape)) * self.size[-1] * min(canvas) / shape.max()) + 2,
            canvas,
        )
        corners = np.floor(middles - window / 2).clip(0, np.array(canvas) - window).astype(np.int64)

        def draw(rows: slice) -> Tensor:
            y = np.arange(window[0]) + 0.5 + (corners[rows, :1] - middles[rows, :1])  # (n, h)
            x = np.arange(window[1]) + 0.5 + (corners[rows, 1:] - middles[rows, 1:])  # (n, w)
            sine, cosine = (turns[rows, k, None, None] / factor[rows, None, None] for k in (0, 1))
            row = y[:, :, None] * cosine - x[:, None] * sine + (shape[0] - 1) / 2
            column = y[:, :, None] * sine + x[:, None] * cosine + (shape[1] - 1) / 2
            layer = sample(source, torch.from_numpy(row), torch.from_numpy(column))
            layer[:, :3] *= painting.to_column(light[rows])[:, None]
            # Lit beyond white, a colour is white.
            layer[:, :3] = torch.minimum(layer[:, :3], 255 * layer[:, 3:])
            return layer.mul_(self.alpha)

        return painting.paint(images, draw, corners)

    def _load(self, side: int) -> Tensor:
        """Return the sticker as a layer, float32 (4, h, w), its longer side `side` pixels."""
        if self.image == "drawn":
            return _draw_sticker(self.seed, side)
        return _load_sticker(self.image, arrays.file_state(self.image), side)


@functools.lru_cache(maxsize=8)
def _load_sticker(path: str, _: object, side: int) -> Tensor:
    rgba = torch.from_numpy(arrays.load_rgba(path).astype(np.float32))
    layer = painting.to_layer(rgba[None, :3], rgba[None, 3:] / 255)[0]
    scale = side / max(layer.shape[1:])
    height, width = (max(1, round(scale * s)) for s in layer.shape[1:])
    return pixels.resize(layer, height, width)


@functools.lru_cache(maxsize=64)
def _draw_sticker(seed: int, side: int) -> Tensor:
    """Draw blocks of saturated colours within a wavy outline, different for every seed."""
    cells = (pixels.uniform_noise(seed, "sticker", 3, DRAWN_CELLS, DRAWN_CELLS) < 0.5).float()
    rgb = pixels.resize(cells * 255, DRAWN_SIDE, DRAWN_SIDE, hard=True)
    line = (np.arange(DRAWN_SIDE) + 0.5) * 2 / DRAWN_SIDE - 1
    angle = np.arctan2(line[:, None], line[None])
    size, phase = draws(seed, ("outline",), 2 * WAVES, "sticker").reshape(2, WAVES)
    outline = sum(
        (2 * size[k] - 1) * np.cos((k + 2) * angle + 2 * np.pi * phase[k]) for k in range(WAVES)
    )
    radius = 0.8 + 0.05 * outline
    depth = (radius - np.hypot(line[:, None], line[None])) * DRAWN_SIDE / 2
    cover = torch.from_numpy((depth + 0.5).clip(0, 1).astype(np.float32))
    return pixels.resize(painting.to_layer(rgb[None], cover[None, None])[0], side, side)


def sample(source: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Sample a layer (4, h, w) bilinearly at pixel coordinates, float64 (n, k, l).

    What is outside is empty. Returns float32 (n, 4, k, l).
    """
    padded = torch.nn.functional.pad(source, (1, 1, 1, 1))
    height, width = padded.shape[1:]
    row = (row + 1).clamp_(0, height - 1)
    column = (column + 1).clamp_(0, width - 1)
    top = row.floor().clamp_(max=height - 2)
    left = column.floor().clamp_(max=width - 2)
    down, right = (row - top).float(), (column - left).float()
    flat = padded.flatten(1)
    index = (top * width + left).long()
    upper = flat[:, index] * (1 - right) + flat[:, index + 1] * right
    lower = flat[:, index + width] * (1 - right) + flat[:, index + width + 1] * right
    return (upper * (1 - down) + lower * down).transpose(0, 1)
