"""The section of a scan's page on the sources of its records."""

import itertools
from typing import Any

from bezoar.data.files.tables import read_rows
from bezoar.detection.source_pooling import FILE
from bezoar.reports.page_parts import Line, Section, Table
from bezoar.reports.pictures import shorten
from bezoar.runs.run import Run

SHOWN = 20  # sources
STANDS_OUT = "stands out"  # the verdict that is one
HEAD = (
    "Source", "Records", "Verdict", "False discovery rate", "Raised", "Ranking",
    "Pooled", "In its worst tenth", "Nats a record", "Words",
)  # fmt: skip
LEAD = (
    "Records of one source are tested together, all of them and those with one kind of caption, "
    "against records of the same content from other sources. Who controls a source, such as a "
    "bought domain, controls all of its records."
)
NOTE = (
    "Nats a record: the mean of -log of the share of records that are at least as suspicious, with "
    "its 95 % interval; 1 where nothing is suspicious. All sources stand in sources.csv."
)


def source_section(run: Run, notes: dict[str, Any]) -> Section | None:
    """Show the sources with findings, most suspicious first; None without sources."""
    path = run.path / FILE
    if not path.exists():
        return None
    lines = (row for _, row in read_rows(path) if isinstance(row, dict) and row.get("verdict"))
    rows = [
        _format_row({name: shorten(str(value or ""), 60) for name, value in row.items()})
        for row in itertools.islice(lines, SHOWN)
    ]
    lead = f"{notes.get('sentence') or ''}. {LEAD}".lstrip(". ")
    if not rows:
        return Section([], f"{lead} All sources stand in `{FILE}`.")
    return Section([Table(HEAD, rows, (1, 3, 4, 6, 7, 8), NOTE)], lead)


def _format_row(cells: dict[str, str]) -> list[str | Line]:
    """The cells of a line of sources.csv as the page shows them."""

    def cell(name: str) -> str:
        return cells.get(name, "")

    nats = f"{cell('nats')} [{cell('low')}, {cell('high')}]"
    return [
        cell("source"),
        cell("records"),
        Line(cell("verdict") or "–", "bad" if cell("verdict") == STANDS_OUT else ""),
        cell("q"),
        cell("raised"),
        cell("ranking"),
        cell("pooled"),
        cell("worst_tenth"),
        nats,
        cell("words"),
    ]
