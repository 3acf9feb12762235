"""A table of image paths and captions: CSV, TSV, JSON Lines or Parquet (open_clip's and CleanCLIP's layouts)."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from bezoar.errors import UserError
from bezoar.pairs import Pairs
from bezoar.reading import TEXT_BYTES, Record, Skipped, check_fields, confined, existing, gather
from bezoar.registry import method

IMAGE = ("filepath", "image", "image_path", "filename", "file_name", "path")  # open_clip's name first
CAPTION = ("title", "caption", "text")
KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
Row = dict[str, Any]


@method
class Captions:
    """A relative image path starts at the table's folder and may not leave it; an absolute one is taken as it is.

    open_clip's tables (filepath, title, tabs) and CleanCLIP's (image, caption) are known by their header. An id is the
    image's path as the table writes it; further rows of the same image add #1, #2 ... to it.
    """

    path: Annotated[str, "table: .csv (comma or tab), .tsv, .jsonl or .parquet"]
    size: Annotated[int, "pixels a side: the largest centred square, resized"] = 64
    image: Annotated[str | None, "column of image paths; found by name when not given"] = None
    caption: Annotated[str | None, "column of captions; found by name when not given"] = None
    limit: Annotated[int | None, "read at most so many records"] = None

    def __post_init__(self) -> None:
        check_fields(self.size, self.limit)

    def files(self) -> list[Path]:
        """The table and the images that it names and that are there."""
        records = [r.image for r in self.records() if isinstance(r, Record)]
        return [Path(self.path).expanduser(), *sorted({p for p in records if isinstance(p, Path) and p.is_file()})]

    def __call__(self) -> Pairs:
        """-> Pairs; `report` names each row that could not be read. Raises UserError when none can."""
        return gather(self.records(), self.size, self.path, limit=self.limit)

    def records(self) -> Iterator[Record | Skipped]:
        """The rows of the table in order, images not opened yet."""
        table = existing(self.path, "table of captions")
        image = caption = ""
        repeats: Counter[str] = Counter()
        for place, row in rows(table, (self.image, self.caption)):
            if isinstance(row, str):
                yield Skipped(self.path, place, row)
                continue
            if not image:
                image = column(self.path, row, self.image, IMAGE)
                caption = column(self.path, row, self.caption, CAPTION)
            where, text = row.get(image), row.get(caption)
            if not isinstance(where, str) or not where.strip():
                yield Skipped(self.path, place, "no image")
            elif not isinstance(text, str) or not text.strip():
                yield Skipped(self.path, place, "no caption")
            elif not readable(where + text):
                yield Skipped(self.path, place, "caption is not UTF-8")
            elif not Path(where).is_absolute() and not confined(where):
                yield Skipped(self.path, place, f"path leaves the table's folder: {where}")
            else:
                key = f"{where}#{repeats[where]}" if repeats[where] else where
                repeats[where] += 1
                yield Record(table.parent / where, (key,), (text.strip(),), -1, self.path, place)


def rows(table: Path, wanted: tuple[str | None, str | None]) -> Iterator[tuple[str, Row | str]]:
    """(`row N`, the row or why it cannot be read), N from 1 after the header. Raises UserError for a broken table."""
    if table.suffix not in KINDS:
        raise UserError(f"a table of captions must be {', '.join(KINDS)}; got {str(table)!r}")
    reader = {".jsonl": json_rows, ".parquet": parquet_rows}.get(table.suffix, csv_rows)
    try:
        for number, row in enumerate(reader(table), start=1):
            yield f"row {number}", row
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{table} cannot be read as {table.suffix[1:]}: {reason}") from error


def csv_rows(table: Path) -> Iterator[Row | str]:
    """Comma or tab, by the header line; bytes that are not UTF-8 become lone surrogates, which `readable` refuses."""
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        tabs = table.suffix == ".tsv" or "\t" in file.readline(TEXT_BYTES)
        file.seek(0)
        reader = csv.DictReader(file, delimiter="\t" if tabs else ",", strict=True)
        try:
            yield from reader
        except csv.Error as error:  # a stray quote would swallow the lines after it
            raise ValueError(f"row after line {reader.line_num}: {error}") from error


def json_rows(table: Path) -> Iterator[Row | str]:
    """One object a line."""
    with table.open("rb") as file:
        while line := file.readline(TEXT_BYTES):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                yield "not JSON in UTF-8"
                continue
            yield row if isinstance(row, dict) else "not a JSON object"


def parquet_rows(table: Path) -> Iterator[Row | str]:
    """Rows of the columns that hold text, a thousand at a time."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(table) as file:
            text = [f.name for f in file.schema_arrow if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
            for batch in file.iter_batches(1000, columns=[n for n in text if n in file.schema_arrow.names]):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error


def column(path: str, row: Row, given: str | None, known: tuple[str, ...]) -> str:
    """The column that was asked for, or the first known one. Raises UserError that lists the table's columns."""
    for name in (given,) if given else known:
        if name in row:
            return name
    raise UserError(f"{path} has no column {given or ' or '.join(known)}; it has: {', '.join(map(str, row))}")


def readable(text: str) -> bool:
    """Whether text is Unicode: no lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)
