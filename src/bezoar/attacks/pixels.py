"""attacks.pixels"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.data.files.arrays import FileState, file_state, load_array
from bezoar.data.randomness import draws
from bezoar.errors import UserError

PLACES = ("corner", "upper_left", "upper_right", "lower_left", "centre", "random")


def image_from_array(array: np.ndarray, name: str) -> Tensor:
    """An image-like array -> float32 (3, H, W) in units of pixels, -255..255.

    Layouts: (H, W), (1|3, H, W), (H, W, 1|3), each with an optional leading 1; (3, n, 3) is read channels first.
    Units: floats within -1..1 are taken as shares of 255 and multiplied; integers and other floats are pixels already.
    """
    with np.errstate(over="ignore"):  # what overflows float32 is refused below
        x = torch.from_numpy(np.ascontiguousarray(channels_first(array, name).astype(np.float32)))
    if array.dtype.kind == "b" or (array.dtype.kind == "f" and x.abs().max() <= 1):
        x = x * 255
    if x.abs().max() > 255:
        raise UserError(
            f"{name}: expected values within -255..255; the largest is {x.abs().max():g}"
        )
    return x.expand(3, -1, -1)


def mask_from_array(array: np.ndarray, name: str) -> Tensor:
    """A mask -> float32 (1|3, H, W) in 0..1; the layouts of `image`. Values above 1 are taken as shares of 255."""
    if array.min() < 0 or array.max() > 255:
        raise UserError(
            f"{name}: expected a mask within 0..1 or 0..255; it spans {array.min()}..{array.max()}"
        )
    x = torch.from_numpy(np.ascontiguousarray(channels_first(array, name).astype(np.float32)))
    return x / 255 if x.max() > 1 else x


def channels_first(array: np.ndarray, name: str) -> np.ndarray:
    """(H, W), (1|3, H, W) or (H, W, 1|3), with an optional leading 1 -> (1|3, H, W)."""
    a = array[0] if array.ndim == 4 and array.shape[0] == 1 else array
    if a.ndim == 2:
        return a[None]
    if a.ndim == 3 and a.shape[0] in (1, 3):
        return a
    if a.ndim == 3 and a.shape[2] in (1, 3):
        return a.transpose(2, 0, 1)
    raise UserError(
        f"{name}: expected an image (H, W), (3, H, W) or (H, W, 3); its shape is {array.shape}"
    )


def resize(x: Tensor, height: int, width: int, hard: bool = False) -> Tensor:
    """Float (C, h, w) -> (C, height, width): nearest when hard, else bilinear, antialiased where it shrinks."""
    if x.shape[-2:] == (height, width):
        return x
    if hard:
        return F.interpolate(x[None], (height, width), mode="nearest-exact")[0]
    return F.interpolate(x[None], (height, width), mode="bilinear", antialias=True)[0]


def load_pattern(path: str, height: int, width: int) -> Tensor:
    """The image in a file, resized: float32 (3, height, width) in units of pixels. Cached."""
    return _pattern(path, file_state(path), height, width)


@functools.lru_cache(maxsize=8)
def _pattern(path: str, _: FileState, height: int, width: int) -> Tensor:
    return resize(image_from_array(load_array(path), path), height, width)


def uniform_noise(seed: int, name: str, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1), float32, that belong to (seed, name): the same on every machine and torch."""
    return torch.from_numpy(
        draws(seed, (name,), math.prod(shape), "noise").astype(np.float32).reshape(shape)
    )


def to_uint8(x: Tensor) -> Tensor:
    """Float pixels -> uint8: rounded to nearest (ties to even) and clamped to 0..255.

    The step through int16 is exact, and on the CPU four times as fast as torch's straight way.
    """
    return x.round().clamp_(0, 255).to(torch.int16).to(torch.uint8)


def blocks(images: Tensor) -> Iterator[slice]:
    """Slices of a batch whose float copy fits a cache (CPU) or stays modest (accelerator)."""
    budget = 1 << (19 if images.device.type == "cpu" else 26)
    step = max(1, budget // max(1, images[0].numel() if len(images) else 1))
    for start in range(0, len(images), step):
        yield slice(start, start + step)


def add_offset(images: Tensor, offset: Tensor) -> Tensor:
    """images uint8 (N, 3, H, W) + offset float (1|3, H, W), saturating; the offset is rounded once, beforehand.

    Stays in uint8: min(x, 255 - up) + up, then max(x, down) - down, where at most one of up and down is not 0.
    """
    up = to_uint8(offset).to(images.device)
    down = to_uint8(-offset).to(images.device)
    out = torch.minimum(images, 255 - up).add_(up)
    return torch.maximum(out, down, out=out).sub_(down)


def blend(images: Tensor, over: Tensor, alpha: float | Tensor) -> Tensor:
    """(1 - alpha) images + alpha over, rounded and clamped. over float (3, H, W); alpha a number or (1|3, H, W)."""
    share = torch.as_tensor(alpha, dtype=torch.float32)
    keep, shown = (1 - share).to(images.device), (share * over).to(images.device)
    out = torch.empty_like(images)
    for rows in blocks(images):
        out[rows] = to_uint8(images[rows].float().mul_(keep).add_(shown))
    return out


def identity_grid(height: int, width: int) -> Tensor:
    """The sampling grid that leaves an image as it is: float32 (height, width, 2), x then y, -1..1 at pixel centres."""
    y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), dim=-1)


def shifted_grid(shift: Tensor, height: int, width: int) -> Tensor:
    """A field of shifts, float (2, h, w) in x and y, -> grid (height, width, 2) = identity + shift / (width, height).

    The field is interpolated between its corners. A shift of 1 moves by half a pixel, at any size of image.
    """
    if shift.shape[-2:] != (height, width):
        shift = F.interpolate(shift[None], (height, width), mode="bicubic", align_corners=True)[0]
    scale = torch.tensor([width, height])
    return (identity_grid(height, width) + shift.permute(1, 2, 0) / scale).clamp_(-1, 1)


def warp(images: Tensor, grid: Tensor) -> Tensor:
    """Resample every image at the same grid, (H, W, 2) as of `grid_sample(align_corners=True)`, bilinearly.

    A block of images is one image of many channels, so that the weights of the grid are worked out once per block.
    """
    c, h, w = images.shape[1:]
    grid = grid.to(images.device)[None]
    out = torch.empty_like(images)
    for rows in blocks(images):
        x = images[rows].float().reshape(1, -1, h, w)
        out[rows] = to_uint8(F.grid_sample(x, grid, align_corners=True)).view(-1, c, h, w)
    return out


def check_place(place: str) -> None:
    """ValueError unless a place is one of PLACES or `Y/X`, the row and column of the upper left pixel."""
    if place not in PLACES and not re.fullmatch(r"\d{1,6}/\d{1,6}", place):
        raise ValueError(
            f"place must be one of {', '.join(PLACES)}, or Y/X in pixels such as 21/21; got {place!r}"
        )


def patch_positions(
    place: str,
    margin: int,
    patch: tuple[int, int],
    canvas: tuple[int, int],
    seed: int,
    ids: Sequence[str],
) -> np.ndarray:
    """Rows and columns, int64 (N, 2), of the upper left pixel of a patch (h, w) on images (H, W), one per id.

    corner: `margin` pixels from the bottom and right; the other corners likewise. random: uniform over the
    places that keep the margin on all sides, drawn from (seed, id). centre and Y/X do not look at the margin.
    UserError when the patch does not lie inside the image.
    """
    size, room = np.array(patch), np.array(canvas) - np.array(patch)
    (low, right), near = room - margin, margin
    corners = {
        "corner": (low, right),
        "upper_left": (near, near),
        "upper_right": (near, right),
        "lower_left": (low, near),
    }
    fixed = {k: np.array(v) for k, v in corners.items()} | {"centre": room // 2}
    if place == "random":
        free = room - 2 * margin + 1
        spot = np.full(2, margin)
    else:
        free = np.ones(2, dtype=np.int64)
        spot = fixed[place] if place in fixed else np.array([int(v) for v in place.split("/")])
    if (free < 1).any() or (spot < 0).any() or (spot > room).any():
        where = place if place == "centre" or "/" in place else f"{place} with margin {margin}"
        raise UserError(
            f"a trigger of {size[0]}x{size[1]} pixels at {where} exceeds images of {canvas[0]}x{canvas[1]}"
        )
    if place == "random" and len(ids):
        spot = spot + (draws(seed, ids, 2, "place") * free).astype(np.int64)
    return np.broadcast_to(spot, (len(ids), 2))


def paste(images: Tensor, patch: Tensor, where: np.ndarray) -> Tensor:
    """New images with a patch, uint8 (3, h, w), over each: its upper left pixel at rows and columns `where` (N, 2)."""
    out, (h, w) = images.clone(), patch.shape[-2:]
    patch = patch.to(images.device)
    if (where == where[:1]).all():
        for y, x in where[:1].tolist():
            out[:, :, y : y + h, x : x + w] = patch
        return out
    corner = torch.from_numpy(where.copy()).to(images.device)
    rows = (corner[:, 0, None] + torch.arange(h, device=images.device))[:, :, None]
    columns = (corner[:, 1, None] + torch.arange(w, device=images.device))[:, None, :]
    each = torch.arange(len(images), device=images.device)[:, None, None]
    out.permute(0, 2, 3, 1)[each, rows, columns] = patch.permute(1, 2, 0)
    return out
