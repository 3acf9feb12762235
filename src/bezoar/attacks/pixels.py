"""Pixel arithmetic that triggers share.

Images are uint8 (N, 3, H, W), values 0..255. What is computed in between is float, and is rounded
and clamped to that range on the way back; it never wraps around.
"""

import functools
import io
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bezoar.data.blocks import blocks
from bezoar.data.files.arrays import FileState, file_state, load_array
from bezoar.data.randomness import draws
from bezoar.errors import UserError

PLACES = ("corner", "upper_left", "upper_right", "lower_left", "centre", "random")
# Elements of a float copy of images. On a CPU it fits into a core's cache.
BLOCK_ELEMENTS = {"cpu": 1 << 19, "accelerator": 1 << 26}


def image_from_array(array: np.ndarray, name: str) -> Tensor:
    """Convert an array to an image in units of pixels.

    Args:
        array: (H, W), (1|3, H, W) or (H, W, 1|3), each with an optional leading 1. If both fit, as
            in (3, n, 3), channels come first. Pictures come with channels first, whatever their
            sides. Floats within -1..1 are shares of 255; all other arrays are in pixels.
        name: name of the array in an error.

    Returns:
        float32 (3, H, W), values -255..255.

    Raises:
        UserError: if the array has another shape, or values beyond 255.
    """
    with np.errstate(over="ignore"):  # an overflow of float32 is refused below
        x = torch.from_numpy(np.ascontiguousarray(channels_first(array, name).astype(np.float32)))
    if array.dtype.kind == "b" or (array.dtype.kind == "f" and x.abs().max() <= 1):
        x = x * 255
    if x.abs().max() > 255:
        raise UserError(
            f"{name}: expected values within -255..255; the largest is {x.abs().max():g}"
        )
    return x.expand(3, -1, -1)


def mask_from_array(array: np.ndarray, name: str) -> Tensor:
    """Convert an array to a mask, float32 (1|3, H, W) in 0..1.

    The layouts are those of `image_from_array`. Where a value is above 1, all are shares of 255.
    """
    if array.min() < 0 or array.max() > 255:
        raise UserError(
            f"{name}: expected a mask within 0..1 or 0..255; it spans {array.min()}..{array.max()}"
        )
    x = torch.from_numpy(np.ascontiguousarray(channels_first(array, name).astype(np.float32)))
    return x / 255 if x.max() > 1 else x


def channels_first(array: np.ndarray, name: str) -> np.ndarray:
    """Arrange (H, W), (1|3, H, W) or (H, W, 1|3), with an optional leading 1, as (1|3, H, W)."""
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
    """Resize float (C, h, w) to (C, height, width).

    hard: nearest neighbour, which keeps a mask of 0 and 1; otherwise bilinear and antialiased.
    """
    if x.shape[-2:] == (height, width):
        return x
    if hard:
        return F.interpolate(x[None], (height, width), mode="nearest-exact")[0]
    return F.interpolate(x[None], (height, width), mode="bilinear", antialias=True)[0]


def load_pattern(path: str, height: int, width: int) -> Tensor:
    """Load an image file, resized, as float32 (3, height, width) in units of pixels; cached."""
    return _load_pattern(path, file_state(path), height, width)


@functools.lru_cache(maxsize=8)
def _load_pattern(path: str, _: FileState, height: int, width: int) -> Tensor:
    return resize(image_from_array(load_array(path), path), height, width)


def uniform_noise(seed: int, name: str, *shape: int) -> Tensor:
    """Draw uniform numbers in [0, 1), float32, the same for (seed, name) on every machine."""
    noise = draws(seed, (name,), math.prod(shape), "noise")
    return torch.from_numpy(noise.astype(np.float32).reshape(shape))


def to_uint8(x: Tensor) -> Tensor:
    """Round float pixels to integers (ties to even), clamped to 0..255."""
    # The step through int16 is exact, and four times as fast on a CPU as straight to uint8.
    return x.round().clamp_(0, 255).to(torch.int16).to(torch.uint8)


def image_blocks(images: Tensor) -> list[slice]:
    """Split a batch into slices whose float copies have at most BLOCK_ELEMENTS elements."""
    kind = "cpu" if images.device.type == "cpu" else "accelerator"
    elements_per_image = images[0].numel() if len(images) else 1
    return blocks(len(images), max(1, BLOCK_ELEMENTS[kind] // max(1, elements_per_image)))


def map_pictures(images: Tensor, function: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Send each image, uint8 (N, 3, H, W), through a function of Pillow's RGB pictures.

    The function must return pictures of one size, (h, w). Returns uint8 (N, 3, h, w).
    """
    if not len(images):
        return images.clone()
    pictures = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    changed = [np.asarray(function(Image.fromarray(picture))) for picture in pictures]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).contiguous().to(images.device)


def recode_jpeg(images: Tensor, quality: int) -> Tensor:
    """Store each image, uint8 (N, 3, H, W), as JPEG with Pillow, and read it again."""

    def recode(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return map_pictures(images, recode)


def add_offset(images: Tensor, offset: Tensor) -> Tensor:
    """Add an offset to images, saturating at 0 and 255.

    images: uint8 (N, 3, H, W). offset: float (1|3, H, W), which is rounded once, beforehand.
    """
    # In uint8 throughout: min(x, 255 - up) + up, then max(x, down) - down; up or down is 0.
    up = to_uint8(offset).to(images.device)
    down = to_uint8(-offset).to(images.device)
    out = torch.minimum(images, 255 - up).add_(up)
    return torch.maximum(out, down, out=out).sub_(down)


def blend(images: Tensor, pattern: Tensor, alpha: float | Tensor) -> Tensor:
    """Return (1 - alpha) images + alpha pattern, rounded and clamped.

    images: uint8 (N, 3, H, W). pattern: float (3, H, W). alpha: a number, or (1|3, H, W), in 0..1.
    """
    share = torch.as_tensor(alpha, dtype=torch.float32)
    image_share = (1 - share).to(images.device)
    weighted_pattern = (share * pattern).to(images.device)
    out = torch.empty_like(images)
    for rows in image_blocks(images):
        out[rows] = to_uint8(images[rows].float().mul_(image_share).add_(weighted_pattern))
    return out


def identity_grid(height: int, width: int) -> Tensor:
    """Return the sampling grid of the identity.

    It is float32 (height, width, 2), x then y, with -1 and 1 at the centres of the outer pixels.
    """
    y = torch.linspace(-1, 1, height)
    x = torch.linspace(-1, 1, width)
    return torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), dim=-1)


def shifted_grid(shift: Tensor, height: int, width: int) -> Tensor:
    """Return the sampling grid identity + shift / (width, height), clamped to -1..1.

    shift: float (2, h, w), in x and y; interpolated bicubically between its corners. A shift of 1
    moves by half a pixel, whatever the size of the image. Returns float32 (height, width, 2).
    """
    if shift.shape[-2:] != (height, width):
        shift = F.interpolate(shift[None], (height, width), mode="bicubic", align_corners=True)[0]
    scale = torch.tensor([width, height])
    return (identity_grid(height, width) + shift.permute(1, 2, 0) / scale).clamp_(-1, 1)


def warp(images: Tensor, grid: Tensor) -> Tensor:
    """Resample every image bilinearly at one grid, (H, W, 2), with corners aligned."""
    c, h, w = images.shape[1:]
    grid = grid.to(images.device)[None]
    out = torch.empty_like(images)
    for rows in image_blocks(images):
        # A block is one image of many channels, so that the grid's weights are computed once.
        x = images[rows].float().reshape(1, -1, h, w)
        out[rows] = to_uint8(F.grid_sample(x, grid, align_corners=True)).view(-1, c, h, w)
    return out


def check_place(place: str) -> None:
    """Raise ValueError unless a place is one of PLACES, or `Y/X`: its upper left pixel."""
    if place not in PLACES and not re.fullmatch(r"\d{1,6}/\d{1,6}", place):
        raise ValueError(
            f"place must be one of {', '.join(PLACES)}, or Y/X in pixels such as 21/21; "
            f"got {place!r}"
        )


def patch_positions(
    place: str,
    margin: int,
    patch: tuple[int, int],
    canvas: tuple[int, int],
    seed: int,
    ids: Sequence[str],
) -> np.ndarray:
    """Return the position of a patch's upper left pixel on each image.

    Args:
        place: one of PLACES, or `Y/X`. `corner` is the lower right one; `random` is uniform over
            the places that keep the margin, and depends on (seed, id).
        margin: pixels left free at the border; ignored by `centre` and `Y/X`.
        patch: height and width of the patch.
        canvas: height and width of the images.
        seed: seed of random places.
        ids: N record ids.

    Returns:
        int64 (N, 2): rows and columns.

    Raises:
        UserError: if the patch does not lie inside the image.
    """
    room = np.array(canvas) - np.array(patch)
    choices = room - 2 * margin + 1 if place == "random" else np.ones(2, dtype=np.int64)
    position = _fixed_position(place, margin, room)
    if (choices < 1).any() or (position < 0).any() or (position > room).any():
        where = place if place == "centre" or "/" in place else f"{place} with margin {margin}"
        raise UserError(
            f"a trigger of {patch[0]}x{patch[1]} pixels at {where} exceeds images of "
            f"{canvas[0]}x{canvas[1]}"
        )
    if place == "random" and len(ids):
        position = position + (draws(seed, ids, 2, "place") * choices).astype(np.int64)
    return np.broadcast_to(position, (len(ids), 2))


def _fixed_position(place: str, margin: int, room: np.ndarray) -> np.ndarray:
    """Return the position, int64 (2,), at a place; for `random` the first of those allowed."""
    last_row, last_column = room - margin
    positions = {
        "corner": (last_row, last_column),
        "upper_left": (margin, margin),
        "upper_right": (margin, last_column),
        "lower_left": (last_row, margin),
        "centre": tuple(room // 2),
        "random": (margin, margin),
    }
    return np.array(positions[place] if place in positions else [int(v) for v in place.split("/")])


def paste(images: Tensor, patch: Tensor, positions: np.ndarray) -> Tensor:
    """Paste a patch over each image.

    Args:
        images: uint8 (N, 3, H, W); they are not changed.
        patch: uint8 (3, h, w).
        positions: int64 (N, 2), row and column of the patch's upper left pixel.
    """
    out = images.clone()
    h, w = patch.shape[-2:]
    patch = patch.to(images.device)
    if (positions == positions[:1]).all():
        for y, x in positions[:1].tolist():
            out[:, :, y : y + h, x : x + w] = patch
        return out
    corners = torch.from_numpy(positions.copy()).to(images.device)
    out.permute(0, 2, 3, 1)[window_index(corners, h, w)] = patch.permute(1, 2, 0)
    return out


def window_index(corners: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an index of windows of images (N, H, W, ...): (N, 1, 1), (N, h, 1), (N, 1, w).

    corners: int64 (N, 2), row and column of the windows' upper left pixels.
    """
    y = corners[:, 0, None] + torch.arange(height, device=corners.device)
    x = corners[:, 1, None] + torch.arange(width, device=corners.device)
    image = torch.arange(len(corners), device=corners.device)
    return image[:, None, None], y[:, :, None], x[:, None, :]
