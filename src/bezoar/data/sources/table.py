"""A table of images and captions, streamed: CSV, TSV, JSON Lines or Parquet (open_clip, img2dataset, Hugging Face)."""

from pathlib import Path
from typing import Annotated

from bezoar.data.decoding import check_fields
from bezoar.data.shards import expand_paths
from bezoar.data.tables import SUFFIXES
from bezoar.data.tables import TableSource as Source
from bezoar.errors import UserError
from bezoar.registry import method


@method
class Table:
    """A row names an image below `root`, or (Parquet) holds its bytes. An id is the id column's, else IMAGE#ROW."""

    path: Annotated[
        str,
        "table, folder of .parquet, glob or brace list: .csv (comma or tab), .tsv, .jsonl, .parquet",
    ]
    size: Annotated[int, "pixels a side: the largest centred square, resized"] = 64
    root: Annotated[str | None, "folder that images must lie in; none: the table's own"] = None
    image: Annotated[str | None, "column of image paths or bytes; found by name when not given"] = (
        None
    )
    caption: Annotated[str | None, "column of captions; found by name when not given"] = None
    key: Annotated[str | None, "column of ids; found by name when not given"] = None
    limit: Annotated[int | None, "read at most so many records"] = None

    def __post_init__(self) -> None:
        check_fields(self.size, self.limit)

    def files(self) -> list[Path]:
        """The tables. The images that they name may be millions, and are not asked for changes."""
        return list(expand_paths(self.path, "tables", ".parquet"))

    def __call__(self) -> Source:
        """-> bezoar.data.tables.Table; `report` says what could not be read. Raises UserError when a table is missing."""
        root = Path(self.root).expanduser() if self.root else None
        wrong = [p for p in self.files() if p.suffix not in SUFFIXES]
        if wrong:
            raise UserError(f"a table must be {', '.join(SUFFIXES)}; got {str(wrong[0])!r}")
        return Source(
            tuple(self.files()), self.size, root, (self.image, self.caption, self.key), self.limit
        )
