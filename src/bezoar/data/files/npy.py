"""NumPy's .npy format: headers are checked before data are read, and nothing is unpickled."""

import math
import os
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.lib.format

from bezoar.data.files.paths import open_regular
from bezoar.errors import UserError

MAX_WIDTH = 1 << 16  # dimensions of a vector
CHUNK_BYTES = 16 << 20  # read at a time
PARSERS = {
    (1, 0): numpy.lib.format.read_array_header_1_0,
    (2, 0): numpy.lib.format.read_array_header_2_0,
}
PARSING_ERRORS = (
    ValueError, LookupError, SyntaxError, TypeError, RecursionError, MemoryError, EOFError,
    tokenize.TokenError,
)  # fmt: skip


@dataclass(frozen=True)
class Header:
    """An array that has not been read yet: its shape, its order in memory and its type."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the array claims."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_text(self) -> bool:
        """Whether the array holds text."""
        return self.dtype.kind in "US"


def read_header(stream: IO[bytes]) -> Header:
    """Read the header at the start of a .npy stream.

    Raises UserError if there is none, a side is negative, or the array holds Python objects. The
    caller bounds the size.
    """
    try:
        shape, fortran_order, dtype = PARSERS[numpy.lib.format.read_magic(stream)](stream)
    except PARSING_ERRORS as error:
        raise UserError("has no NumPy header that can be read") from error
    if dtype.hasobject:
        raise UserError("holds Python objects (a pickle), which are never read")
    if any(side < 0 for side in shape):
        raise UserError(f"has a shape with a negative side: {shape}")
    if not dtype.itemsize:
        raise UserError(f"holds values of no size: {dtype}")
    return Header(shape, fortran_order, dtype)


def read_data(stream: IO[bytes], header: Header) -> np.ndarray:
    """Read the array of a header, whose size was bounded. Raises UserError if it breaks off."""
    buffer = np.empty(header.nbytes, np.uint8)
    fill(buffer, stream)
    order: Literal["F", "C"] = "F" if header.fortran_order else "C"
    return buffer.view(header.dtype).reshape(header.shape, order=order)


def fill(buffer: np.ndarray, stream: IO[bytes]) -> None:
    """Fill uint8 (n,) with the next n bytes of a stream. Raises UserError if there are fewer."""
    count = 0
    while count < len(buffer):
        content = stream.read(min(CHUNK_BYTES, len(buffer) - count))
        if not content:
            raise UserError(f"ends after {count} of {len(buffer)} bytes")
        buffer[count : count + len(content)] = np.frombuffer(content, np.uint8)
        count += len(content)


def read_shape(path: Path) -> tuple[int, int]:
    """Return (N, D) of a .npy file of float16 or float32 vectors.

    Raises UserError if the file holds anything else, or its header does not fit its size.
    """
    count, width = _read_vector_header(path)[0].shape
    return count, width


def read_rows(path: Path, start: int, stop: int) -> np.ndarray:
    """Read the rows start..stop of a .npy file of vectors.

    The file is not mapped: a mapped file that is cut short meanwhile ends the process.

    Returns:
        float32 (stop - start, D).

    Raises:
        UserError: if the file is not one of vectors, or was cut short.
    """
    header, offset = _read_vector_header(path)
    count, width = header.shape
    buffer = np.empty(max(0, min(stop, count) - start) * width * header.dtype.itemsize, np.uint8)
    try:
        with open_regular(path) as file:
            file.seek(offset + start * width * header.dtype.itemsize)
            fill(buffer, file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{path} {error} of the rows {start} to {stop}") from error
    return buffer.view(header.dtype).reshape(-1, width).astype(np.float32)


def _read_vector_header(path: Path) -> tuple[Header, int]:
    """Return the checked header of a file of vectors, and the offset at which its rows begin."""
    try:
        with open_regular(path) as file:
            header = read_header(file)
            offset, size = file.tell(), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    is_vectors = header.dtype in (np.float16, np.float32) and len(header.shape) == 2
    if not is_vectors or header.fortran_order or not 1 <= header.shape[1] <= MAX_WIDTH:
        raise UserError(
            f"{path} must hold rows of float16 or float32, at most {MAX_WIDTH} wide; "
            f"got {header.dtype} {header.shape}"
        )
    if header.nbytes != size - offset:
        raise UserError(
            f"{path}: its header asks for {header.nbytes} bytes, {size - offset} are stored"
        )
    return header, offset
