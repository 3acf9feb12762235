"""The exception for a record that cannot be read, and the report that lists such records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Unreadable(Exception):
    """One image cannot be used; the message says why.

    It becomes a `Skipped` and never leaves the program.
    """


class Skipped(NamedTuple):
    """Something that could not be read.

    Attributes:
        file: the file.
        member: the member or row in it; empty for the file itself.
        reason: why, with details after a colon.
    """

    file: str
    member: str
    reason: str


@dataclass
class ReadReport:
    """How many records were read, and everything that was not; it grows while a source is read.

    Attributes:
        read: how many records.
        skipped: what was not read.
        renamed: records that were read, under another id than their own, which another has.
    """

    read: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    renamed: list[Skipped] = field(default_factory=list)

    def __str__(self) -> str:
        """Summarise in one line: `998 read, 2 skipped (1 no caption, 1 not decodable)`."""
        reasons = Counter(s.reason.partition(":")[0] for s in self.skipped)
        counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        text = f"{self.read} read, {len(self.skipped)} skipped" + (f" ({counts})" if counts else "")
        if self.renamed:
            text += f", {len(self.renamed)} under another id, since theirs is repeated"
        return text

    def merge(self, others: Iterable[ReadReport]) -> ReadReport:
        """Return the sum of this report and others."""
        reports = [self, *others]
        return ReadReport(
            sum(r.read for r in reports),
            [s for r in reports for s in r.skipped],
            [s for r in reports for s in r.renamed],
        )
