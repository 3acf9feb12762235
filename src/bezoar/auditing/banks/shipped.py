"""The banks that come with bezoar: of small encoders that it trained itself, clean and attacked."""

from pathlib import Path

from bezoar.auditing.bank import Bank
from bezoar.registry import method


@method
class Shipped:
    """Every JSON file beside this one."""

    def files(self) -> list[Path]:
        """The files that are read."""
        return sorted(Path(__file__).parent.glob("*.json"))

    def __call__(self) -> tuple[Bank, ...]:
        """Read the banks. Raises UserError for a file that is no bank."""
        return tuple(Bank.read(path) for path in self.files())
