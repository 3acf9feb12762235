"""Data sets: one file a method."""

from __future__ import annotations

from typing import Protocol

from bezoar.data.pairs import Pairs
from bezoar.data.source import Source


class DataMethod(Protocol):
    """A data set whose fields say which records it holds.

    A method whose records come out of files also has `files()`: the paths that are read, alone or
    each with a stable name, so that changed files are another question. One that knows a test split
    has a field `split`; one that makes records to order has `count` and `seed`; one that returns
    Pairs of image files may have `records()`, these undecoded.
    """

    def __call__(self) -> Pairs | Source:
        """Return the records, in memory or as a source that is read as it goes.

        Raises UserError if they cannot be read at all; what cannot be read of them is in their
        `report`.
        """
        ...
