"""Arrays from files that may be hostile, and the pixel arithmetic that methods share.

`read` takes npy, npz, pt, png and jpg. Nothing is unpickled (npy headers are parsed, `.pt` is loaded by `weights_only`
after its opcodes were checked), nothing is extracted to disk, and no array beyond MAX_BYTES is ever allocated: every
size that a header asks for is checked first. Pixels are uint8 0..255; what is computed between is rounded and clamped
to that range on the way back, never wrapped.
"""

from __future__ import annotations

import functools
import io
import math
import os
import pickle
import pickletools
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bezoar.errors import UserError
from bezoar.data.pairs import draws

MAX_BYTES = 64 << 20  # of a file, and of everything it unpacks to
MAX_MEMBERS = 64  # of an archive
PICTURES = (".png", ".jpg", ".jpeg")
SUFFIXES = (".npy", ".npz", ".pt", *PICTURES)
PLACES = ("corner", "upper_left", "upper_right", "lower_left", "centre", "random")
SAFE_GLOBALS = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict|torch (\w+Storage|Size|device)"
)
CALLS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
BROKEN = (  # what the decoders of foreign bytes are known to raise
    ValueError,
    OSError,
    EOFError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    SyntaxError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    tokenize.TokenError,
    Image.DecompressionBombError,
)


Stamp = tuple[int, int, int, int]


def stamp(path: str) -> Stamp:
    """Which bytes a path names now: (device, inode, time of change, size); a key for caches. UserError if no file."""
    file = Path(path).expanduser()
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: expected a file of {', '.join(SUFFIXES)}")
    if not os.path.isfile(file):
        raise UserError(f"no file {path!r}")
    s = file.stat()
    return s.st_dev, s.st_ino, s.st_mtime_ns, s.st_size


def read(path: str) -> Mapping[str, np.ndarray]:
    """The numeric arrays of a file by name ("" where a file holds one, unnamed), read once and cached; read-only.

    Pictures come as uint8 (H, W, 3). Members that are text are left out. Raises UserError for what is missing, broken,
    empty, too large, not numeric, not finite, or pickled.
    """
    return _read(path, stamp(path))


def read_array(path: str) -> np.ndarray:
    """The one array of a file, or its member `x`. UserError when there are several and none is `x`."""
    members = read(path)
    if len(members) > 1 and "x" not in members:
        raise UserError(f"{path}: expected one array, or one named 'x'; it holds {', '.join(members)}")
    return members["x"] if "x" in members else next(iter(members.values()))


@functools.lru_cache(maxsize=4)
def _read(path: str, _: Stamp) -> Mapping[str, np.ndarray]:
    file = Path(path).expanduser()
    with file.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MiB")
    suffix = file.suffix.lower()
    reader = {".npy": _npy, ".npz": _npz, ".pt": _pt}.get(suffix, _picture)
    try:
        members = reader(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except BROKEN as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path}: not a {suffix[1:]} file that can be read ({reason})") from error
    if not members:
        raise UserError(f"{path}: expected numbers; it holds none")
    for name, array in members.items():
        if not array.size:
            raise UserError(f"{path}: {name or 'the array'} is empty, of shape {array.shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{path}: {name or 'the array'} holds values that are not finite")
        array.flags.writeable = False
    return MappingProxyType(members)


def _bounded(count: int, itemsize: int) -> int:
    if not 0 <= count * itemsize <= MAX_BYTES:
        raise UserError(f"asks for {count * itemsize} bytes; at most {MAX_BYTES} are allowed")
    return count * itemsize


def _npy_member(stream: IO[bytes]) -> np.ndarray | None:
    """One npy stream -> array, or None for text. The header is checked before a byte of data is read."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in headers:
        raise UserError(f"npy version {version} is not supported; 1.0 and 2.0 are")
    shape, fortran, dtype = headers[version](stream)
    if dtype.hasobject:
        raise UserError("holds pickled objects, which are never read")
    if dtype.kind in "US":
        return None
    if dtype.kind not in "biuf":
        raise UserError(f"expected numbers; it holds {dtype}")
    if any(side < 0 for side in shape):
        raise UserError(f"shape {shape} has a negative side")
    size = _bounded(math.prod(shape), dtype.itemsize)
    data = stream.read(size)
    if len(data) < size:
        raise UserError(f"ends after {len(data)} of {size} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _npy(data: bytes) -> dict[str, np.ndarray]:
    array = _npy_member(io.BytesIO(data))
    return {} if array is None else {"": array}


def _archive(data: bytes) -> zipfile.ZipFile:
    """A zip held in memory whose members are few, plainly packed, and together no larger than MAX_BYTES."""
    if data.count(b"PK\x01\x02") > MAX_MEMBERS:
        raise UserError(f"more than {MAX_MEMBERS} members")
    archive = zipfile.ZipFile(io.BytesIO(data))
    for info in archive.infolist():
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"member {info.filename!r} is packed by a method that is not supported")
    _bounded(sum(info.file_size for info in archive.infolist()), 1)
    return archive


def _npz(data: bytes) -> dict[str, np.ndarray]:
    members = {}
    with _archive(data) as archive:
        for info in archive.infolist():
            with archive.open(info) as stream:
                array = _npy_member(stream)
            if array is not None:
                members[info.filename.removesuffix(".npy")] = array
    return members


def _pt(data: bytes) -> dict[str, np.ndarray]:
    """A tensor, or a dict of tensors, as torch.save writes them: shapes are looked at on the meta device first."""
    if not data.startswith(b"PK"):
        raise UserError("expected the zip format that torch.save writes since 1.6")
    with _archive(data) as archive:
        pickles = [i for i in archive.infolist() if i.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > 1 << 20:
            raise UserError("expected a tensor as torch.save writes it")
        _safe(archive.read(pickles[0]))
    total = 0
    for tensor in _tensors(data, "meta").values():
        if tensor.layout is not torch.strided or tensor.is_complex() or tensor.is_quantized:
            raise UserError(f"expected a plain tensor of real numbers; it holds {tensor.layout}, {tensor.dtype}")
        reach = sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
        total += _bounded(max(tensor.numel(), int(tensor.storage_offset() + reach + 1)), tensor.element_size())
    _bounded(total, 1)
    found = _tensors(data, "cpu")
    return {k: (t.float() if t.dtype is torch.bfloat16 else t).detach().numpy() for k, t in found.items()}


def _safe(opcodes: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(opcodes):
        if opcode.name in CALLS or (opcode.name == "GLOBAL" and not SAFE_GLOBALS.fullmatch(str(argument))):
            raise UserError(f"expected tensors only; it asks for {argument or opcode.name}")


def _tensors(data: bytes, device: str) -> dict[str, Tensor]:
    loaded = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    members = loaded if isinstance(loaded, dict) else {"": loaded}
    if len(members) > MAX_MEMBERS or not all(isinstance(t, Tensor) for t in members.values()):
        raise UserError("expected a tensor or a flat dict of tensors")
    return {str(k): t for k, t in members.items()}


def _picture(data: bytes) -> dict[str, np.ndarray]:
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
        _bounded(picture.width * picture.height, 4)
        if picture.mode not in ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr"):
            raise UserError(f"expected 8 bits a channel; it has mode {picture.mode}")
        if picture.has_transparency_data and np.asarray(picture.convert("RGBA"))[:, :, 3].min() < 255:
            raise UserError("is transparent in places; give the transparency as a mask of its own")
        return {"": np.asarray(picture.convert("RGB")).copy()}


def image(array: np.ndarray, name: str) -> Tensor:
    """An image-like array -> float32 (3, H, W) in units of pixels, -255..255.

    Layouts: (H, W), (1|3, H, W), (H, W, 1|3), each with an optional leading 1; (3, n, 3) is read channels first.
    Units: floats within -1..1 are taken as shares of 255 and multiplied; integers and other floats are pixels already.
    """
    with np.errstate(over="ignore"):  # what overflows float32 is refused below
        x = torch.from_numpy(np.ascontiguousarray(planes(array, name).astype(np.float32)))
    if array.dtype.kind == "b" or (array.dtype.kind == "f" and x.abs().max() <= 1):
        x = x * 255
    if x.abs().max() > 255:
        raise UserError(f"{name}: expected values within -255..255; the largest is {x.abs().max():g}")
    return x.expand(3, -1, -1)


def mask(array: np.ndarray, name: str) -> Tensor:
    """A mask -> float32 (1|3, H, W) in 0..1; the layouts of `image`. Values above 1 are taken as shares of 255."""
    if array.min() < 0 or array.max() > 255:
        raise UserError(f"{name}: expected a mask within 0..1 or 0..255; it spans {array.min()}..{array.max()}")
    x = torch.from_numpy(np.ascontiguousarray(planes(array, name).astype(np.float32)))
    return x / 255 if x.max() > 1 else x


def planes(array: np.ndarray, name: str) -> np.ndarray:
    """(H, W), (1|3, H, W) or (H, W, 1|3), with an optional leading 1 -> (1|3, H, W)."""
    a = array[0] if array.ndim == 4 and array.shape[0] == 1 else array
    if a.ndim == 2:
        return a[None]
    if a.ndim == 3 and a.shape[0] in (1, 3):
        return a
    if a.ndim == 3 and a.shape[2] in (1, 3):
        return a.transpose(2, 0, 1)
    raise UserError(f"{name}: expected an image (H, W), (3, H, W) or (H, W, 3); its shape is {array.shape}")


def resize(x: Tensor, height: int, width: int, hard: bool = False) -> Tensor:
    """Float (C, h, w) -> (C, height, width): nearest when hard, else bilinear, antialiased where it shrinks."""
    if x.shape[-2:] == (height, width):
        return x
    if hard:
        return F.interpolate(x[None], (height, width), mode="nearest-exact")[0]
    return F.interpolate(x[None], (height, width), mode="bilinear", antialias=True)[0]


def pattern(path: str, height: int, width: int) -> Tensor:
    """The image in a file, resized: float32 (3, height, width) in units of pixels. Cached."""
    return _pattern(path, stamp(path), height, width)


@functools.lru_cache(maxsize=8)
def _pattern(path: str, _: Stamp, height: int, width: int) -> Tensor:
    return resize(image(read_array(path), path), height, width)


def noise(seed: int, name: str, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1), float32, that belong to (seed, name): the same on every machine and torch."""
    return torch.from_numpy(draws(seed, (name,), math.prod(shape), "noise").astype(np.float32).reshape(shape))


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


def add(images: Tensor, offset: Tensor) -> Tensor:
    """images uint8 (N, 3, H, W) + offset float (1|3, H, W), saturating; the offset is rounded once, beforehand.

    Stays in uint8: min(x, 255 - up) + up, then max(x, down) - down, where at most one of up and down is not 0.
    """
    up = to_uint8(offset).to(images.device)
    down = to_uint8(-offset).to(images.device)
    out = torch.minimum(images, 255 - up).add_(up)
    return torch.maximum(out, down, out=out).sub_(down)


def mix(images: Tensor, over: Tensor, alpha: float | Tensor) -> Tensor:
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
        raise ValueError(f"place must be one of {', '.join(PLACES)}, or Y/X in pixels such as 21/21; got {place!r}")


def spots(
    place: str, margin: int, patch: tuple[int, int], canvas: tuple[int, int], seed: int, ids: Sequence[str]
) -> np.ndarray:
    """Rows and columns, int64 (N, 2), of the upper left pixel of a patch (h, w) on images (H, W), one per id.

    corner: `margin` pixels from the bottom and right; the other corners likewise. random: uniform over the
    places that keep the margin on all sides, drawn from (seed, id). centre and Y/X do not look at the margin.
    UserError when the patch does not lie inside the image.
    """
    size, room = np.array(patch), np.array(canvas) - np.array(patch)
    (low, right), near = room - margin, margin
    corners = {"corner": (low, right), "upper_left": (near, near), "upper_right": (near, right), "lower_left": (low, near)}
    fixed = {k: np.array(v) for k, v in corners.items()} | {"centre": room // 2}
    if place == "random":
        free = room - 2 * margin + 1
        spot = np.full(2, margin)
    else:
        free = np.ones(2, dtype=np.int64)
        spot = fixed[place] if place in fixed else np.array([int(v) for v in place.split("/")])
    if (free < 1).any() or (spot < 0).any() or (spot > room).any():
        where = place if place == "centre" or "/" in place else f"{place} with margin {margin}"
        raise UserError(f"a trigger of {size[0]}x{size[1]} pixels at {where} exceeds images of {canvas[0]}x{canvas[1]}")
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
