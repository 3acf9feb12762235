"""Collects what a verb read, and which records it left out.

Every verb loads records by `inputs.load_records`, which calls `note_records`. `execute` collects
these notes while a verb works, and writes them into the run's manifest.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from bezoar.data.files.skipped import ReadReport
from bezoar.runs.run import Run

Reports = dict[str, ReadReport]  # by the spec of the data
_reports: ContextVar[Reports | None] = ContextVar("reports", default=None)


@contextmanager
def collect_reports() -> Iterator[Reports]:
    """Collect how records are read inside; a verb that another one runs has a collection itself."""
    reports: Reports = {}
    token = _reports.set(reports)
    try:
        yield reports
    finally:
        _reports.reset(token)


def note_records(spec: str, report: ReadReport | None) -> None:
    """Note how the records of a data set were read, if a verb is at work."""
    reports = _reports.get()
    if reports is not None and report is not None:
        reports[spec] = report


def incomplete_notes(
    reports: Reports, notes: Mapping[str, Any], children: Sequence[Run]
) -> dict[str, Any]:
    """Notes of a run that left records out: `incomplete`, and `reading` if the verb wrote none.

    Args:
        reports: reports on the data that the verb loaded.
        notes: the verb's own notes. A verb that counts `unread` records reports them itself,
            because its children read the same records.
        children: runs that the verb has run; their omissions count too.

    Returns:
        Notes to add; empty if no record was left out.
    """
    lines: list[str] = list(notes.get("incomplete") or [])
    skipping = {spec: report for spec, report in reports.items() if report.skipped}
    additions: dict[str, Any] = {}
    if "unread" not in (notes.get("reading") or {}):
        lines += [f"{spec}: {describe_report(report)}" for spec, report in skipping.items()]
        lines += [
            f"{spec}: {r.doubles} records have an id that another has, and another name here"
            for spec, r in reports.items()
            if r.renamed
        ]
        if skipping and "reading" not in notes:
            first, *others = reports.values()
            additions["reading"] = first.merge(others).notes()
        for child in children:
            lines += (child.manifest.get("notes") or {}).get("incomplete") or []
    lines = list(dict.fromkeys(lines))
    return additions | {"incomplete": lines} if lines else {}


def describe_report(report: ReadReport) -> str:
    """Return how many records or files were left out, in a line with the first of them."""
    first = report.skipped[0]
    total = report.reasons.total()
    count = f"{total} records or files were left out, beside {report.read} that were read"
    _, _, reasons = str(report).partition("skipped ")
    place = f"{first.file} {first.member}".strip()
    return f"{count} {reasons}; the first: {place}: {first.reason}".replace("  ", " ")
