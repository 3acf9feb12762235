"""Blocks: a long range of rows, cut into parts of bounded size."""


def blocks(count: int, size: int) -> list[slice]:
    """Cut the rows 0..count into consecutive slices of at most `size` rows."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
