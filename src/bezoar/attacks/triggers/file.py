"""A published trigger read from its file: BadEncoder 2022, DECREE 2023, ABL 2021, Narcissus 2023, SSL-Backdoor 2022 ...

What `mode=auto` makes of a file, in this order:
  replace  npz with `t` and `tm` (tm 1 keeps the image), or a `mask` is given (1 shows the trigger): x (1 - m) + t m
  warp     float (H, W, 2), with an optional leading 1: a sampling grid, or WaNet's noise, still without the identity
  paste    png or jpg: pasted with `size` at `place`
  add      some values are negative: x + scale v
  replace  more than half of the pixels are black: a trigger on black ground, shown where it is not black
  blend    everything else: (1 - alpha) x + alpha v
Floats within -1..1 are shares of 255; every other number is in pixels. A trigger of another resolution than the image's
is resized: nearest when its mask is hard (0 or 1), else bilinear; grids by their shifts, whose length in pixels stays.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from bezoar.attacks import pixels
from bezoar.data.files import arrays
from bezoar.errors import UserError
from bezoar.registry import method


@method
class File:
    """`file:trigger.npz`, `file:pattern.pt,mode=blend,alpha=.1`, `file:patch.png,size=50,place=random`."""

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
            or not abs(self.scale) <= 1000
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
        """images uint8 (N, 3, H, W) -> a new tensor of the same kind. UserError for files that are no trigger."""
        height, width = images.shape[-2:]
        stamps = (arrays.file_state(self.path), arrays.file_state(self.mask) if self.mask else None)
        ready = _prepare(self, stamps, height, width)
        if ready.mode == "add":
            return pixels.add_offset(images, ready.pattern)
        if ready.mode == "warp":
            return pixels.warp(images, ready.pattern)
        if ready.mode == "paste":
            patch = (ready.pattern.shape[1], ready.pattern.shape[2])
            where = pixels.patch_positions(
                self.place, self.margin, patch, (height, width), self.seed, ids
            )
            return pixels.paste(images, pixels.to_uint8(ready.pattern), where)
        return pixels.blend(images, ready.pattern, ready.weight)


@dataclass(frozen=True)
class Ready:
    """A trigger fitted to one size of image. pattern float (3, H, W), or (H, W, 2) to warp; weight = share of it."""

    mode: str
    pattern: Tensor
    weight: float | Tensor = 1.0


@functools.lru_cache(maxsize=8)
def _prepare(trigger: File, _: object, height: int, width: int) -> Ready:
    members = arrays.load_arrays(trigger.path)
    array = members["t"] if "t" in members else arrays.load_array(trigger.path)
    weight = None
    if trigger.mask:
        weight = pixels.mask_from_array(arrays.load_array(trigger.mask), trigger.mask)
    elif "tm" in members:
        weight = 1 - pixels.mask_from_array(members["tm"], trigger.path)
    mode = (
        _decide(trigger.path, array, weight is not None) if trigger.mode == "auto" else trigger.mode
    )
    if mode == "warp":
        return Ready(
            mode, pixels.shifted_grid(trigger.scale * _shifts(array, trigger.path), height, width)
        )
    picture = pixels.image_from_array(array, trigger.path)
    if mode == "paste":
        return Ready(
            mode, pixels.resize(picture, trigger.size, trigger.size) if trigger.size else picture
        )
    if mode == "add":
        return Ready(mode, trigger.scale * pixels.resize(picture, height, width))
    if mode == "blend":
        return Ready(mode, pixels.resize(picture, height, width), trigger.alpha)
    if weight is None:
        weight = (picture != 0).any(0, keepdim=True).float()
    hard = bool(((weight == 0) | (weight == 1)).all())
    return Ready(
        mode,
        pixels.resize(picture, height, width, hard),
        pixels.resize(weight, height, width, hard),
    )


def _decide(path: str, array: np.ndarray, masked: bool) -> str:
    if masked:
        return "replace"
    if array.dtype.kind == "f" and array.ndim in (3, 4) and array.shape[-1] == 2:
        return "warp"
    if Path(path).suffix.lower() in arrays.IMAGE_SUFFIXES:
        return "paste"
    if array.min() < 0:
        return "add"
    black = (pixels.channels_first(array, path) == 0).all(0).mean()
    return "replace" if black > 0.5 else "blend"


def _shifts(array: np.ndarray, path: str) -> Tensor:
    """A grid (H, W, 2) with an optional leading 1 -> its shifts from the identity, float32 (2, H, W), in half pixels.

    A sampling grid lies near the identity. WaNet's stored noise does not, and is already in these units.
    """
    a = array[0] if array.ndim == 4 and len(array) == 1 else array
    if a.ndim != 3 or a.shape[2] != 2 or min(a.shape) < 2 or np.abs(a).max() > 1000:
        raise UserError(
            f"{path}: expected a grid (H, W, 2) of values within -1000..1000; its shape is {array.shape}"
        )
    grid = torch.from_numpy(a.astype(np.float32))
    away = grid - pixels.identity_grid(*a.shape[:2])
    sampling = away.abs().mean() < 0.25
    shift = away * torch.tensor([a.shape[1], a.shape[0]]) if sampling else grid
    return shift.permute(2, 0, 1).contiguous()
