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
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bezoar.errors import UserError

MAX_BYTES = 64 << 20  # of a file, and of everything it unpacks to
MAX_MEMBERS = 64  # of an archive
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
SUFFIXES = (".npy", ".npz", ".pt", *IMAGE_SUFFIXES)
SAFE_GLOBALS = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict|torch (\w+Storage|Size|device)"
)
CALLS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
DECODING_ERRORS = (  # what the decoders of foreign bytes are known to raise
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


FileState = tuple[int, int, int, int]


def file_state(path: str) -> FileState:
    """Which bytes a path names now: (device, inode, time of change, size); a key for caches. UserError if no file."""
    file = Path(path).expanduser()
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: expected a file of {', '.join(SUFFIXES)}")
    if not os.path.isfile(file):
        raise UserError(f"no file {path!r}")
    s = file.stat()
    return s.st_dev, s.st_ino, s.st_mtime_ns, s.st_size


def load_arrays(path: str) -> Mapping[str, np.ndarray]:
    """The numeric arrays of a file by name ("" where a file holds one, unnamed), read once and cached; read-only.

    Pictures come as uint8 (H, W, 3). Members that are text are left out. Raises UserError for what is missing, broken,
    empty, too large, not numeric, not finite, or pickled.
    """
    return _read(path, file_state(path))


def load_array(path: str) -> np.ndarray:
    """The one array of a file, or its member `x`. UserError when there are several and none is `x`."""
    members = load_arrays(path)
    if len(members) > 1 and "x" not in members:
        raise UserError(
            f"{path}: expected one array, or one named 'x'; it holds {', '.join(members)}"
        )
    return members["x"] if "x" in members else next(iter(members.values()))


@functools.lru_cache(maxsize=4)
def _read(path: str, _: FileState) -> Mapping[str, np.ndarray]:
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
    except DECODING_ERRORS as error:
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
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
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
            raise UserError(
                f"expected a plain tensor of real numbers; it holds {tensor.layout}, {tensor.dtype}"
            )
        reach = sum(
            (side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
        total += _bounded(
            max(tensor.numel(), int(tensor.storage_offset() + reach + 1)), tensor.element_size()
        )
    _bounded(total, 1)
    found = _tensors(data, "cpu")
    return {
        k: (t.float() if t.dtype is torch.bfloat16 else t).detach().numpy()
        for k, t in found.items()
    }


def _safe(opcodes: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(opcodes):
        if opcode.name in CALLS or (
            opcode.name == "GLOBAL" and not SAFE_GLOBALS.fullmatch(str(argument))
        ):
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
        if (
            picture.has_transparency_data
            and np.asarray(picture.convert("RGBA"))[:, :, 3].min() < 255
        ):
            raise UserError("is transparent in places; give the transparency as a mask of its own")
        return {"": np.asarray(picture.convert("RGB")).copy()}
