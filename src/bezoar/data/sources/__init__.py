"""Data sets: one file a method."""

from typing import Protocol

from bezoar.data.pairs import Pairs
from bezoar.data.source import Source


class DataMethod(Protocol):
    """A data set; the fields say which records it holds.

    A method that reads files also has `files()`: their paths, alone or each with a stable name,
    whose contents are part of the question. A method with a test split has a field `split`; one
    that draws records has `count` and `seed`; one that returns Pairs of image files may have
    `records()`, which gives them undecoded.
    """

    def __call__(self) -> Pairs | Source:
        """Return the records, in memory or as a source that is read in parts.

        Raises UserError if they cannot be read at all; unreadable records are in their `report`.
        """
        ...
