"""The banks that come with bezoar: small encoders that it trained itself, clean and attacked."""

from pathlib import Path

from bezoar import registry
from bezoar.auditing.bank import Bank
from bezoar.registry import method


@method
class Shipped:
    """Every JSON file beside this one."""

    def files(self) -> list[Path]:
        """What is read."""
        return sorted((registry.PACKAGE / registry.KINDS["bank"]).glob("*.json"))

    def __call__(self) -> tuple[Bank, ...]:
        """Raises UserError for a file that is no bank."""
        return tuple(map(Bank.read, self.files()))
