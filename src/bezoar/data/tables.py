"""Tables of images and captions: CSV, TSV, JSON Lines and Parquet, read row by row, from any block of rows on.

Images are local files that the rows name, or bytes in a Parquet column (as Hugging Face's datasets hold them). What a
table says is hostile: no image is read from outside a stated root, and a row that cannot be read is named.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from bezoar.data.blocks import block_bounds
from bezoar.data.decoding import batch_pairs, describe_failure
from bezoar.data.files import parquet
from bezoar.data.files.paths import TEXT_BYTES, distinct_stems, read_file
from bezoar.data.files.skipped import ReadReport, Skipped, Unreadable
from bezoar.data.pairs import Pairs
from bezoar.data.shards import StoredRecord
from bezoar.errors import UserError

IMAGE_COLUMNS = (
    "filepath",
    "image",
    "image_path",
    "filename",
    "file_name",
    "path",
)  # open_clip's name first
CAPTION_COLUMNS = ("title", "caption", "text")
ID_COLUMNS = ("id", "key", "image_id", "uid")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
BLOCK = 4096  # rows of a unit of work
FIRST = 100  # rows that are looked at before any other
Row = dict[str, Any]
Place = tuple[
    int, int, int
]  # a block of rows: how many rows come before it, the byte where it begins, how many it has


def read_rows(
    table: Path, place: Sequence[int] | None = None, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, Row | str]]:
    """(`row N`, the row or why it cannot be read), N from 1 after the header. Raises UserError for a broken table.

    columns: of a Parquet file, what is read; None: whatever holds text.
    """
    reader = _reader(
        table,
        {".jsonl": _json_rows, ".parquet": functools.partial(_parquet_rows, columns=columns)},
        _csv_rows,
    )
    before, offset, count = place or (0, 0, None)
    try:
        for number, row in enumerate(reader(table, before, offset, count), start=before + 1):
            yield f"row {number}", row
    except (OSError, ValueError) as error:
        raise _broken(table, error) from error


def cut_blocks(table: Path, size: int = BLOCK) -> list[Place]:
    """A table's blocks of `size` rows. Costs a pass over the table itself, none of a Parquet file."""
    if table.suffix == ".parquet":
        with parquet.open_parquet(table) as file:
            return [
                (start, 0, stop - start)
                for start, stop in block_bounds(file.metadata.num_rows, size)
            ]
    found: list[Place] = []
    try:
        with table.open("rb") as file:
            for number, offset in enumerate(
                _reader(table, {".jsonl": _json_starts}, _csv_starts)(file, table)
            ):
                if number % size == 0:
                    found.append((number, offset, 0))
                found[-1] = (*found[-1][:2], number + 1 - found[-1][0])
    except (OSError, ValueError) as error:
        raise _broken(table, error) from error
    return found


def header(table: Path) -> list[str]:
    """The names of a table's columns: of JSON Lines those of the first object."""
    if table.suffix == ".parquet":
        with parquet.open_parquet(table) as file:
            return list(file.schema_arrow.names)
    first = next((row for _, row in read_rows(table, None) if isinstance(row, dict)), {})
    return [name for name in first if isinstance(name, str)]


def find_column(path: str, held: Iterable[Any], given: str | None, known: Sequence[str]) -> str:
    """The column that was asked for, or the first known one. Raises UserError that lists the table's columns."""
    held = list(held)
    for name in (given,) if given else known:
        if name in held:
            return name
    raise UserError(
        f"{path} has no column {given or ' or '.join(known)}; it has: {', '.join(map(str, held))}"
    )


def resolve_inside(table: Path, root: Path | None, told: str) -> Path | None:
    """Where a path that a table names leads, when that is inside the root (None: the table's folder); by its text, links are
    the user's own."""
    path = Path(os.path.abspath(table.parent / told))
    return path if path.is_relative_to(os.path.abspath(root or table.parent)) else None


def refuse_outside(table: Path, root: Path | None, image: str) -> None:
    """Raises UserError where the first rows name local images and all of these lie outside the root."""
    if table.suffix == ".parquet":
        with parquet.open_parquet(table) as file:
            kind = file.schema_arrow.field(image).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            return
    named = (
        (place, row.get(image))
        for place, row in read_rows(table, (0, 0, FIRST), [image])
        if isinstance(row, dict)
    )
    local: list[tuple[str, str]] = []
    with suppress(UserError):  # a table that breaks off is named when it is its turn
        local += (
            (place, told)
            for place, told in named
            if isinstance(told, str) and told.strip() and "://" not in told
        )
    if local and not any(resolve_inside(table, root, told) for _, told in local):
        place, told = local[0]
        allowed = os.path.abspath(root or table.parent)
        raise UserError(
            f"{table} {place}: image {told[:200]!r} lies outside {allowed}, where this table's images must lie; "
            f"if the table is trusted, root=FOLDER allows another folder"
        )


def is_unicode(text: str) -> bool:
    """Whether text is Unicode: no lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _reader(table: Path, known: dict[str, Callable], otherwise: Callable) -> Callable:
    if table.suffix not in SUFFIXES:
        raise UserError(f"a table of captions must be {', '.join(SUFFIXES)}; got {str(table)!r}")
    return known.get(table.suffix, otherwise)


def _broken(table: Path, error: Exception) -> UserError:
    return UserError(
        f"{table} cannot be read as {table.suffix[1:]}: {' '.join(str(error).split())[:200]}"
    )


def _lines(file: BinaryIO) -> Iterator[str]:
    """Bytes that are not UTF-8 become lone surrogates, which `readable` refuses. `file.tell()` is where the next begins."""
    while line := file.readline(TEXT_BYTES):
        yield line.decode("utf-8", "surrogateescape").removeprefix(
            "\ufeff" if file.tell() == len(line) else ""
        )


def _csv(file: BinaryIO, table: Path) -> csv.DictReader:
    """Comma or tab, by the header line, which is read."""
    tabs = table.suffix == ".tsv" or b"\t" in file.readline(TEXT_BYTES)
    file.seek(0)
    reader = csv.DictReader(_lines(file), delimiter="\t" if tabs else ",", strict=True)
    _ = reader.fieldnames
    return reader


def _csv_rows(table: Path, _: int, offset: int, count: int | None) -> Iterator[Row | str]:
    with table.open("rb") as file:
        try:
            reader = _csv(file, table)
            file.seek(max(offset, file.tell()))
            yield from itertools.islice(reader, count)
        except csv.Error as error:  # a stray quote would swallow the lines after it
            raise ValueError(f"row after line {reader.line_num}: {error}") from error


def _csv_starts(file: BinaryIO, table: Path) -> Iterator[int]:
    """Where each row begins."""
    try:
        reader = _csv(file, table)
        start = file.tell()
        for _ in reader:
            yield start
            start = file.tell()
    except csv.Error as error:
        raise ValueError(f"row after line {reader.line_num}: {error}") from error


def _json_rows(table: Path, _: int, offset: int, count: int | None) -> Iterator[Row | str]:
    """One object a line."""
    with table.open("rb") as file:
        file.seek(offset)
        for line in itertools.islice(
            (x for x in iter(lambda: file.readline(TEXT_BYTES), b"") if x.strip()), count
        ):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                yield "not JSON in UTF-8"
                continue
            yield row if isinstance(row, dict) else "not a JSON object"


def _json_starts(file: BinaryIO, _: Path) -> Iterator[int]:
    start = 0
    while line := file.readline(TEXT_BYTES):
        if line.strip():
            yield start
        start = file.tell()


def _parquet_rows(
    table: Path, before: int, _: int, count: int | None, columns: Sequence[str] | None
) -> Iterator[Row | str]:
    if columns is None:
        with parquet.open_parquet(table) as file:
            kinds = {f.name: f.type for f in file.schema_arrow}
        columns = [
            n for n, t in kinds.items() if pa.types.is_string(t) or pa.types.is_large_string(t)
        ]
    for batch in parquet.read_batches(
        table, columns, before, None if count is None else before + count
    ):
        try:
            yield from batch.to_pylist()
        except (ValueError, OverflowError):
            yield from (_python(row) for row in (batch.slice(i, 1) for i in range(len(batch))))


def _python(row: pa.RecordBatch) -> Row | str:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError:
        return "caption is not UTF-8"
    except (ValueError, OverflowError) as error:  # a date beyond those that Python has
        return f"a value out of range: {error}"


@dataclass(frozen=True)
class TableSource:
    """A source that reads tables as it goes: a record a row.

    paths: the tables. root: the folder that images must lie in; None: that of their table. A relative image path starts
    at its table's folder. columns: names of the image's, the caption's and the id's column; None: found by name.

    An id is the id column's, else `IMAGE#ROW`; with several tables their names come first. limit: records.
    """

    paths: tuple[Path, ...]
    size: int = 64
    root: Path | None = None
    columns: tuple[str | None, str | None, str | None] = (None, None, None)
    limit: int | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "_report", ReadReport())

    @property
    def report(self) -> ReadReport:
        """How the last pass over the tables went, or is going; empty before the first."""
        return self.__dict__["_report"]

    @functools.cached_property
    def stems(self) -> tuple[str, ...]:
        """What each table is called in ids."""
        return distinct_stems(self.paths)

    def __len__(self) -> int:
        """How many records `batches` yields. Costs a pass that decodes everything."""
        return sum(len(batch) for batch in self.batches(1024))

    def batches(self, size: int) -> Iterator[Pairs]:
        """The records in the order of the tables, `size` at a time. Raises UserError when there are none."""
        self.confine()
        report = ReadReport()
        object.__setattr__(self, "_report", report)
        every = (r for i in range(len(self.paths)) for r in self.records(i))
        yield from batch_pairs(every, self.size, size, report, limit=self.limit)
        if not report.read:
            raise UserError(describe_failure(str(self.paths[0]), report))

    def records(self, number: int, *place: int) -> Iterator[StoredRecord | Skipped]:
        """The records of a table, or of the block of its rows at a `Place`, not decoded yet."""
        table = self.paths[number]
        image, caption, key, url = self.held(number)
        for where, row in read_rows(
            table, place or None, [n for n in (image, caption, key, url) if n]
        ):
            if isinstance(row, str):
                yield Skipped(str(table), where, row)
                continue
            found = self._image(table, row.get(image))
            text, name = row.get(caption) if caption else "", row.get(key) if key else None
            if isinstance(found, str):
                yield Skipped(str(table), where, found)
            elif caption and (not isinstance(text, str) or not text.strip()):
                yield Skipped(str(table), where, "no caption")
            elif not is_unicode(f"{text}{name}{found[1]}"):
                yield Skipped(str(table), where, "caption is not UTF-8")
            else:
                content, member = found
                own = f"{member or self.stems[number]}#{where.removeprefix('row ')}"
                own = f"{self.stems[number]}/{own}" if len(self.paths) > 1 and member else own
                ids = (own if name is None or name == "" else str(name),)
                texts = (text.strip(),) if isinstance(text, str) and caption else ()
                offset, length = (
                    int(where.removeprefix("row ")) - 1,
                    len(content) if isinstance(content, bytes) else 0,
                )
                link = (
                    told
                    if url and isinstance(told := row.get(url), str) and is_unicode(told)
                    else ""
                )
                yield StoredRecord(
                    content,
                    ids,
                    texts,
                    -1,
                    str(table),
                    member or where,
                    number,
                    offset,
                    length,
                    link,
                )

    @functools.cache  # noqa: B019  # as long as the table is in use
    def held(self, number: int) -> tuple[str, str, str, str]:
        """The columns of image, caption, id and address; "" where there is none. Raises UserError without an image's."""
        path, names = self.paths[number], header(self.paths[number])
        image, caption, key = self.columns
        return (
            find_column(str(path), names, image, IMAGE_COLUMNS),
            find_column(str(path), names, caption, CAPTION_COLUMNS)
            if caption or set(CAPTION_COLUMNS) & set(names)
            else "",
            find_column(str(path), names, key, ID_COLUMNS)
            if key or set(ID_COLUMNS) & set(names)
            else "",
            "url" if "url" in names else "",
        )

    def _image(self, table: Path, told: Any) -> tuple[bytes | Path, str] | str:
        """What a row's image cell says -> the image and the path it was named by, or why there is none."""
        if isinstance(told, dict):  # Hugging Face's: the file itself, or else where it lies
            told = told.get("bytes") or told.get("path")
        if isinstance(told, bytes):
            return told, ""
        if not isinstance(told, str) or not told.strip():
            return "no image"
        if "://" in told:
            return f"not a local path: {told[:200]}"
        path = self.resolved(table, told)
        return (path, told) if path else f"path leaves the root: {told[:200]}"

    def resolved(self, table: Path, told: str) -> Path | None:
        """Where a path that a table names leads, when that is inside the root."""
        return resolve_inside(table, self.root, told)

    def confine(self) -> None:
        """Raises UserError for a table whose images lie outside the root, as its first rows say."""
        for number, path in enumerate(self.paths):
            try:
                image = self.held(number)[0]
            except UserError:  # it is named when it is its turn
                continue
            refuse_outside(path, self.root, image)


class TableImages:
    """The images of a table's records, by table and row: what `indexed.Files` is to tars.

    members: of every record, what its row's image is called, by the record's row in the corpus, which stands in the place
    of an offset; images that are bytes of a Parquet column are looked up by their row in it.
    """

    def __init__(self, table: TableSource, members: Sequence[str]) -> None:
        self.table, self.paths, self.members = table, table.paths, members
        self.lock = threading.Lock()
        self.blocks: deque[tuple[int, dict[int, bytes]]] = deque(maxlen=2)

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """The encoded image: of the record number `offset` of the corpus, or with a length, in the table's row `offset`."""
        if not length:
            path = self.table.resolved(self.paths[shard], self.members[offset])
            if path is None:
                raise Unreadable("path leaves the root")
            return read_file(path)
        with self.lock:  # threads that want one block wait for it instead of reading it each
            content = next((b[offset] for s, b in self.blocks if s == shard and offset in b), None)
            for first in (
                offset // parquet.BATCH_ROWS * parquet.BATCH_ROWS,
                offset,
            ):  # the same blocks in whatever order rows are asked
                if content is None:
                    self.blocks.append((shard, self._block(shard, first)))
                    content = self.blocks[-1][1].get(offset)
        if content is None or len(content) != length:
            raise Unreadable("the table was changed since it was indexed")
        return content

    def _block(self, shard: int, first: int) -> dict[int, bytes]:
        """The images of a row and of those after it, as many as may be held."""
        block: dict[int, bytes] = {}
        held = 0
        for r in self.table.records(shard, first, 0, parquet.BATCH_ROWS):
            if isinstance(r, StoredRecord) and isinstance(r.image, bytes):
                block[r.offset] = r.image
                held += len(r.image)
            if held > parquet.MAX_HELD_BYTES:
                break
        return block
