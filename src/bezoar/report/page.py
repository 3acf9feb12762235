"""One self-contained page a run."""

from __future__ import annotations

from typing import Any


def write(run: Any) -> None:
    """Write report.html into a run."""
