"""Paints layers of colour with transparency on images, for drawn triggers.

A layer is float32 (n, 4, h, w): red, green and blue times the cover, 0..255, then the cover, 0..1.
Draws of a record (place, rotation, colour) depend on its id. Sines of angles are computed by
Python's `math`, one record at a time, so that a record's pixels do not depend on its batch.
"""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bezoar.attacks import pixels
from bezoar.data.randomness import draws

Floats = NDArray[np.float64]


def check_range(name: str, values: tuple[float, ...], least: float, most: float) -> None:
    """Raise ValueError unless a field holds one number, or two in order, within bounds."""
    if len(values) not in (1, 2) or not least <= values[0] <= values[-1] <= most:
        raise ValueError(
            f"{name} must be one number or a range (low,high) within {least:g}..{most:g}; "
            f"got {','.join(f'{v:g}' for v in values)}"
        )


def check_colour(colour: tuple[int, ...]) -> None:
    """Raise ValueError unless a field holds red, green and blue within 0..255."""
    if len(colour) != 3 or not all(0 <= c <= 255 for c in colour):
        text = "/".join(map(str, colour))
        raise ValueError(f"colour must be red/green/blue within 0..255; got {text or 'nothing'}")


def check_spot(place: str) -> None:
    """Raise ValueError unless a place is `random`, or `Y/X`: shares of height and width."""
    number = r"(0?\.\d{1,6}|[01](\.0{1,6})?)"
    if place != "random" and not re.fullmatch(f"{number}/{number}", place):
        raise ValueError(
            "place must be random, or Y/X: the middle in shares of height and width, such as "
            f".8/.8; got {place!r}"
        )


def choose_between(values: tuple[float, ...], u: Floats) -> Floats:
    """Map uniform numbers u in [0, 1), of any shape, to one number or into a range."""
    return values[0] + u * (values[-1] - values[0])


def choose_spots(place: str, u: Floats) -> Floats:
    """Return where in the room that is free a thing lies, shares (N, 2) of rows and columns.

    u: (N, 2) in [0, 1), which decides if the place is random.
    """
    if place == "random":
        return u
    return np.broadcast_to(np.array([float(share) for share in place.split("/")]), u.shape)


def sines(degrees: Sequence[float] | Floats) -> Floats:
    """Return sine and cosine of angles in degrees, (N, 2)."""
    radians = [math.radians(d) for d in degrees]
    return np.array([(math.sin(r), math.cos(r)) for r in radians], dtype=np.float64).reshape(-1, 2)


def to_layer(colours: Tensor, cover: Tensor) -> Tensor:
    """Make a layer (n, 4, h, w): colours (n|1, 3, h|1, w|1) 0..255, cover (n|1, 1, h, w)."""
    rgb = colours * cover
    return torch.cat((rgb, cover.expand(len(rgb), -1, -1, -1)), dim=1)


def paint(
    images: Tensor,
    draw: Callable[[slice], Tensor],
    positions: NDArray[np.int64] | None = None,
) -> Tensor:
    """Paint a layer on each image: (1 - cover) x + colour, rounded and clamped.

    Args:
        images: uint8 (N, 3, H, W); they are not changed.
        draw: makes the layers of some of the images, (n, 4, h, w), or one for all, (1, 4, h, w).
        positions: int64 (N, 2), row and column of each layer's upper left pixel. A layer must lie
            inside the image. None: layers are as large as the images.
    """
    out = images.clone()
    for rows in pixels.image_blocks(images):
        layers = draw(rows).to(images.device)
        if positions is None:
            under = images[rows].float()
            out[rows] = pixels.to_uint8(under.mul_(1 - layers[:, 3:]).add_(layers[:, :3]))
            continue
        corners = torch.from_numpy(positions[rows].copy()).to(images.device)
        windows = pixels.window_index(corners, *layers.shape[-2:])
        canvas = out[rows].permute(0, 2, 3, 1)
        under = canvas[windows].float()  # (n, h, w, 3)
        over = layers.permute(0, 2, 3, 1)
        canvas[windows] = pixels.to_uint8(under.mul_(1 - over[..., 3:]).add_(over[..., :3]))
    return out


def to_column(values: Floats) -> Tensor:
    """Return numbers (n,), one a record, as float32 (n, 1, 1) for arithmetic with pixels."""
    return torch.from_numpy(values.astype(np.float32))[:, None, None]


def draw_normal(seed: int, ids: Sequence[str], count: int) -> NDArray[np.float32]:
    """Draw standard normal numbers that belong to records, float32 (N, count).

    They are made of uniform ones by Box and Muller's transform.
    """
    half = -(-count // 2)
    u = draws(seed, ids, 2 * half, "normal")
    radius = np.sqrt(-2 * np.log1p(-u[:, :half]))
    angle = 2 * np.pi * u[:, half:]
    normal = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)), axis=1)
    drawn: NDArray[np.float32] = normal[:, :count].astype(np.float32)
    return drawn
