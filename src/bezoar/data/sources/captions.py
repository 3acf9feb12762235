"""A table of image paths and captions: CSV, TSV, JSON Lines or Parquet (open_clip, CleanCLIP)."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from bezoar.data.decoding import Record, gather_pairs
from bezoar.data.files.metadata import is_unicode
from bezoar.data.files.paths import existing_file
from bezoar.data.files.skipped import Skipped
from bezoar.data.files.tables import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    find_column,
    read_rows,
    refuse_outside,
    resolve_inside,
)
from bezoar.data.label_sets import check_fields
from bezoar.data.pairs import Pairs
from bezoar.errors import expand_home
from bezoar.registry import method


@method
class Captions:
    """Rows held in memory; `table` reads the same files as it goes.

    A relative image path starts at the table's folder, and none may leave `root`.
    open_clip's tables (filepath, title, tabs) and CleanCLIP's (image, caption) are known by their
    header. An id is the image's path as the table writes it; further rows of the same image add #1,
    #2 ... to it.
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
        """The table, and the images that it names and that exist."""
        images = [record.image for record in self.records() if isinstance(record, Record)]
        paths = {image for image in images if isinstance(image, Path) and image.is_file()}
        return [expand_home(self.path), *sorted(paths)]

    def __call__(self) -> Pairs:
        """Return the records. Raises UserError if no row can be read."""
        return gather_pairs(self.records(), self.size, self.path, limit=self.limit)

    def records(self) -> Iterator[Record | Skipped]:
        """Iterate over the rows of the table in order, images undecoded."""
        table = existing_file(self.path, "table of captions")
        root = expand_home(self.root) if self.root else None
        image_column = caption_column = ""
        repeats: Counter[str] = Counter()
        for number, row in read_rows(table):
            if isinstance(row, str):
                yield Skipped(self.path, f"row {number}", row)
                continue
            if not image_column:
                image_column = find_column(self.path, row, self.image, IMAGE_COLUMNS)
                caption_column = find_column(self.path, row, self.caption, CAPTION_COLUMNS)
                refuse_outside(table, root, image_column)
            name, caption = row.get(image_column), row.get(caption_column)
            problem = _find_problem(name, caption)
            path = None if problem else resolve_inside(table, root, str(name))
            if path is None:
                reason = problem or f"path leaves the root: {str(name)[:200]}"
                yield Skipped(self.path, f"row {number}", reason)
                continue
            key = f"{name}#{repeats[str(name)]}" if repeats[str(name)] else str(name)
            repeats[str(name)] += 1
            yield Record(
                image=path,
                ids=(key,),
                captions=(str(caption).strip(),),
                file=self.path,
                member=f"row {number}",
            )


def _find_problem(image: Any, caption: Any) -> str:
    """Say why the cells of a row are no record; nothing if they are."""
    if not isinstance(image, str) or not image.strip():
        return "no image"
    if not isinstance(caption, str) or not caption.strip():
        return "no caption"
    if not is_unicode(image + caption):
        return "caption is not UTF-8"
    return ""
