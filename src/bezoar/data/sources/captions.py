"""A table of image paths and captions: CSV, TSV, JSON Lines or Parquet (open_clip's and CleanCLIP's layouts)."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from bezoar.data.decoding import Record, check_fields, gather_pairs
from bezoar.data.files.paths import existing_file
from bezoar.data.files.skipped import Skipped
from bezoar.data.pairs import Pairs
from bezoar.data.tables import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    find_column,
    is_unicode,
    read_rows,
    refuse_outside,
    resolve_inside,
)
from bezoar.registry import method


@method
class Captions:
    """Held in memory; `table` reads the same files as it goes. A relative image path starts at the table's folder, and none
    may leave `root`.

    open_clip's tables (filepath, title, tabs) and CleanCLIP's (image, caption) are known by their header. An id is the
    image's path as the table writes it; further rows of the same image add #1, #2 ... to it.
    """

    path: Annotated[str, "table: .csv (comma or tab), .tsv, .jsonl or .parquet"]
    size: Annotated[int, "pixels a side: the largest centred square, resized"] = 64
    image: Annotated[str | None, "column of image paths; found by name when not given"] = None
    caption: Annotated[str | None, "column of captions; found by name when not given"] = None
    limit: Annotated[int | None, "read at most so many records"] = None
    root: Annotated[str | None, "folder that images must lie in; none: the table's own"] = None

    def __post_init__(self) -> None:
        check_fields(self.size, self.limit)

    def files(self) -> list[Path]:
        """The table and the images that it names and that are there."""
        records = [r.image for r in self.records() if isinstance(r, Record)]
        return [
            Path(self.path).expanduser(),
            *sorted({p for p in records if isinstance(p, Path) and p.is_file()}),
        ]

    def __call__(self) -> Pairs:
        """-> Pairs; `report` names each row that could not be read. Raises UserError when none can."""
        return gather_pairs(self.records(), self.size, self.path, limit=self.limit)

    def records(self) -> Iterator[Record | Skipped]:
        """The rows of the table in order, images not opened yet."""
        table = existing_file(self.path, "table of captions")
        root = Path(self.root).expanduser() if self.root else None
        image = caption = ""
        repeats: Counter[str] = Counter()
        for place, row in read_rows(table):
            if isinstance(row, str):
                yield Skipped(self.path, place, row)
                continue
            if not image:
                image = find_column(self.path, row, self.image, IMAGE_COLUMNS)
                caption = find_column(self.path, row, self.caption, CAPTION_COLUMNS)
                refuse_outside(table, root, image)
            where, text = row.get(image), row.get(caption)
            if not isinstance(where, str) or not where.strip():
                yield Skipped(self.path, place, "no image")
            elif not isinstance(text, str) or not text.strip():
                yield Skipped(self.path, place, "no caption")
            elif not is_unicode(where + text):
                yield Skipped(self.path, place, "caption is not UTF-8")
            elif (path := resolve_inside(table, root, where)) is None:
                yield Skipped(self.path, place, f"path leaves the root: {where[:200]}")
            else:
                key = f"{where}#{repeats[where]}" if repeats[where] else where
                repeats[where] += 1
                yield Record(path, (key,), (text.strip(),), -1, self.path, place)
