"""Tables that others wrote: CSV, TSV, JSON Lines and Parquet, read row by row from any block on.

What a table says is hostile: no image that it names is read from outside a stated root, and a row
that cannot be read is named.
"""

import csv
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bezoar.data.files.arrow_stream import is_text
from bezoar.data.files.parquet import read_batches, read_header
from bezoar.data.files.paths import TEXT_BYTES, open_regular, printable
from bezoar.errors import UserError

# Names of columns, open_clip's first.
IMAGE_COLUMNS = (
    "filepath", "image", "image_path", "filename", "file_name", "path",
    "jpg", "png", "webp",  # img2dataset's Parquet files, which hold the images' bytes
)  # fmt: skip
CAPTION_COLUMNS = ("title", "caption", "text")
ID_COLUMNS = ("id", "key", "image_id", "uid")
BINARY = (".parquet", ".arrow")  # read by `parquet`
SUFFIXES = (".csv", ".tsv", ".jsonl", *BINARY)
BLOCK_ROWS = 4096  # of a unit of work
FREE_BLOCK_BYTES = 64 << 20  # that a block of Parquet may unpack to, however small its file is
MAX_RATIO = 20  # how many times the file's size that may be
LISTED_BYTES = 16  # that a text of a list takes beside its own
FIRST_ROWS = 100  # that are looked at before any other
LISTED = 1000  # characters of the names of columns in a message
ROW_LINES = 1000  # the most over which a row with quotes may go
Row = dict[str, Any]


class RowBlock(NamedTuple):
    """Consecutive rows: how many come before them, the byte where they begin, and their number."""

    before: int
    offset: int
    rows: int | None


ALL_ROWS = RowBlock(0, 0, None)


def read_rows(
    table: Path, block: RowBlock = ALL_ROWS, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, Row | str]]:
    """Read a table, or a block of its rows.

    Args:
        table: a file whose ending is one of SUFFIXES.
        block: one of `cut_blocks`.
        columns: what is read of a Parquet file; None reads whatever holds text.

    Yields:
        The number of a row, from 1 after the header, and the row or why it cannot be read.

    Raises:
        UserError: if the table cannot be read, or not any further.
    """
    _check_suffix(table)
    with _as_user_error(table):
        _refuse_encoding(table)
        if table.suffix in BINARY:
            rows = _read_parquet(table, block, columns)
        elif table.suffix == ".jsonl":
            rows = _read_json(table, block)
        else:
            rows = _read_csv(table, block)
        yield from enumerate(rows, start=block.before + 1)


def cut_blocks(table: Path, size: int | None = None) -> list[RowBlock]:
    """Cut a table into blocks of `size` rows, BLOCK_ROWS if not given.

    This costs a pass over the table, but none over a Parquet file. Raises UserError if the table
    cannot be read.
    """
    _check_suffix(table)
    size = size or BLOCK_ROWS
    if table.suffix in BINARY:
        rows = read_header(table).rows
        return [RowBlock(start, 0, min(size, rows - start)) for start in range(0, rows, size)]
    blocks: list[RowBlock] = []
    with _as_user_error(table), open_regular(table) as file:
        _refuse_encoding(table)
        starts = (
            _json_starts(file)
            if table.suffix == ".jsonl"
            else (offset for offset, _ in _CsvRows(file, table).read())
        )
        while offsets := list(itertools.islice(starts, size)):
            blocks.append(RowBlock(len(blocks) * size, offsets[0], len(offsets)))
    return blocks


def column_names(table: Path) -> list[str]:
    """Return the names of a table's columns; of JSON Lines all those of the first objects."""
    if table.suffix in BINARY:
        return list(read_header(table).names)
    rows = (row for _, row in read_rows(table) if isinstance(row, dict))
    first = itertools.islice(rows, FIRST_ROWS)
    return list(dict.fromkeys(k for row in first for k in row if k))


def find_column(
    path: str, names: Iterable[str], wanted: str | None, candidates: Sequence[str]
) -> str:
    """Find the column `wanted`, or the first of the candidates, in any case of letters.

    Raises UserError that lists the table's columns.
    """
    names = list(names)
    name = match_column(names, (wanted,) if wanted else candidates)
    if name:
        return name
    raise UserError(
        f"{path} has no column {wanted or ' or '.join(candidates)}; "
        f"it has: {printable(', '.join(map(str, names)))[:LISTED]}"
    )


def match_column(names: Sequence[str], candidates: Sequence[str]) -> str:
    """Return the name of the first candidate there is, else of one in other letters, or ""."""
    by_plain = {name.strip().lower(): name for name in reversed(names)}
    exact = next((c for c in candidates if c in names), "")
    return exact or next((by_plain[c.lower()] for c in candidates if c.lower() in by_plain), "")


def find_sentences(table: Path, names: Sequence[str]) -> str:
    """Return the one of some columns whose first rows hold most spaces, at least 2 each, or ""."""
    spaces = {"": 0, **dict.fromkeys(names, 0)}
    count = 0
    with suppress(UserError):  # a table that cannot be read is named when it is its turn
        for _, row in read_rows(table, RowBlock(0, 0, FIRST_ROWS)):
            count += 1
            cells = row if isinstance(row, dict) else {}
            for name in names:
                cell = cells.get(name)
                spaces[name] += cell.strip().count(" ") if isinstance(cell, str) else 0
    longest = max(spaces, key=lambda name: spaces[name])
    return longest if count and spaces[longest] >= 2 * count else ""


def cell_text(cell: Any) -> str:
    """The text of a cell of any type, bytes read as UTF-8; empty for none."""
    if isinstance(cell, bytes):
        return cell.decode("utf-8", "surrogateescape")
    return "" if cell is None else str(cell)


def resolve_inside(table: Path, root: Path | None, text: str) -> Path | None:
    """Return where a path that a table names leads, or None if that is outside the root.

    A relative path begins at the table's folder, which is also the root if that is None. Links are
    not followed: they are the user's own.
    """
    path = Path(os.path.abspath(table.parent / text))
    return path if path.is_relative_to(os.path.abspath(root or table.parent)) else None


def refuse_outside(table: Path, root: Path | None, image_column: str) -> None:
    """Raise UserError if the local images that the first rows name all lie outside the root."""
    if table.suffix in BINARY and image_column not in read_header(table).texts:
        return
    local: list[tuple[int, str]] = []
    with suppress(UserError):  # a table that breaks off is named when it is its turn
        for number, row in read_rows(table, RowBlock(0, 0, FIRST_ROWS), [image_column]):
            text = row.get(image_column) if isinstance(row, dict) else None
            if isinstance(text, str) and text.strip() and "://" not in text:
                local.append((number, text))
    if local and not any(resolve_inside(table, root, text) for _, text in local):
        number, text = local[0]
        raise UserError(
            f"{table} row {number}: image {text[:200]!r} lies outside "
            f"{os.path.abspath(root or table.parent)}, where this table's images must lie; "
            "if the table is trusted, root=FOLDER allows another folder"
        )


def _check_suffix(table: Path) -> None:
    if table.suffix not in SUFFIXES:
        raise UserError(f"a table of captions must be {', '.join(SUFFIXES)}; got {str(table)!r}")


def _refuse_encoding(table: Path) -> None:
    """Raise ValueError for text in two or four bytes a character, as spreadsheets can write it."""
    if table.suffix in BINARY:
        return
    with open_regular(table) as file:
        start = file.read(64)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
        raise ValueError("it is UTF-16 or UTF-32; save it as UTF-8")


@contextmanager
def _as_user_error(table: Path) -> Iterator[None]:
    """Turn what the parsers raise into a UserError that names the table."""
    try:
        yield
    except (OSError, ValueError, csv.Error) as error:
        reason = printable(" ".join(str(error).split())[:200])
        raise UserError(f"{table} cannot be read as {table.suffix[1:]}: {reason}") from error


def _decode_lines(file: BinaryIO) -> Iterator[str]:
    """Decode line by line, so that `file.tell()` is where the next line begins.

    Bytes that are not UTF-8 become lone surrogates, which `metadata.is_unicode` refuses later.
    """
    for line in _read_lines(file):
        text = line.decode("utf-8", "surrogateescape")
        yield text.removeprefix("\ufeff") if file.tell() == len(line) else text


def _read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Read line by line. Raises ValueError for one that does not end within TEXT_BYTES."""
    while line := file.readline(TEXT_BYTES + 1):
        if len(line) > TEXT_BYTES:
            start = file.tell() - len(line)
            raise ValueError(f"the line at byte {start} is longer than {TEXT_BYTES} bytes")
        yield line


class _CsvRows:
    """The rows of a CSV or TSV file, each with the byte at which it begins.

    Quotes that are not closed, or closed in the middle of a cell, spoil their own row alone: it is
    taken as it stands where it has as many cells as the header without regard to quotes, as in
    tables that quote nothing. Any other row that does not fit is told, and the next line is read.
    """

    def __init__(self, file: BinaryIO, table: Path) -> None:
        tabs = table.suffix == ".tsv" or b"\t" in file.readline(TEXT_BYTES)
        self.file = file
        self.delimiter = "\t" if tabs else ","
        self.header: list[str] = []
        self.counted = (0, 1)  # a byte, and the number of the line that begins there
        file.seek(0)
        for _, cells in self._read_cells():
            if isinstance(cells, str):
                raise ValueError(f"line 1 is no header: {cells}")
            self.header = cells
            break
        name, count = next(iter(Counter(filter(None, self.header)).most_common(1)), ("", 0))
        if count > 1:
            raise ValueError(f"two columns are called {name!r}")
        self.body = file.tell()

    def read(self, start: int = 0) -> Iterator[tuple[int, Row | str]]:
        """Read rows from a byte on, empty lines left out."""
        self.file.seek(max(start, self.body))
        for offset, cells in self._read_cells():
            if isinstance(cells, str):
                yield offset, f"{cells}; line {self._line_of(offset)}"
            elif any(cells[len(self.header) :]):
                count = f"{len(cells)} for {len(self.header)} columns"
                advice = "a cell that holds the delimiter must be quoted"
                reason = f"more cells than the header: {count}, {advice}"
                yield offset, f"{reason}; line {self._line_of(offset)}"
            else:
                yield offset, dict(itertools.zip_longest(self.header, cells[: len(self.header)]))

    def _read_cells(self) -> Iterator[tuple[int, list[str] | str]]:
        """Read the cells of each row, or why they cannot be told apart."""
        while True:
            start = self.file.tell()
            lines = itertools.islice(_decode_lines(self.file), ROW_LINES)
            try:
                cells = next(csv.reader(lines, delimiter=self.delimiter, strict=True), None)
            except csv.Error as error:
                self.file.seek(start)
                line = next(_decode_lines(self.file), "")
                cells = line.rstrip("\r\n").split(self.delimiter)
                if "\r" in line.rstrip("\r\n") or len(cells) != len(self.header):
                    yield start, f"not a row of a table: {error}"
                    continue
            if cells is None:
                return
            if cells:
                yield start, cells
                continue
            while (begin := self.file.readline(3)) in (b"\n", b"\r\n"):  # millions may follow
                pass
            self.file.seek(-len(begin), os.SEEK_CUR)

    def _line_of(self, offset: int) -> int:
        """The number of the line that begins at a byte, which is not before the last one."""
        position = self.file.tell()
        start, count = self.counted
        self.file.seek(start)
        while start < offset and (part := self.file.read(min(offset - start, TEXT_BYTES))):
            count += part.count(b"\n")
            start += len(part)
        self.file.seek(position)
        self.counted = offset, count
        return count


def _read_csv(table: Path, block: RowBlock) -> Iterator[Row | str]:
    with open_regular(table) as file:
        rows = _CsvRows(file, table).read(block.offset)
        yield from (row for _, row in itertools.islice(rows, block.rows))


def _read_json(table: Path, block: RowBlock) -> Iterator[Row | str]:
    """Read one object a line; empty lines do not count."""
    with open_regular(table) as file:
        file.seek(block.offset)
        lines = (line for line in _read_lines(file) if line.strip())
        for line in itertools.islice(lines, block.rows):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                yield "not JSON in UTF-8"
                continue
            yield row if isinstance(row, dict) else "not a JSON object"


def _json_starts(file: BinaryIO) -> Iterator[int]:
    """The byte at which each line begins that is not empty."""
    start = 0
    for line in _read_lines(file):
        if line.strip():
            yield start
        start = file.tell()


def _read_parquet(
    table: Path, block: RowBlock, columns: Sequence[str] | None
) -> Iterator[Row | str]:
    columns = read_header(table).texts if columns is None else columns
    stop = None if block.rows is None else block.before + block.rows
    nbytes, most = 0, max(FREE_BLOCK_BYTES, MAX_RATIO * table.stat().st_size)
    for batch in read_batches(table, columns, block.before, stop):
        lengths = [_text_bytes(column) for column in batch.columns]
        longest = max((int(n.max(initial=0)) for n in lengths), default=0)
        if longest <= TEXT_BYTES:
            nbytes += max(batch.nbytes, sum(int(n.sum()) for n in lengths))
        if nbytes > most:  # thousands of rows may share one value
            raise UserError(f"{table} unpacks to more than {most} bytes")
        try:
            if longest <= TEXT_BYTES:
                yield from batch.to_pylist()
                continue
        except (ValueError, OverflowError):
            pass
        yield from (_to_python(batch.slice(i, 1)) for i in range(len(batch)))


def _text_bytes(column: pa.Array) -> np.ndarray:
    """Bytes of each row's text or list of texts, int64 (n,); of other columns 0.

    A text of a list counts for a few bytes more, because many empty ones take memory too.
    """
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not is_text(column.type.value_type if is_list else column.type):
        return np.zeros(len(column), np.int64)
    texts = column.flatten() if is_list else column
    counted = pc.binary_length(texts).fill_null(0).to_numpy(zero_copy_only=False)
    lengths: np.ndarray = counted.astype(np.int64)
    if not is_list:
        return lengths
    counts = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    total = np.concatenate([[0], np.cumsum(lengths + LISTED_BYTES)])
    ends = np.cumsum(counts)
    return np.asarray(total[ends] - total[ends - counts])


def _to_python(row: pa.RecordBatch) -> Row | str:
    """Convert a batch of one row, or say why that cannot be done."""
    for column in row.columns:
        nbytes = int(_text_bytes(column)[0])
        if nbytes > TEXT_BYTES:
            return f"text too large: {nbytes} bytes"
    try:
        values: Row = row.to_pylist()[0]
        return values
    except UnicodeDecodeError:
        return "caption is not UTF-8"
    except (ValueError, OverflowError) as error:  # a date beyond those that Python has
        return f"a value out of range: {error}"
