"""A table of texts without images: CSV, TSV, JSON Lines, Parquet or Arrow, with a class for each text or none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch

from bezoar.data.files.metadata import is_unicode
from bezoar.data.files.paths import existing_file
from bezoar.data.files.skipped import ReadReport, Skipped
from bezoar.data.files.tables import CAPTION_COLUMNS, Row, find_column, match_column, read_rows
from bezoar.data.pairs import Pairs
from bezoar.errors import UserError, expand_home
from bezoar.registry import method

TEXT_COLUMNS = ("text", "sentence", *CAPTION_COLUMNS)
LABEL_COLUMNS = ("label", "class", "category")
MAX_CLASSES = 1 << 16
MAX_LABEL = 200  # characters


@method
class Texts:
    """Records of texts alone, held in memory. An id is the file's name and the row, from 1.

    Classes are the values of the label column, in alphabetical order. A table of images and captions
    may be read too: its captions are the texts.
    """

    path: Annotated[str, "table: .csv, .tsv, .jsonl, .parquet or .arrow"]
    text: Annotated[str | None, "column of texts; found by name when not given"] = None
    label: Annotated[str | None, "column of classes; found by name when not given"] = None
    limit: Annotated[int | None, "read at most so many records"] = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError("limit must be at least 1")

    def files(self) -> list[Path]:
        """The table."""
        return [expand_home(self.path)]

    def __call__(self) -> Pairs:
        """Return the records. Raises UserError if no row can be read."""
        table = existing_file(self.path, "table of texts")
        report = ReadReport()
        texts: list[str] = []
        ids: list[str] = []
        values: list[str | None] = []
        for number, text, value in self._rows(table, report):
            if self.limit is not None and len(texts) == self.limit:
                break
            texts.append(text)
            ids.append(f"{table.stem}/{number}")
            values.append(value)
        if not texts:
            raise UserError(f"{self.path}: no row holds a text ({report})")
        report.read = len(texts)
        classes = tuple(sorted({value for value in values if value is not None}))
        if len(classes) > MAX_CLASSES:
            raise UserError(f"{self.path}: {len(classes)} classes; there may be {MAX_CLASSES}")
        number_of = {name: i for i, name in enumerate(classes)}
        labels = torch.tensor([number_of[v] if v is not None else -1 for v in values])
        return Pairs.of_texts(texts, ids, labels if classes else None, classes, report)

    def _rows(self, table: Path, report: ReadReport) -> Iterator[tuple[int, str, str | None]]:
        """Number, text and class of each row that has a text; others go into the report."""
        text_column = label_column = ""
        for number, row in read_rows(table):
            if isinstance(row, str):
                report.skipped.append(Skipped(self.path, f"row {number}", row))
                continue
            if not text_column:
                text_column, label_column = self._find_columns(row)
            text = row.get(text_column)
            if not isinstance(text, str) or not text.strip() or not is_unicode(text):
                reason = (
                    "text is not UTF-8" if isinstance(text, str) and text.strip() else "no text"
                )
                report.skipped.append(Skipped(self.path, f"row {number}", reason))
                continue
            label = row.get(label_column)
            value = None if label is None else str(label).strip()[:MAX_LABEL]
            yield number, text.strip(), value if value and is_unicode(value) else None

    def _find_columns(self, row: Row) -> tuple[str, str]:
        """The columns of texts and of classes; "" where there are no classes."""
        text = find_column(self.path, row, self.text, TEXT_COLUMNS)
        if self.label:
            return text, find_column(self.path, row, self.label, ())
        return text, match_column(list(row), LABEL_COLUMNS)
