"""Prints a run's result: its finding in a few lines, a flat JSON object, or every metric."""

import json
import math
import webbrowser
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bezoar.runs.run import PAGE, Run
from bezoar.runs.summary import Summary
from bezoar.terminal import clean_json, clean_line, print_line, warn

LONGEST_NAME = 160  # characters of a metric
MOST_LINES = 100  # of what is incomplete


def print_ending(run: Run, summary: Summary) -> None:
    """Print a run's finding in a few lines; the last is its directory."""
    print_line(summary.finding)
    for line in summary.lines:
        print_line(f"  {line}")
    width = max((len(figure.label) for figure in summary.figures), default=0)
    for figure in summary.figures:
        print_line(f"  {figure.label.ljust(width)}  {figure.text}")
    if summary.files:
        print_line(f"files: {', '.join(summary.files)}")
    if (run.path / PAGE).exists():
        print_line(f"page: {run.path / PAGE}")
    print_line(run.path)


def summary_json(
    run: Run, summary: Summary, status: int, undecided: Sequence[str]
) -> dict[str, Any]:
    """A run's result as one flat object. Numbers that are not finite are null."""
    manifest = run.manifest
    figures = {
        f.name: {
            "value": _finite(f.value),
            "low": _finite(f.low),
            "high": _finite(f.high),
            "n": f.n,
        }
        for f in summary.figures
    }
    return {
        "run": str(run.path),
        "verb": manifest["verb"],
        "status": manifest["status"],
        "exit": status,
        "verdict": summary.finding,
        "lines": list(summary.lines),
        "figures": figures,
        "files": {name: str(run.path / name) for name in summary.files},
        "page": str(run.path / PAGE) if (run.path / PAGE).exists() else None,
        "could_not_tell": list(undecided),
        "incomplete": manifest["notes"].get("incomplete") or [],
    }


def print_json(content: Any) -> None:
    """Print a manifest, or another JSON value."""
    print(clean_json(json.dumps(content, indent=1, ensure_ascii=False)))


def print_plan(plan: dict[str, Any]) -> None:
    """Print an estimate: how much and how long first, then the question, a line a field."""
    fields = dict(plan)
    verb, records, trainings, minutes = (
        fields.pop(key) for key in ("verb", "records", "trainings", "minutes")
    )
    count = "an unknown number of records" if records is None else f"{records:,} records"
    times = f"{trainings:,} training{'s' * (trainings != 1)}" if trainings else "no training"
    how_long = (
        f", about {max(minutes, 0.1):,.1f} min of training here" if minutes is not None else ""
    )
    print_line(f"{verb}: {count}, {times}{how_long}; nothing is run")
    for name, value in fields.items():
        if value not in (None, "", [], False):
            print_line(
                f"  {name}: {' '.join(map(str, value)) if isinstance(value, list) else value}"
            )


def print_metrics(manifest: dict[str, Any]) -> None:
    """Print a run's metrics with n and 95 % interval."""
    table = Table("metric", "value", "95 % interval", "n", box=None, pad_edge=False)
    for name, measure in manifest["metrics"].items():
        value, low, high = (float(measure[key]) for key in ("value", "low", "high"))
        table.add_row(
            escape(clean_line(name, LONGEST_NAME)),
            f"{value:.4g}",
            f"{low:.4g} .. {high:.4g}",
            str(measure["n"]),
        )
    if table.rows:
        # Wide and unwrapped, because a truncated name of a metric cannot be used.
        Console(soft_wrap=True, width=200).print(table)


def warn_lines(name: str, lines: Sequence[str]) -> None:
    """Print lines on stderr under a command's name, the first hundred of them."""
    for line in lines[:MOST_LINES]:
        warn(f"{name}: {line}")
    if len(lines) > MOST_LINES:
        warn(f"{name}: and {len(lines) - MOST_LINES} more")


def open_page(run: Run) -> None:
    """Open the page of a run in the user's browser."""
    if not webbrowser.open((run.path / PAGE).absolute().as_uri()):
        warn(f"bezoar: no browser could be started; the page is {run.path / PAGE}")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
