"""Small arrays from foreign files: npy, npz, pt, png and jpg, at most MAX_BYTES when unpacked.

A file's content says what it is; its name's ending has a say only where the content does not tell.
Nothing is unpickled and nothing is extracted to disk; every size that a header asks for is checked
first.
"""

import functools
import io
import os
import pickle
import tokenize
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from bezoar.data.files import images, npy
from bezoar.data.files.image_parts import open_picture
from bezoar.data.files.images import check_effort, name_format, turn_upright
from bezoar.data.files.paths import open_regular
from bezoar.data.files.skipped import Unreadable
from bezoar.data.files.torch_files import load_torch
from bezoar.data.files.zips import check_unpacked_size, open_zip
from bezoar.errors import UserError, describe_neighbours, expand_home, first_line

MAX_BYTES = 64 << 20  # of a file, and of everything it unpacks to
MAX_MEMBERS = 64  # of an archive
DIRECTORY_ENTRY = b"PK\x01\x02"  # of a zip archive, one a member
PNG_MAGIC, JPEG_MAGIC, NPY_MAGIC = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\x93NUMPY"
PICTURES = ("PNG", "JPEG")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
SUFFIXES = (".npy", ".npz", ".pt", *PICTURE_SUFFIXES)
IMAGE_MODES = ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel
DECODING_ERRORS = (  # what the decoders of foreign bytes are known to raise
    *images.DECODING_ERRORS, RuntimeError, LookupError, AttributeError, AssertionError,
    zipfile.BadZipFile, pickle.UnpicklingError, tokenize.TokenError,
)  # fmt: skip
Reader = Callable[[bytes], dict[str, np.ndarray]]
FileState = tuple[int, int, int, int]


def file_state(path: str) -> FileState:
    """Identify the bytes that a path names now, as a key for caches.

    Returns:
        Device, inode, time of change in ns, and size.

    Raises:
        UserError: if there is no such file.
    """
    file = expand_home(path)
    if not os.path.isfile(file):
        raise UserError(f"no file {path!r}{describe_neighbours(str(path))}")
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def is_picture(path: str) -> bool:
    """Tell whether a file is a PNG or a JPEG."""
    with expand_home(path).open("rb") as stream:
        return stream.read(len(PNG_MAGIC)).startswith((PNG_MAGIC, JPEG_MAGIC))


def is_array_file(path: str) -> bool:
    """Tell whether a text names a file of arrays: by its ending, or because it is there."""
    return Path(path).suffix.lower() in SUFFIXES or os.path.isfile(os.path.expanduser(path))


def load_arrays(path: str) -> Mapping[str, np.ndarray]:
    """Load the numeric arrays of a file by name; they are read once, cached, and read-only.

    Returns:
        The arrays; one without a name is under "". Pictures are uint8 (3, H, W). Members that are
        text are left out.

    Raises:
        UserError: if the file is missing, broken, empty, too large or pickled, or holds what is not
            numeric or finite.
    """
    return _read(path, file_state(path))


def load_array(path: str) -> np.ndarray:
    """Load the one array of a file, or its member `x`.

    Raises UserError if there are several and none is `x`.
    """
    members = load_arrays(path)
    if "x" in members:
        return members["x"]
    if len(members) > 1:
        raise UserError(
            f"{path}: expected one array, or one named 'x'; it holds {', '.join(members)}"
        )
    return next(iter(members.values()))


def load_rgba(path: str) -> np.ndarray:
    """Load a PNG or a JPEG with its transparency, uint8 (4, H, W); 255 is opaque.

    Raises UserError if the file is missing, too large, or no picture that can be read.
    """
    data = _read_bytes(path)
    with _as_user_error(path, data, "a png or jpg"):
        return _decode_rgba(data)


@contextmanager
def _as_user_error(path: str, data: bytes, kind: str) -> Iterator[None]:
    """Turn what decoders raise into a UserError that names the file. kind: what was expected."""
    try:
        yield
    except UnidentifiedImageError as error:  # its message holds an address in memory
        raise UserError(f"{path}: {name_format(data, PICTURES)}") from error
    except (UserError, Unreadable) as error:
        raise UserError(f"{path}: {error}") from error
    except DECODING_ERRORS as error:
        raise UserError(
            f"{path}: not {kind} that can be read ({first_line(error)[:120]})"
        ) from error


def _read_bytes(path: str) -> bytes:
    file_state(path)  # which says that there is no such file
    with open_regular(expand_home(path)) as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MiB")
    return data


@functools.lru_cache(maxsize=4)
def _read(path: str, _: FileState) -> Mapping[str, np.ndarray]:
    """Read and check a file; its state is in the cache's key: a changed file is read again."""
    data = _read_bytes(path)
    file = expand_home(path)
    suffix = file.suffix.lower()
    reader = _reader_of_content(data) or _reader_of_suffix(suffix)
    if reader is None:
        raise UserError(f"{path}: expected a file of {', '.join(SUFFIXES)}")
    kind = f"a {suffix[1:]} file" if suffix in SUFFIXES else "a file of arrays"
    with _as_user_error(path, data, kind):
        members = reader(data)
    if not members:
        raise UserError(f"{path}: expected numbers; it holds none")
    for name, array in members.items():
        if not array.size:
            raise UserError(f"{path}: {name or 'the array'} is empty, of shape {array.shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{path}: {name or 'the array'} holds values that are not finite")
        array.flags.writeable = False
    return MappingProxyType(members)


def _reader_of_content(data: bytes) -> Reader | None:
    """The reader of a file by its first bytes and, of a zip, its members; None without one."""
    if data.startswith((PNG_MAGIC, JPEG_MAGIC)):
        return _read_picture
    if data.startswith(NPY_MAGIC):
        return _read_npy
    if not data.startswith(b"PK") or data.count(DIRECTORY_ENTRY) > MAX_MEMBERS:
        return None
    try:
        with open_zip(io.BytesIO(data), MAX_MEMBERS) as archive:
            names = archive.namelist()
    except UserError:  # named by the reader
        return None
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return _read_pt
    return _read_npz if names and all(name.endswith(".npy") for name in names) else None


def _reader_of_suffix(suffix: str) -> Reader | None:
    """The reader of a file whose content does not tell, to name what is wrong with it."""
    if suffix in PICTURE_SUFFIXES:
        return _read_picture
    return {".npy": _read_npy, ".npz": _read_npz, ".pt": _read_pt}.get(suffix)


def _check_size(nbytes: int) -> None:
    if nbytes > MAX_BYTES:
        raise UserError(f"asks for {nbytes} bytes; at most {MAX_BYTES} are allowed")


def _read_npy_member(stream: IO[bytes]) -> np.ndarray | None:
    """Read one npy stream; text is None."""
    header = npy.read_header(stream)
    if header.is_text:
        return None
    if header.dtype.kind not in "biuf":
        raise UserError(f"expected numbers; it holds {header.dtype}")
    _check_size(header.nbytes)
    return npy.read_data(stream, header)


def _read_npy(data: bytes) -> dict[str, np.ndarray]:
    array = _read_npy_member(io.BytesIO(data))
    return {} if array is None else {"": array}


def _read_npz(data: bytes) -> dict[str, np.ndarray]:
    members = {}
    if data.count(DIRECTORY_ENTRY) > MAX_MEMBERS:  # zipfile would first make an object of each
        raise UserError(f"more than {MAX_MEMBERS} members")
    with open_zip(io.BytesIO(data), MAX_MEMBERS) as archive:
        check_unpacked_size(archive.infolist(), len(data), MAX_BYTES)
        for info in archive.infolist():
            with archive.open(info) as stream:
                array = _read_npy_member(stream)
            if array is not None:
                members[info.filename.removesuffix(".npy")] = array
    return members


def _read_pt(data: bytes) -> dict[str, np.ndarray]:
    """Read a tensor, or a flat dict of tensors, as torch.save writes them."""
    if not data.startswith(b"PK"):
        raise UserError("expected the zip format that torch.save writes since 1.6")
    if data.count(DIRECTORY_ENTRY) > MAX_MEMBERS:
        raise UserError(f"more than {MAX_MEMBERS} members")
    tensors = load_torch(data, len(data), MAX_BYTES, _select_tensors)
    return {
        k: (t.float() if t.dtype is torch.bfloat16 else t).detach().numpy()
        for k, t in tensors.items()
    }


def _select_tensors(loaded: Any) -> dict[str, Tensor]:
    """The tensors by name. Raises UserError for anything but plain tensors of real numbers."""
    members = loaded if isinstance(loaded, dict) else {"": loaded}
    if len(members) > MAX_MEMBERS or not all(isinstance(t, Tensor) for t in members.values()):
        raise UserError("expected a tensor or a flat dict of tensors")
    for tensor in members.values():
        if tensor.layout is not torch.strided or tensor.is_complex() or tensor.is_quantized:
            raise UserError(
                f"expected a plain tensor of real numbers; it holds {tensor.layout}, {tensor.dtype}"
            )
        _check_size(tensor.numel() * tensor.element_size())
    return {str(k): t for k, t in members.items()}


def _read_picture(data: bytes) -> dict[str, np.ndarray]:
    rgba = _decode_rgba(data)
    if rgba[3].min(initial=255) < 255:
        raise UserError("is transparent in places; give the transparency as a mask of its own")
    return {"": np.ascontiguousarray(rgba[:3])}


def _decode_rgba(data: bytes) -> np.ndarray:
    """Decode a PNG or a JPEG; opaque where it holds no transparency. Returns uint8 (4, H, W)."""
    with open_picture(data, PICTURES) as picture:
        _check_size(picture.width * picture.height * 4)
        if picture.mode not in IMAGE_MODES:
            raise UserError(f"expected 8 bits a channel; it has mode {picture.mode}")
        check_effort(data, picture)
        has_alpha = picture.has_transparency_data
        opaque = picture if has_alpha else picture.convert("RGB")  # CMYK has no way to RGBA
        upright = turn_upright(opaque.convert("RGBA"), picture)
        return np.asarray(upright).transpose(2, 0, 1)  # (H, W, 4), whatever H and W
