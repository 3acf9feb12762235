"""The exception for a record that cannot be read, and the report that lists such records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NAMED = 1 << 14  # records that a report names; it counts all
LISTED = 1000  # of them, how many stand in a manifest


class Unreadable(Exception):
    """One image cannot be used; the message says why. It becomes a `Skipped`."""


class Skipped(NamedTuple):
    """Something that could not be read."""

    file: str
    member: str  # the member or row in it; empty for the file itself
    reason: str  # why, with details after a colon


@dataclass
class ReadReport:
    """How many records were read, and what was not; it grows while a source is read."""

    read: int = 0  # how many records
    skipped: list[Skipped] = field(default_factory=list)  # the first of what was not read
    # the first records that were read under another id than their own, which another has
    renamed: list[Skipped] = field(default_factory=list)
    # how often each reason stands among all that was not read, its details left out
    reasons: Counter[str] = field(default_factory=Counter)
    doubles: int = 0  # how many records were renamed

    def leave_out(self, skipped: Skipped) -> None:
        """Take down what was not read."""
        self.reasons[skipped.reason.partition(":")[0]] += 1
        if len(self.skipped) < NAMED:
            self.skipped.append(skipped)

    def rename(self, renamed: Skipped) -> None:
        """Take down a record that was read under another id."""
        self.doubles += 1
        if len(self.renamed) < NAMED:
            self.renamed.append(renamed)

    def __str__(self) -> str:
        """Summarise in one line: `998 read, 2 skipped (1 no caption, 1 not decodable)`."""
        counts = ", ".join(f"{n} {reason}" for reason, n in self.reasons.most_common())
        text = f"{self.read} read, {self.reasons.total()} skipped" + f" ({counts})" * bool(counts)
        if self.doubles:
            text += f", {self.doubles} under another id, since theirs is repeated"
        return text

    def notes(self) -> dict[str, Any]:
        """For a manifest: how many records were read, and the first of what was not."""
        notes: dict[str, Any] = {
            "read": self.read,
            "skipped": list(map(list, self.skipped[:LISTED])),
        }
        if self.doubles:
            notes["renamed"] = self.doubles
        return notes

    def merge(self, others: Iterable[ReadReport]) -> ReadReport:
        """Return the sum of this report and others."""
        reports = [self, *others]
        return ReadReport(
            sum(r.read for r in reports),
            [s for r in reports for s in r.skipped][:NAMED],
            [s for r in reports for s in r.renamed][:NAMED],
            sum((r.reasons for r in reports), Counter()),
            sum(r.doubles for r in reports),
        )
