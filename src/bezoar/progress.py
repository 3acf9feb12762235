"""Progress with an estimate of the remaining time, on stderr: a bar on a terminal, else lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bar
from rich.progress import TaskID

from bezoar.terminal import clean_line, warn

LONGEST_STEP = 120  # characters of what is worked on
PRINT_EVERY = 10.0  # seconds between lines without a terminal
ProgressReport = Callable[[int, int, str], Any]  # steps done, steps in all, what is being done


def no_report(done: int, total: int, what: object) -> None:
    """A report that does nothing."""


class Progress:
    """The progress of a piece of work, a context manager; it prints nothing if `quiet`.

    `step` may be called as often as is convenient. Every line begins with the title, a verb's name
    say.
    """

    def __init__(self, quiet: bool, title: str) -> None:
        self.quiet = quiet
        self.title = title
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._start = time.monotonic()
        self._last_print = self._start
        # A phase is a stretch of work with one total; the estimate of the time left belongs to it.
        self._phase_start = self._start
        self._phase_total = 0
        self._phase_first = 0  # steps that were done already when the phase began

    def __enter__(self) -> Progress:
        self._start = self._last_print = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        if not self.quiet:
            warn(f"{self.title}: {time.monotonic() - self._start:.1f} s")

    def step(self, done: int, total: int, text: str = "") -> None:
        """Show that `done` of `total` steps are done. Another total, or 0, begins a new phase."""
        if self._phase_total != total or done == 0:
            self._phase_total = total
            self._phase_start = time.monotonic()
            self._phase_first = done
        if self._bar is not None:
            self._update_bar(self._bar, done, total, text)
        elif not self.quiet and time.monotonic() - self._last_print > PRINT_EVERY:
            self._print_line(done, total, text)

    def _update_bar(self, bar: Bar, done: int, total: int, text: str) -> None:
        if self._task is None or bar.tasks[-1].total != total:
            self._task = bar.add_task(self.title, total=total)
        description = escape(f"{self.title} {clean_line(text, LONGEST_STEP)}")
        bar.update(self._task, completed=done, description=description)

    def _print_line(self, done: int, total: int, text: str) -> None:
        self._last_print = time.monotonic()
        left = ""
        if done > self._phase_first:
            pace = (self._last_print - self._phase_start) / (done - self._phase_first)
            left = f", about {pace * (total - done):.0f} s left"
        warn(f"{self.title} {clean_line(text, LONGEST_STEP)}: {done}/{total}{left}")
