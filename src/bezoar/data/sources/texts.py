"""A table of texts without images, perhaps with classes: CSV, TSV, JSON Lines, Parquet or Arrow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch

from bezoar.data.files.metadata import is_unicode
from bezoar.data.files.paths import existing_file
from bezoar.data.files.skipped import ReadReport, Skipped
from bezoar.data.files.tables import (
    CAPTION_COLUMNS,
    cell_text,
    column_names,
    find_column,
    match_column,
    read_rows,
)
from bezoar.data.pairs import Pairs
from bezoar.errors import UserError, expand_home
from bezoar.registry import method

TEXT_COLUMNS = ("text", "sentence", *CAPTION_COLUMNS)
LABEL_COLUMNS = ("label", "class", "category")
MAX_CLASSES = 1 << 16
MAX_LABEL = 200  # characters


@method
class Texts:
    """Records of texts, held in memory. An id is the file's name and the row, from 1.

    Classes are the values of the label column, in alphabetical order. In a table of images and
    captions the captions are the texts.
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
        names = column_names(table)
        text_column = find_column(self.path, names, self.text, TEXT_COLUMNS)
        label_column = match_column(names, LABEL_COLUMNS)
        if self.label:
            label_column = find_column(self.path, names, self.label, ())
        for number, row in read_rows(table, columns=[text_column, *filter(None, [label_column])]):
            cell = row if isinstance(row, str) else row.get(text_column)
            text = cell_text(cell).strip() if isinstance(cell, str | bytes) else ""
            if isinstance(row, str) or not text or not is_unicode(text):
                reason = row if isinstance(row, str) else "text is not UTF-8" if text else "no text"
                report.leave_out(Skipped(self.path, f"row {number}", reason))
                continue
            label = cell_text(row.get(label_column)) if label_column else ""
            value = label.strip()[:MAX_LABEL]
            yield number, text, value if value and is_unicode(value) else None
