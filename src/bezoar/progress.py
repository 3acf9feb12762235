"""Progress with an estimate, on stderr: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

EVERY_SECONDS = 10.0


class Progress:
    """Used as a context; `step(done, total, text)` may be called as often as one likes."""

    def __init__(self, quiet: bool, title: str) -> None:
        self.quiet, self.title = quiet, title
        self.bar: Any = None
        self.task: Any = None
        self.start = self.said = self.began = time.monotonic()
        self.phase = ("", 0)
        self.first = 0  # what was done already when this phase began to be told

    def __enter__(self) -> Progress:
        self.start = self.said = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self.bar = Bar(console=Console(stderr=True), transient=True)
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
        if not self.quiet:
            print(f"{self.title}: {time.monotonic() - self.start:.1f} s", file=sys.stderr)

    def step(self, done: int, total: int, text: str = "") -> None:
        """Say how far the work is, and how long it still takes. Another total is another phase of the work."""
        if self.phase[1] != total or done == 0:
            self.phase, self.began, self.first = (text, total), time.monotonic(), done
        if self.bar is not None:
            if self.task is None or self.bar.tasks[-1].total != total:
                self.task = self.bar.add_task(self.title, total=total)
            self.bar.update(self.task, completed=done, description=f"{self.title} {text}")
        elif not self.quiet and time.monotonic() - self.said > EVERY_SECONDS:
            self.said = time.monotonic()
            pace = (self.said - self.began) / (done - self.first) if done > self.first else 0.0
            left = f", about {pace * (total - done):.0f} s left" if pace else ""
            print(f"{self.title} {text}: {done}/{total}{left}", file=sys.stderr, flush=True)
