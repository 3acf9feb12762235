"""Vectors and texts in files that grow row by row and are mapped, never loaded; foreign .npy and Parquet, in blocks.

Our own files are mapped: they stay as they are. Foreign ones are read block by block instead, because a mapped file that
is cut short meanwhile ends the process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import numpy.lib.format as npy
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bezoar.data.files import parquet_pages
from bezoar.errors import UserError
from bezoar.data.stored_pairs import Strings

WIDEST = 1 << 16  # dimensions of a vector, at most
GROUP_BYTES = 4 << 30  # a row group's columns unpacked, at most
BATCH = 256  # rows of a Parquet file that are Python objects at a time
HELD = 128 << 20  # bytes of them, at most, that are kept at hand
PARSERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class Growing:
    """A .npy array whose rows are written one block after another; `partial` bears its name when the block is left well."""

    def __init__(self, path: Path, dtype: np.dtype | type, width: int | None) -> None:
        self.path, self.dtype, self.width, self.count = path, np.dtype(dtype), width, 0
        self.partial = partial(path)
        self.file: IO[bytes] | None = None
        self.start = 0

    def __enter__(self) -> Growing:
        self.file = self.partial.open("wb")
        self._header()
        self.start = self.file.tell()
        return self

    def add(self, block: np.ndarray) -> None:
        """Further rows: (n, width), or (n,) where there is no width."""
        assert self.file is not None
        self.file.write(np.ascontiguousarray(block, self.dtype).data)
        self.count += len(block)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self.file is not None
        with self.file:
            if kind is None:
                self.file.seek(0)
                self._header()
                assert self.file.tell() == self.start, "NumPy leaves room for the length in its header"
        if kind is None:
            os.replace(self.partial, self.path)
        else:
            self.partial.unlink(missing_ok=True)

    def _header(self) -> None:
        shape = (self.count,) if self.width is None else (self.count, self.width)
        described = npy.dtype_to_descr(self.dtype)
        assert self.file is not None
        npy.write_array_header_1_0(self.file, {"descr": described, "fortran_order": False, "shape": shape})


class GrowingTexts:
    """Texts written one block after another: their bytes end to end, and in a .npy file where each of them ends."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.utf8"
        self.ends = Growing(folder / f"{name}.npy", np.int64, None)
        self.size = 0

    def __enter__(self) -> GrowingTexts:
        self.file = partial(self.path).open("wb")
        self.ends.__enter__()
        self.ends.add(np.zeros(1))
        return self

    def add(self, block: pa.Array) -> None:
        """Further texts."""
        block = block.cast(pa.large_string()).fill_null("")
        offsets = np.frombuffer(block.buffers()[1], np.int64)[block.offset : block.offset + len(block) + 1]
        if len(block):
            content = block.buffers()[2]
            self.file.write(content[offsets[0] : offsets[-1]] if content is not None else b"")
            self.ends.add(offsets[1:] - offsets[0] + self.size)
            self.size += int(offsets[-1] - offsets[0])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()
        if kind is None:
            os.replace(partial(self.path), self.path)
        else:
            partial(self.path).unlink(missing_ok=True)
        self.ends.__exit__(kind, error, trace)


def partial(path: Path) -> Path:
    """The name of a file that is being written: this process's own, since two may be at the same one."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def mapped(path: Path) -> np.ndarray:
    """An array that `Growing` wrote; its pages come and go as memory allows."""
    with path.open("rb") as file:
        npy.read_magic(file)
        shape, _, dtype = npy.read_array_header_1_0(file)
        start = file.tell()
    # copy on write: torch takes no array that it must not write to, and the file stays as it is
    return np.memmap(path, dtype, "c", start, shape) if math.prod(shape) else np.empty(shape, dtype)


def mapped_tensor(path: Path) -> Tensor:
    """The same as a tensor."""
    return torch.from_numpy(mapped(path))


def mapped_texts(folder: Path, name: str) -> Strings:
    """Texts that `GrowingTexts` wrote, as a column over the mapped files."""
    ends, path = mapped(folder / f"{name}.npy"), folder / f"{name}.utf8"
    content = pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")
    return Strings(pa.LargeStringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), content))


def shape_of(path: Path) -> tuple[int, int]:
    """(N, D) of a foreign .npy file of float16 or float32 rows, its header checked against its size. Raises UserError."""
    return _opened(path)[0]


def rows_of(path: Path, start: int, stop: int) -> np.ndarray:
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
        raise UserError(f"{path} ends after {len(content)} of {want} bytes of the rows {start} to {stop}")
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
    if dtype not in (np.float16, np.float32) or len(shape) != 2 or fortran or not 1 <= shape[1] <= WIDEST:
        raise UserError(f"{path} must hold rows of float16 or float32, at most {WIDEST} wide; got {dtype} {shape}")
    if shape[0] < 0 or math.prod(shape) * dtype.itemsize != size - start:
        raise UserError(f"{path}: its header asks for {math.prod(shape) * dtype.itemsize} bytes, {size - start} are stored")
    return (shape[0], shape[1]), dtype, start


def parquet(path: Path) -> pq.ParquetFile:
    """A foreign Parquet file, opened. Raises UserError when it is none, or one of its row groups would fill the memory."""
    try:
        file = pq.ParquetFile(path, memory_map=False)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        names = file.schema_arrow.names
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: a name that is not UTF-8
        raise UserError(f"{path} cannot be read as parquet: {str(error).splitlines()[0][:200]}") from error
    if any(not 0 <= g.total_byte_size <= GROUP_BYTES or g.num_rows < 0 for g in groups):
        raise UserError(f"{path}: a row group unpacks to more than {GROUP_BYTES >> 30} GiB; write it in smaller ones")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns are called {max(names, key=names.count)!r}")
    return file


def parquet_rows(path: Path, columns: Sequence[str], start: int = 0, stop: int | None = None) -> Iterator[pa.RecordBatch]:
    """Rows start..stop of some columns, a bounded number at a time. Raises UserError where the file is broken."""
    with parquet(path) as file:
        first, groups = 0, []
        for i in range(file.metadata.num_row_groups):
            after = first + file.metadata.row_group(i).num_rows
            if after > start and (stop is None or first < stop):
                groups.append((i, first))
            first = after
        place, numbers = groups[0][1] if groups else 0, [i for i, _ in groups]
        try:
            most = parquet_pages.rows(file, path, numbers, columns, BATCH)
            for batch in file.iter_batches(most, numbers, list(columns)) if groups else ():
                low, high = max(start - place, 0), len(batch) if stop is None else min(stop - place, len(batch))
                place += len(batch)
                if high > low:
                    yield batch.slice(low, high - low)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{path} cannot be read as parquet: {str(error).splitlines()[0][:200]}") from error


def blocks(count: int, size: int) -> Iterable[tuple[int, int]]:
    """(start, stop) of each block of so many rows."""
    return ((i, min(i + size, count)) for i in range(0, count, size))
