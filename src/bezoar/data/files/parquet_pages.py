"""Pages of foreign Parquet files: how large they are unpacked, read off their headers before Arrow unpacks any.

Many rows may point at one entry of a dictionary, or repeat what stands in the row before, so that a small file fills the
memory. No value is larger than its page, and so no batch than that times its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq

from bezoar.errors import UserError

UNPACKED = 32 << 20  # bytes of rows that Arrow unpacks at a time
MOST = 1 << 16  # pages of a column chunk that are looked at
WHOLE, TEXT, STRUCT = (4, 5, 6), 8, 12  # kinds of fields, as Thrift's compact protocol numbers them
FIXED = {1: 0, 2: 0, 3: 1, 7: 8}  # those of so many bytes


def rows(
    file: pq.ParquetFile, path: Path, groups: Iterable[int], columns: Sequence[str], most: int
) -> int:
    """How many rows of some columns may be unpacked at a time, at most `most`. Raises UserError for columns of lists."""
    leaves = (file.schema.column(i) for i in range(len(file.schema)))
    for name in (leaf.path for leaf in leaves if leaf.max_repetition_level):
        if any(name == c or name.startswith(f"{c}.") for c in columns):
            raise UserError(f"{path}: column {name} holds lists; expected a value a row")
    found = (file.metadata.row_group(i) for i in groups)
    chunks = (group.column(i) for group in found for i in range(group.num_columns))
    with path.open("rb") as raw:
        largest = max(
            (_largest(raw, c) for c in chunks if c.path_in_schema.startswith(tuple(columns))),
            default=1,
        )
    return max(1, min(most, UNPACKED // max(1, largest)))


def _largest(raw: IO[bytes], chunk: Any) -> int:
    """Bytes of a column chunk's largest page; all of the chunk where a header is none that is known."""
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    end, largest = start + chunk.total_compressed_size, 0
    try:
        for _ in range(MOST):
            if start >= end:
                return largest
            raw.seek(start)
            header = _header(raw)
            largest, start = max(largest, header[2]), raw.tell() + header[3]
            if min(header[2], header[3]) < 0:
                break
    except (OSError, ValueError, LookupError, OverflowError, RecursionError):
        pass
    return chunk.total_uncompressed_size


def _header(raw: IO[bytes]) -> dict[int, int]:
    """The whole numbers of a structure by field: of a page header, 2 is the page's size unpacked, 3 the size that is stored."""
    found, field = {}, 0
    while mark := raw.read(1)[0]:
        kind = mark & 15
        field = field + (mark >> 4) if mark >> 4 else _signed(raw)
        if kind in WHOLE:
            found[field] = _signed(raw)
        elif kind == TEXT:
            raw.seek(_number(raw), 1)
        elif kind == STRUCT:
            _header(raw)
        else:
            raw.seek(FIXED[kind], 1)
    return found


def _number(raw: IO[bytes]) -> int:
    """Seven bits a byte, the lowest first."""
    value = 0
    for i in range(10):
        byte = raw.read(1)[0]
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value
    raise ValueError("a number of more than ten bytes")


def _signed(raw: IO[bytes]) -> int:
    """0, -1, 1, -2 ... are written 0, 1, 2, 3 ..."""
    value = _number(raw)
    return value >> 1 ^ -(value & 1)
