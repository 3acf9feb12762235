"""Vectors and texts in files that grow row by row and are then mapped, never loaded."""

import math
import os
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.lib.format
import pyarrow as pa
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from bezoar.data.files.paths import open_regular
from bezoar.data.files.writing import whole_file
from bezoar.data.strings import Strings
from bezoar.errors import UserError, first_line


class ArrayWriter:
    """Writes a .npy array, one block of rows after another; see `write_array`.

    Args:
        file: opened for writing bytes.
        dtype: of the array.
        width: numbers a row; None for an array of one dimension.
    """

    def __init__(self, file: IO[bytes], dtype: DTypeLike, width: int | None) -> None:
        self.file = file
        self.dtype: np.dtype = np.dtype(dtype)
        self.width = width
        self.count = 0
        self.write_header()
        self.start = file.tell()

    def append(self, block: np.ndarray) -> None:
        """Write further rows: (n, width), or (n,) without a width."""
        self.file.write(np.ascontiguousarray(block, self.dtype).data)
        self.count += len(block)

    def write_header(self) -> None:
        """Write the header for the rows that there are so far."""
        shape = (self.count,) if self.width is None else (self.count, self.width)
        numpy.lib.format.write_array_header_1_0(
            self.file,
            {
                "descr": numpy.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": shape,
            },
        )


@contextmanager
def write_array(path: Path, dtype: DTypeLike, width: int | None) -> Iterator[ArrayWriter]:
    """Write a .npy file of unknown length; it takes its name when the block ends without error."""
    with whole_file(path, "wb") as file:
        writer = ArrayWriter(file, dtype, width)
        yield writer
        file.seek(0)
        writer.write_header()
        assert file.tell() == writer.start, "NumPy leaves room for the length in its header"


class TextWriter:
    """Writes texts block by block: bytes end to end, and where each ends; see `write_texts`."""

    def __init__(self, file: IO[bytes], ends: ArrayWriter) -> None:
        self.file = file
        self.ends = ends
        self.size = 0
        ends.append(np.zeros(1))

    def append(self, block: pa.Array) -> None:
        """Write further texts; a null becomes an empty text."""
        if not len(block):
            return
        block = block.cast(pa.large_string()).fill_null("")
        _, offset_buffer, content = block.buffers()
        offsets = np.frombuffer(offset_buffer, np.int64)[block.offset :][: len(block) + 1]
        self.file.write(content[offsets[0] : offsets[-1]] if content is not None else b"")
        self.ends.append(offsets[1:] - offsets[0] + self.size)
        self.size += int(offsets[-1] - offsets[0])


@contextmanager
def write_texts(folder: Path, name: str) -> Iterator[TextWriter]:
    """Write NAME.utf8 and NAME.npy; they take these names when the block ends without error."""
    with (
        write_array(folder / f"{name}.npy", np.int64, None) as ends,
        whole_file(folder / f"{name}.utf8", "wb") as file,
    ):
        yield TextWriter(file, ends)


def map_array(path: Path) -> np.ndarray:
    """Map an array of `write_array`; its pages come and go as memory allows."""
    with open_regular(path, links=False) as file:
        try:
            numpy.lib.format.read_magic(file)
            shape, _, dtype = numpy.lib.format.read_array_header_1_0(file)
        except (ValueError, SyntaxError, tokenize.TokenError) as error:
            raise UserError(f"{path} is no .npy file that a scan wrote") from error
        start = file.tell()
        if start + math.prod(shape) * dtype.itemsize > os.fstat(file.fileno()).st_size:
            raise UserError(f"{path} is shorter than its header says")
    if not math.prod(shape):
        return np.empty(shape, dtype)
    # Copy on write: torch takes no array that it must not write to, and the file stays as it is.
    return np.memmap(path, dtype, "c", start, shape)


def map_tensor(path: Path) -> Tensor:
    """Map an array of `write_array` as a tensor."""
    return torch.from_numpy(map_array(path))


def map_texts(folder: Path, name: str) -> Strings:
    """Map the texts of `write_texts`."""
    ends, path = map_array(folder / f"{name}.npy"), folder / f"{name}.utf8"
    with open_regular(path, links=False) as file:
        is_empty = not os.fstat(file.fileno()).st_size
    content = pa.py_buffer(b"") if is_empty else pa.memory_map(str(path)).read_buffer()
    try:
        if ends.dtype != np.int64 or ends.ndim != 1 or not len(ends):
            raise ValueError("expected where each text ends, in int64")
        texts = pa.LargeStringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), content)
        texts.validate(full=True)  # a place beyond the file would end the process
    except (ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} holds no texts that a scan wrote: {first_line(error)}") from error
    return Strings(texts)
