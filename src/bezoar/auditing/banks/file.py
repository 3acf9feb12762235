"""A bank of your own: the bank.json that `bezoar calibrate` wrote."""

from pathlib import Path
from typing import Annotated

from bezoar.auditing.bank import Bank
from bezoar.data.files.paths import existing_file
from bezoar.registry import method


@method
class File:
    """One bank."""

    path: Annotated[str, "a bank.json"]

    def files(self) -> list[Path]:
        """The file that is read."""
        return [existing_file(self.path, "bank")]

    def __call__(self) -> tuple[Bank, ...]:
        """Read the bank. Raises UserError for a file that is no bank."""
        return tuple(Bank.read(path) for path in self.files())
