"""data.files.npy"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import numpy.lib.format as npy

from bezoar.errors import UserError

WIDEST = 1 << 16  # dimensions of a vector, at most
PARSERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_shape(path: Path) -> tuple[int, int]:
    """(N, D) of a foreign .npy file of float16 or float32 rows, its header checked against its size. Raises UserError."""
    return _opened(path)[0]


def read_rows(path: Path, start: int, stop: int) -> np.ndarray:
    """Rows start..stop of such a file, float32 (n, D). Raises UserError, also when the file was cut short meanwhile."""
    (count, width), dtype, offset = _opened(path)
    stride = width * dtype.itemsize
    want = (min(stop, count) - start) * stride
    content = bytearray()
    try:
        with path.open("rb") as file:
            file.seek(offset + start * stride)
            while len(content) < want and (more := file.read(want - len(content))):
                content += more
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) < want:
        raise UserError(
            f"{path} ends after {len(content)} of {want} bytes of the rows {start} to {stop}"
        )
    return np.frombuffer(content, dtype).reshape(-1, width).astype(np.float32)


def _opened(path: Path) -> tuple[tuple[int, int], np.dtype, int]:
    """(N, D), dtype, and where the rows begin."""
    try:
        with path.open("rb") as file:
            shape, fortran, dtype = PARSERS[npy.read_magic(file)](file)
            start, size = file.tell(), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} has no NumPy header that can be read") from error
    if dtype.hasobject:
        raise UserError(f"{path} holds Python objects (a pickle), which are never read")
    if (
        dtype not in (np.float16, np.float32)
        or len(shape) != 2
        or fortran
        or not 1 <= shape[1] <= WIDEST
    ):
        raise UserError(
            f"{path} must hold rows of float16 or float32, at most {WIDEST} wide; got {dtype} {shape}"
        )
    if shape[0] < 0 or math.prod(shape) * dtype.itemsize != size - start:
        raise UserError(
            f"{path}: its header asks for {math.prod(shape) * dtype.itemsize} bytes, {size - start} are stored"
        )
    return (shape[0], shape[1]), dtype, start
