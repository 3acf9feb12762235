"""Banks: JSON files of audits' values, and the methods that read them. The kind `bank`."""

from pathlib import Path
from typing import Protocol

from bezoar.auditing.bank import Bank


class BankSource(Protocol):
    """Where banks are read from."""

    def files(self) -> list[Path]:
        """The files that are read."""

    def __call__(self) -> tuple[Bank, ...]:
        """Read them. Raises UserError for a file that is no bank."""
