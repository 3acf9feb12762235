"""data.files.skipped"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Unreadable(Exception):
    """One image cannot be used; the text says why. Never leaves this program: it becomes a Skipped."""


class Skipped(NamedTuple):
    """Something that could not be read: the file, the member or row in it ("" = the file itself), and why."""

    file: str
    member: str
    reason: str


@dataclass
class ReadReport:
    """How a source was read: how many records, and everything that was not. Grows while the source streams."""

    read: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    def __str__(self) -> str:
        """One line: `998 read, 2 skipped (1 no caption, 1 not decodable)`."""
        reasons = Counter(s.reason.partition(":")[0] for s in self.skipped)
        why = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        return f"{self.read} read, {len(self.skipped)} skipped" + (f" ({why})" if why else "")

    def merge(self, others: Iterable[ReadReport]) -> ReadReport:
        """The sum of several reports."""
        every = [self, *others]
        return ReadReport(sum(r.read for r in every), [s for r in every for s in r.skipped])
