"""data.strings"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BLOCK = 1 << 14  # strings that are Python objects at a time


class Strings(Sequence[str]):
    """N strings in one Arrow column: they cost their text and 8 bytes each, not a Python object each."""

    def __init__(self, column: pa.Array) -> None:
        self.column = column

    @staticmethod
    def from_texts(texts: Sequence[str]) -> Strings:
        """The same strings as a column."""
        return (
            texts
            if isinstance(texts, Strings)
            else Strings(pa.array(list(texts), pa.large_string()))
        )

    @staticmethod
    def concat(parts: Sequence[Strings]) -> Strings:
        """All strings of several columns, in order."""
        return Strings(pa.concat_arrays([p.column for p in parts]))

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[str, ...]: ...
    def __getitem__(self, row: int | slice) -> str | tuple[str, ...]:
        return (
            tuple(self.column[row].to_pylist())
            if isinstance(row, slice)
            else self.column[int(row)].as_py()
        )

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.blocks())

    def blocks(self) -> Iterator[list[str]]:
        """The strings in order, a bounded number at a time."""
        return (self.column.slice(start, BLOCK).to_pylist() for start in range(0, len(self), BLOCK))

    def take(self, rows: np.ndarray) -> Strings:
        """The strings at the given rows, in that order."""
        return Strings(self.column.take(pa.array(rows)))

    def find_rows(self, wanted: Collection[str]) -> np.ndarray:
        """int64: the rows that hold one of the wanted strings, ascending."""
        return np.flatnonzero(
            pc.is_in(self.column, pa.array(list(wanted), pa.large_string())).to_numpy(
                zero_copy_only=False
            )
        )
