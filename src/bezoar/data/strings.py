"""Strings: many texts in one Arrow column."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BLOCK = 1 << 14  # texts that are Python objects at a time


class Strings(Sequence[str]):
    """N texts that cost their characters and 8 bytes each, not a Python object each."""

    def __init__(self, column: pa.Array) -> None:
        self.column = column  # of type large_string

    @staticmethod
    def from_texts(texts: Sequence[str]) -> Strings:
        """Put texts into a column."""
        if isinstance(texts, Strings):
            return texts
        return Strings(pa.array(list(texts), pa.large_string()))

    @staticmethod
    def concat(parts: Sequence[Strings]) -> Strings:
        """Put the texts of several columns into one, in order."""
        return Strings(pa.concat_arrays([p.column for p in parts]))

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[str, ...]: ...
    def __getitem__(self, row: int | slice) -> str | tuple[str, ...]:
        if isinstance(row, slice):
            return tuple(self.column[row].to_pylist())
        text: str = self.column[int(row)].as_py()
        return text

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.blocks())

    def blocks(self) -> Iterator[list[str]]:
        """Iterate over the texts in order, a bounded number at a time."""
        return (self.column.slice(start, BLOCK).to_pylist() for start in range(0, len(self), BLOCK))

    def take(self, rows: np.ndarray) -> Strings:
        """Return the texts at the given rows, in that order."""
        return Strings(self.column.take(pa.array(rows)))

    def find_holding(self, words: Collection[str]) -> np.ndarray:
        """Return the rows of texts with all of these ASCII words in any case: int64, ascending.

        Texts with a character beyond ASCII are among them, whatever they hold.
        """
        is_found = functools.reduce(
            pc.and_,
            (pc.match_substring(self.column, word, ignore_case=True) for word in words),
        )
        is_beyond = pc.invert(pc.string_is_ascii(self.column))
        return np.flatnonzero(pc.or_(is_found, is_beyond).to_numpy(zero_copy_only=False))

    def find_rows(self, wanted: Collection[str]) -> np.ndarray:
        """Return the rows that hold one of the wanted texts: int64, ascending."""
        is_wanted = pc.is_in(self.column, pa.array(list(wanted), pa.large_string()))
        return np.flatnonzero(is_wanted.to_numpy(zero_copy_only=False))
