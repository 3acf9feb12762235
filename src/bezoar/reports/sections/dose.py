"""The page of a dose run: success against dose, and how many poisons it takes."""

from __future__ import annotations

from bezoar.reports import metric_names
from bezoar.reports.sections.reproduce import Reproduce


class Dose(Reproduce):
    """One table, without claims."""

    def headline(self) -> str:
        """The law."""
        return str(
            self.notes.get("law", "This sweep was not finished; the same command goes on with it.")
        )

    def more(self) -> str:
        """On how much it stands."""
        return f"From {metric_names.quantity(int(self.notes.get('trainings', 0)), 'training')}."

    def cards(self) -> list[str]:
        """What it takes."""
        return ["dose_for_50_percent", "dose_for_90_percent"]
