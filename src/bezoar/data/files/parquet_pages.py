"""Sizes of the pages of foreign Parquet files, read from the page headers.

Many rows may point at one entry of a dictionary, or repeat what stands in the row before, so that a
small file fills the memory. No value is larger than its page, so no batch is larger than its rows
times the largest page.

The pages are looked at themselves because nothing else bounds them: the sizes in a file's footer
may be made up, and reading one row at a time instead costs forty times as much for columns of text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import pyarrow.parquet as pq

from bezoar.errors import UserError

UNPACKED_BYTES = 32 << 20  # of rows that Arrow unpacks at a time
MAX_PAGES = 1 << 16  # of a column chunk that are looked at
# Fields of a page header.
UNCOMPRESSED_SIZE = 2
COMPRESSED_SIZE = 3
# Types of fields, as Thrift's compact protocol numbers them.
INTEGERS = (4, 5, 6)
BINARY = 8
STRUCT = 12
FIXED_BYTES = {1: 0, 2: 0, 3: 1, 7: 8}  # true, false, byte, double
PARSING_ERRORS = (OSError, ValueError, LookupError, OverflowError, RecursionError)


def count_safe_rows(
    file: pq.ParquetFile, path: Path, groups: Iterable[int], columns: Sequence[str], most: int
) -> int:
    """Return how many rows of some columns may be unpacked at a time, at most `most`.

    Raises UserError for columns of lists, but for those of lists of texts.
    """
    for leaf in map(file.schema.column, range(len(file.schema))):
        is_asked = any(leaf.path == c or leaf.path.startswith(f"{c}.") for c in columns)
        is_listed_text = leaf.max_repetition_level == 1 and leaf.converted_type == "UTF8"
        if is_asked and leaf.max_repetition_level and not is_listed_text:
            raise UserError(
                f"{path}: column {leaf.path} holds lists; expected a value a row, or a list of texts"
            )
    largest = 1
    with path.open("rb") as raw:
        for group in map(file.metadata.row_group, groups):
            for chunk in map(group.column, range(group.num_columns)):
                if chunk.path_in_schema.startswith(tuple(columns)):
                    values = max(1, -(-chunk.num_values // max(1, group.num_rows)))  # a row
                    largest = max(largest, largest_page(raw, chunk) * values)
    return max(1, min(most, UNPACKED_BYTES // largest))


def check_chunks(
    file: pq.ParquetFile, path: Path, groups: Iterable[int], columns: Sequence[str]
) -> None:
    """Raise UserError if a column does not fit its row group or lies outside of the file."""
    size = path.stat().st_size
    flat = {
        leaf.path
        for leaf in map(file.schema.column, range(len(file.schema)))
        if not leaf.max_repetition_level
    }
    for group in map(file.metadata.row_group, groups):
        for chunk in map(group.column, range(group.num_columns)):
            name = chunk.path_in_schema
            if not name.startswith(tuple(columns)):
                continue
            start = first_page(chunk)
            if not 0 <= start <= start + chunk.total_compressed_size <= size:
                raise UserError(f"{path}: column {name} lies outside of the file")
            if name in flat and chunk.num_values != group.num_rows:
                raise UserError(
                    f"{path}: column {name} claims {chunk.num_values} values of {group.num_rows} rows"
                )


def first_page(chunk: pq.ColumnChunkMetaData) -> int:
    """The byte at which a column chunk begins."""
    start = int(chunk.data_page_offset)
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    return start


def largest_page(raw: IO[bytes], chunk: pq.ColumnChunkMetaData) -> int:
    """Bytes of a column chunk's largest page; of the whole chunk if a header cannot be read."""
    position = first_page(chunk)
    end = position + chunk.total_compressed_size
    largest = 0
    try:
        for _ in range(MAX_PAGES):
            if position >= end:
                return largest
            raw.seek(position)
            header = _read_struct(raw)
            if min(header[UNCOMPRESSED_SIZE], header[COMPRESSED_SIZE]) < 0:
                break
            largest = max(largest, header[UNCOMPRESSED_SIZE])
            position = raw.tell() + header[COMPRESSED_SIZE]
    except PARSING_ERRORS:
        pass
    return int(max(largest, chunk.total_uncompressed_size))


def _read_struct(raw: IO[bytes]) -> dict[int, int]:
    """Read a Thrift structure; return its integers by the number of their field."""
    integers: dict[int, int] = {}
    field = 0
    while mark := raw.read(1)[0]:
        kind, step = mark & 15, mark >> 4
        field = field + step if step else _read_signed(raw)
        if kind in INTEGERS:
            integers[field] = _read_signed(raw)
        elif kind == BINARY:
            raw.seek(_read_varint(raw), 1)
        elif kind == STRUCT:
            _read_struct(raw)
        else:
            raw.seek(FIXED_BYTES[kind], 1)
    return integers


def _read_varint(raw: IO[bytes]) -> int:
    """Read an integer of seven bits a byte, the lowest first."""
    value = 0
    for i in range(10):
        byte = raw.read(1)[0]
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value
    raise ValueError("an integer of more than ten bytes")


def _read_signed(raw: IO[bytes]) -> int:
    """Read a zigzag integer: 0, -1, 1, -2 ... are written 0, 1, 2, 3 ..."""
    value = _read_varint(raw)
    return value >> 1 ^ -(value & 1)
