"""A published trigger, read from its file: BadEncoder, DECREE, ABL, Narcissus, SSL-Backdoor, ...

With `mode=auto`, the first of these that fits decides how a file is applied:

  replace  x (1 - m) + t m: an npz with `t` and `tm` (tm 1 keeps the image), or with a `mask`
           (1 shows the trigger)
  warp     float (H, W, 2), with an optional leading 1: a sampling grid, or WaNet's noise without
           the identity
  paste    png or jpg: pasted with `size` at `place`
  add      some values are negative: x + scale v
  replace  more than half of the pixels are black: a trigger on black ground, visible where it is
           not black
  blend    all other files: (1 - alpha) x + alpha v

Floats within -1..1 are shares of 255; all other numbers are in pixels. A trigger of another size
than the image is resized: nearest neighbour if its mask is hard (0 or 1), otherwise bilinear. Grids
are resized by their shifts, which keep their length in pixels.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from bezoar.attacks import pixels
from bezoar.data.files import arrays
from bezoar.errors import UserError
from bezoar.registry import method

LARGEST_SHIFT = 1000  # largest value of a grid and of `scale`
# A grid nearer to the identity than this, in mean and in half images, is a sampling grid.
NEAR_IDENTITY = 0.25


@method
class File:
    """`file:trigger.npz`, `file:pattern.pt,mode=blend,alpha=.1`, `file:patch.png,size=50`."""

    path: Annotated[str, "npy, npz, pt, png or jpg"]
    mode: Annotated[
        Literal["auto", "replace", "add", "blend", "warp", "paste"], "how it is applied"
    ] = "auto"
    alpha: Annotated[float, "share of the pattern when blended"] = 0.2
    scale: Annotated[float, "factor on what is added or on the shifts of a warp"] = 1.0
    mask: Annotated[
        str | None, "file of a mask for replace: 1 shows the trigger, 0 keeps the image"
    ] = None
    size: Annotated[int, "side in pixels of a pasted patch; 0 keeps the file's own size"] = 0
    place: Annotated[str, "of a pasted patch: as a patch's"] = "corner"
    margin: Annotated[int, "pixels left free around a pasted patch: corners and random"] = 1
    seed: Annotated[int, "of random places"] = 0

    def __post_init__(self) -> None:
        if (
            not 0 < self.alpha <= 1
            or not abs(self.scale) <= LARGEST_SHIFT
            or self.size < 0
            or self.margin < 0
        ):
            raise ValueError(
                "alpha must lie in (0, 1], scale in -1000..1000, size and margin at or above 0"
            )
        if self.mask and self.mode not in ("auto", "replace"):
            raise ValueError(f"a mask belongs to mode replace; got mode {self.mode}")
        pixels.check_place(self.place)

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W), a copy. Raises UserError if the file is no trigger."""
        height, width = images.shape[-2:]
        states = (arrays.file_state(self.path), self.mask and arrays.file_state(self.mask))
        fitted = _fit_to_size(self, states, height, width)
        if fitted.mode == "add":
            return pixels.add_offset(images, fitted.pattern)
        if fitted.mode == "warp":
            return pixels.warp(images, fitted.pattern)
        if fitted.mode == "paste":
            patch = pixels.to_uint8(fitted.pattern)
            positions = pixels.patch_positions(
                self.place,
                self.margin,
                (patch.shape[1], patch.shape[2]),
                (height, width),
                self.seed,
                ids,
            )
            return pixels.paste(images, patch, positions)
        return pixels.blend(images, fitted.pattern, fitted.weight)


@dataclass(frozen=True)
class FittedTrigger:
    """A trigger at one size of image.

    Attributes:
        mode: how it is applied, as in `File.mode` but for auto.
        pattern: float (3, H, W) in pixels; a sampling grid (H, W, 2) for warp.
        weight: share of the pattern, a number or (1|3, H, W), for blend and replace.
    """

    mode: str
    pattern: Tensor
    weight: float | Tensor = 1.0


@functools.lru_cache(maxsize=8)
def _fit_to_size(trigger: File, _: object, height: int, width: int) -> FittedTrigger:
    """Read and resize a trigger. The files' states are an argument for the cache's key alone."""
    members = arrays.load_arrays(trigger.path)
    array = members["t"] if "t" in members else arrays.load_array(trigger.path)
    mask = _load_mask(trigger)
    mode = trigger.mode
    if mode == "auto":
        mode = _choose_mode(trigger.path, array, mask is not None)
    if mode == "warp":
        shift = trigger.scale * _grid_shifts(array, trigger.path)
        return FittedTrigger(mode, pixels.shifted_grid(shift, height, width))
    image = pixels.image_from_array(array, trigger.path)
    if mode == "paste":
        side = trigger.size
        return FittedTrigger(mode, pixels.resize(image, side, side) if side else image)
    if mode == "add":
        return FittedTrigger(mode, trigger.scale * pixels.resize(image, height, width))
    if mode == "blend":
        return FittedTrigger(mode, pixels.resize(image, height, width), trigger.alpha)
    if mask is None:
        mask = (image != 0).any(0, keepdim=True).float()
    hard = bool(((mask == 0) | (mask == 1)).all())
    image = pixels.resize(image, height, width, hard)
    return FittedTrigger(mode, image, pixels.resize(mask, height, width, hard))


def _load_mask(trigger: File) -> Tensor | None:
    """Load the mask of a trigger, float32 (1|3, H, W), 1 where it shows; None if it has none."""
    if trigger.mask:
        return pixels.mask_from_array(arrays.load_array(trigger.mask), trigger.mask)
    members = arrays.load_arrays(trigger.path)
    return 1 - pixels.mask_from_array(members["tm"], trigger.path) if "tm" in members else None


def _choose_mode(
    path: str, array: np.ndarray, masked: bool
) -> Literal["replace", "add", "blend", "warp", "paste"]:
    """Decide how a file is applied; the module's docstring has the rules."""
    if masked:
        return "replace"
    if array.dtype.kind == "f" and array.ndim in (3, 4) and array.shape[-1] == 2:
        return "warp"
    if arrays.is_picture(path):
        return "paste"
    if array.min() < 0:
        return "add"
    black_share = (pixels.channels_first(array, path) == 0).all(0).mean()
    return "replace" if black_share > 0.5 else "blend"


def _grid_shifts(array: np.ndarray, path: str) -> Tensor:
    """Read the shifts of a grid from the identity, float32 (2, H, W), in half pixels.

    array: (H, W, 2) with an optional leading 1. A sampling grid lies near the identity. WaNet's
    stored noise does not, and is in half pixels already.
    """
    a = array[0] if array.ndim == 4 and len(array) == 1 else array
    is_grid = a.ndim == 3 and a.shape[2] == 2 and not arrays.is_picture(path)
    if not is_grid or min(a.shape) < 2 or np.abs(a).max() > LARGEST_SHIFT:
        raise UserError(
            f"{path}: expected a grid (H, W, 2) of values within -1000..1000; "
            f"its shape is {array.shape}"
        )
    height, width, _ = a.shape
    grid = torch.from_numpy(a.astype(np.float32))
    offset = grid - pixels.identity_grid(height, width)
    is_sampling_grid = offset.abs().mean() < NEAR_IDENTITY
    shift = offset * torch.tensor([width, height]) if is_sampling_grid else grid
    return shift.permute(2, 0, 1).contiguous()
