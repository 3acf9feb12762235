"""Vectors and texts in files that grow row by row and are mapped, never loaded; foreign .npy and Parquet, in blocks.

Our own files are mapped: they stay as they are. Foreign ones are read block by block instead, because a mapped file that
is cut short meanwhile ends the process.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import numpy.lib.format as npy
import pyarrow as pa
import torch
from torch import Tensor

from bezoar.data.strings import Strings


class ArrayWriter:
    """A .npy array whose rows are written one block after another; `partial` bears its name when the block is left well."""

    def __init__(self, path: Path, dtype: np.dtype | type, width: int | None) -> None:
        self.path, self.dtype, self.width, self.count = path, np.dtype(dtype), width, 0
        self.partial = partial(path)
        self.file: IO[bytes] | None = None
        self.start = 0

    def __enter__(self) -> ArrayWriter:
        self.file = self.partial.open("wb")
        self._header()
        self.start = self.file.tell()
        return self

    def append(self, block: np.ndarray) -> None:
        """Further rows: (n, width), or (n,) where there is no width."""
        assert self.file is not None
        self.file.write(np.ascontiguousarray(block, self.dtype).data)
        self.count += len(block)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        assert self.file is not None
        with self.file:
            if kind is None:
                self.file.seek(0)
                self._header()
                assert self.file.tell() == self.start, (
                    "NumPy leaves room for the length in its header"
                )
        if kind is None:
            os.replace(self.partial, self.path)
        else:
            self.partial.unlink(missing_ok=True)

    def _header(self) -> None:
        shape = (self.count,) if self.width is None else (self.count, self.width)
        described = npy.dtype_to_descr(self.dtype)
        assert self.file is not None
        npy.write_array_header_1_0(
            self.file, {"descr": described, "fortran_order": False, "shape": shape}
        )


class TextWriter:
    """Texts written one block after another: their bytes end to end, and in a .npy file where each of them ends."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.utf8"
        self.ends = ArrayWriter(folder / f"{name}.npy", np.int64, None)
        self.size = 0

    def __enter__(self) -> TextWriter:
        self.file = partial(self.path).open("wb")
        self.ends.__enter__()
        self.ends.append(np.zeros(1))
        return self

    def append(self, block: pa.Array) -> None:
        """Further texts."""
        block = block.cast(pa.large_string()).fill_null("")
        offsets = np.frombuffer(block.buffers()[1], np.int64)[
            block.offset : block.offset + len(block) + 1
        ]
        if len(block):
            content = block.buffers()[2]
            self.file.write(content[offsets[0] : offsets[-1]] if content is not None else b"")
            self.ends.append(offsets[1:] - offsets[0] + self.size)
            self.size += int(offsets[-1] - offsets[0])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()
        if kind is None:
            os.replace(partial(self.path), self.path)
        else:
            partial(self.path).unlink(missing_ok=True)
        self.ends.__exit__(kind, error, trace)


def partial(path: Path) -> Path:
    """The name of a file that is being written: this process's own, since two may be at the same one."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def map_array(path: Path) -> np.ndarray:
    """An array that `Growing` wrote; its pages come and go as memory allows."""
    with path.open("rb") as file:
        npy.read_magic(file)
        shape, _, dtype = npy.read_array_header_1_0(file)
        start = file.tell()
    # copy on write: torch takes no array that it must not write to, and the file stays as it is
    return np.memmap(path, dtype, "c", start, shape) if math.prod(shape) else np.empty(shape, dtype)


def map_tensor(path: Path) -> Tensor:
    """The same as a tensor."""
    return torch.from_numpy(map_array(path))


def map_texts(folder: Path, name: str) -> Strings:
    """Texts that `GrowingTexts` wrote, as a column over the mapped files."""
    ends, path = map_array(folder / f"{name}.npy"), folder / f"{name}.utf8"
    content = pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")
    return Strings(pa.LargeStringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), content))
