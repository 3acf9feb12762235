"""Blocks: a long range of rows, cut into parts of bounded size."""

from __future__ import annotations


def blocks(count: int, size: int) -> list[slice]:
    """0..count in consecutive slices of at most `size` rows."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def block_bounds(count: int, size: int) -> list[tuple[int, int]]:
    """The same as (start, stop) pairs."""
    return [(part.start, part.stop) for part in blocks(count, size)]
