"""A table of images and captions, streamed: CSV, TSV, JSON Lines or Parquet (Hugging Face)."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from bezoar.data.decoding import Record
from bezoar.data.files import parquet
from bezoar.data.files.metadata import ORIGIN_COLUMNS, describe_long_text, is_unicode
from bezoar.data.files.paths import distinct_stems, expand_paths
from bezoar.data.files.skipped import ReadReport, Skipped, Unreadable
from bezoar.data.files.tables import (
    ALL_ROWS,
    CAPTION_COLUMNS,
    ID_COLUMNS,
    IMAGE_COLUMNS,
    LISTED,
    SUFFIXES,
    Row,
    RowBlock,
    cell_text,
    column_names,
    cut_blocks,
    find_column,
    find_sentences,
    match_column,
    read_rows,
    refuse_outside,
    resolve_inside,
)
from bezoar.data.label_sets import check_fields
from bezoar.data.source import RecordIndex, Unit, number_units
from bezoar.data.streams import FileImages, RecordStream
from bezoar.errors import UserError, expand_home
from bezoar.registry import method

NO_CAPTION = "no"  # in place of a column's name


@method
class Table:
    """A row names an image below `root`, or (Parquet) holds its bytes.

    An id is the id column's, else IMAGE#ROW. A list of captions makes records ID#0, ID#1 ...
    """

    path: Annotated[
        str,
        "table, folder of .parquet, glob or brace list: .csv (comma or tab), .tsv, .jsonl, "
        ".parquet, .arrow",
    ]
    size: Annotated[int, "pixels a side: the largest centred square, resized"] = 64
    root: Annotated[str | None, "folder that images must lie in; none: the table's own"] = None
    image: Annotated[str | None, "column of image paths or bytes; found by name when not given"] = (
        None
    )
    caption: Annotated[
        str | None, "column of captions, texts or lists; found by name when not given; `no`: none"
    ] = None
    key: Annotated[str | None, "column of ids; found by name when not given"] = None
    limit: Annotated[int | None, "read at most so many records"] = None
    source: Annotated[
        str | None, "column that says where a record comes from; found by name when not given"
    ] = None

    def __post_init__(self) -> None:
        check_fields(self.size, self.limit)

    def files(self) -> list[Path]:
        """The tables.

        The images that they name may be millions, and are not looked at for changes.
        """
        return list(expand_paths(self.path, "tables", ".parquet"))

    def __call__(self) -> TableSource:
        """Return a source of the rows. Raises UserError if a table is missing."""
        paths = tuple(self.files())
        wrong = [p for p in paths if p.suffix not in SUFFIXES]
        if wrong:
            raise UserError(f"a table must be {', '.join(SUFFIXES)}; got {str(wrong[0])!r}")
        root = expand_home(self.root) if self.root else None
        columns = (self.image, self.caption, self.key, self.source)
        return TableSource(paths, self.size, root, columns, self.limit)


class Columns(NamedTuple):
    """The columns of a table by their contents; empty if there are none."""

    image: str
    caption: str
    id: str
    url: str
    origin: str


@dataclass(eq=False)
class TableSource(RecordStream):
    """Reads tables as it goes: a record a row.

    An id is the id column's, else `IMAGE#ROW`; with several tables their names come first.
    The fields are those of `Table`.
    """

    paths: tuple[Path, ...]
    size: int = 64
    root: Path | None = None
    columns: tuple[str | None, str | None, str | None, str | None] = (None,) * 4
    limit: int | None = None
    _columns: dict[int, Columns] = field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def stems(self) -> tuple[str, ...]:
        """The name of each table in ids."""
        return distinct_stems(self.paths)

    def begin_pass(self) -> ReadReport:
        """Check where the images lie."""
        self.refuse_outside()
        return super().begin_pass()

    def refuse_outside(self) -> None:
        """Raise UserError for a table whose images lie outside the root, by its first rows."""
        for number, path in enumerate(self.paths):
            try:
                image = self.find_columns(number).image
            except UserError:  # it is named when it is its turn
                continue
            refuse_outside(path, self.root, image)

    def find_columns(self, number: int) -> Columns:
        """Find the columns of a table.

        Raises UserError if there are no images, or a column that was named is missing.
        """
        if number not in self._columns:
            path = self.paths[number]
            names = column_names(path)
            image, caption, key, origin = self.columns

            def find(wanted: str | None, candidates: Sequence[str]) -> str:
                if wanted:
                    return find_column(str(path), names, wanted, candidates)
                return match_column(names, candidates)

            columns = Columns(
                image=find_column(str(path), names, image, IMAGE_COLUMNS),
                caption="" if caption == NO_CAPTION else find(caption, CAPTION_COLUMNS),
                id=find(key, ID_COLUMNS),
                url=find(None, ("url",)),
                origin=find(origin, ORIGIN_COLUMNS),
            )
            if not columns.caption and caption != NO_CAPTION:
                self._refuse_sentences(path, [n for n in names if n not in columns])
            self._columns[number] = columns
        return self._columns[number]

    def _refuse_sentences(self, path: Path, names: Sequence[str]) -> None:
        """Raise UserError if one of the other columns seems to hold captions."""
        if column := find_sentences(path, names):
            raise UserError(
                f"{path} has no column {' or '.join(CAPTION_COLUMNS)}; it has: "
                f"{', '.join(names)[:LISTED]}; is caption={column} meant? caption={NO_CAPTION} "
                "reads images alone"
            )

    def units(self) -> list[Unit]:
        """Cut the tables into blocks of rows; a broken one is one unit, read up to the break."""
        self.refuse_outside()
        pieces: list[tuple[str, int, tuple[int, ...]]] = []
        for number, path in enumerate(self.paths):
            try:
                for before, offset, count in cut_blocks(path):
                    if count:
                        pieces.append((str(path), count, (number, before, offset, count)))
            except UserError:
                pieces.append((str(path), 1, (number,)))
        return number_units(pieces)

    def records(self, unit: Unit | None = None) -> Iterator[Record | Skipped]:
        """Iterate over the records of all tables, or of a unit."""
        if unit is None:
            for number in range(len(self.paths)):
                yield from self.read_block(number, ALL_ROWS)
        else:
            number, *place = unit.place
            yield from self.read_block(number, RowBlock(*place) if place else ALL_ROWS)

    def read_block(self, number: int, block: RowBlock) -> Iterator[Record | Skipped]:
        """Iterate over the records of some rows of a table."""
        columns = self.find_columns(number)
        path = self.paths[number]
        for row_number, row in read_rows(path, block, [name for name in columns if name]):
            record = row if isinstance(row, str) else self._make_record(number, row_number, row)
            if isinstance(record, str):
                yield Skipped(str(path), f"row {row_number}", record)
            else:
                yield record

    def _make_record(self, number: int, row_number: int, row: Row) -> Record | str:
        """Make a record of a row, or return why there is none."""
        columns = self.find_columns(number)
        image, name = self._find_image(number, row.get(columns.image))
        if image is None:
            return name
        captions = _read_captions(row.get(columns.caption)) if columns.caption else ()
        if not captions and self.columns[1] != NO_CAPTION and match_column([*row], CAPTION_COLUMNS):
            return "a caption, where the first rows have none"
        if isinstance(captions, str):
            return captions
        key = cell_text(row.get(columns.id)) if columns.id else ""
        if not is_unicode(f"{captions}{key}{name}") or not all(map(is_unicode, captions)):
            return "caption is not UTF-8"
        key = key or self._default_id(number, row_number, name)
        url, origin = (
            text if isinstance(text, str) and is_unicode(text) else ""
            for text in (row.get(name) if name else "" for name in (columns.url, columns.origin))
        )
        if too_long := describe_long_text(key, name, url, origin, *captions):
            return too_long
        return Record(
            image=image,
            ids=(key,) if len(captions) < 2 else tuple(f"{key}#{i}" for i in range(len(captions))),
            captions=captions,
            file=str(self.paths[number]),
            member=name or f"row {row_number}",
            url=url,
            origin=origin,
            shard=number,
            offset=row_number - 1,
            length=len(image) if isinstance(image, bytes) else 0,
        )

    def _default_id(self, number: int, row_number: int, name: str) -> str:
        """The id of a row without an id; name: of its image, empty if it is bytes."""
        key = f"{name or self.stems[number]}#{row_number}"
        return f"{self.stems[number]}/{key}" if len(self.paths) > 1 and name else key

    def _find_image(self, number: int, cell: Any) -> tuple[bytes | Path | None, str]:
        """Return the image of a cell and its path; or None, and the reason."""
        if isinstance(cell, dict):  # Hugging Face's: the file itself, or else where it lies
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, bytes):
            return cell, ""
        if not isinstance(cell, str) or not cell.strip():
            return None, "no image"
        if "://" in cell:
            return None, f"not a local path: {cell[:200]}"
        path = self.image_path(number, cell)
        return (path, cell) if path else (None, f"path leaves the root: {cell[:200]}")

    def image_path(self, shard: int, member: str) -> Path | None:
        """Return where a path that a table names leads; None if that is outside the root."""
        return resolve_inside(self.paths[shard], self.root, member)

    def reader(self, index: RecordIndex) -> TableImages:
        """Read images that are files, or bytes in the tables."""
        return TableImages(self, index.members)


def _read_captions(cell: Any) -> tuple[str, ...] | str:
    """Return the captions of a cell (a text or a list of texts), or why there are none."""
    captions: list[str] = []
    for text in cell if isinstance(cell, list) else [cell]:
        if not isinstance(text, str | bytes | None):
            return f"caption is not text: {type(text).__name__}"
        if (text := cell_text(text)).strip():
            captions.append(text.strip())
    return tuple(captions) or "no caption"


class TableImages(FileImages):
    """The images of a table's records, by table and row.

    An image that is a separate file is found by its name, as in any source. One that is bytes of a
    Parquet column (its place has a length) is found by its row; rows are unpacked in blocks, and
    the last two blocks are kept.
    """

    source: TableSource

    def __init__(self, source: TableSource, members: Sequence[str]) -> None:
        super().__init__(source, members)
        self.lock = threading.Lock()
        self.blocks: deque[tuple[int, dict[int, bytes]]] = deque(maxlen=2)

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Read the image in row `offset` of a table; without a length, of the record `offset`."""
        if not length:
            return super().read(shard, offset, length)
        with self.lock:  # threads that want one block wait for it instead of reading it each
            content = next((b[offset] for s, b in self.blocks if s == shard and offset in b), None)
            # Blocks begin at multiples of their size, or at the row itself if that is too far.
            for first in (offset // parquet.BATCH_ROWS * parquet.BATCH_ROWS, offset):
                if content is None:
                    block = self._read_block(shard, first)
                    self.blocks.append((shard, block))
                    content = block.get(offset)
        if content is None or len(content) != length:
            raise Unreadable("the table was changed since it was indexed")
        return content

    def _read_block(self, shard: int, first: int) -> dict[int, bytes]:
        """Read the images of a row and of those after it, as many as may be held."""
        block: dict[int, bytes] = {}
        nbytes = 0
        for record in self.source.read_block(shard, RowBlock(first, 0, parquet.BATCH_ROWS)):
            if isinstance(record, Record) and isinstance(record.image, bytes):
                block[record.offset] = record.image
                nbytes += len(record.image)
            if nbytes > parquet.MAX_HELD_BYTES:
                break
        return block
