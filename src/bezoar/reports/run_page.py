"""Story: what a page tells of one run. A verb with more to tell has a class of its own in `sections/`, named like it."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.evaluation.scores import Measure
from bezoar.reports import metric_names
from bezoar.reports.page_parts import Section
from bezoar.runs import inputs
from bezoar.runs.run import Run

SECTIONS = Path(__file__).parent / "sections"
Chapter = Callable[[], Section | None]


class Story:
    """Any run: its metrics alone. `chapters` are made one by one; None stands for nothing to tell."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.manifest = run.manifest
        self.measures: dict[str, Measure] = metric_names.read_measures(run)
        self.goals: list[Goal] = metric_names.read_goals(run)
        self.notes = metric_names.as_dict(self.manifest.get("notes"))
        self.ask = metric_names.as_dict(self.manifest.get("ask"))

    @functools.cached_property
    def data(self) -> inputs.Dataset:
        """The records that the run goes back to, and what is poisoned in them."""
        return inputs.open_dataset(self.run)

    @property
    def attacked(self) -> bool:
        """Whether the artefact of this run is a poisoned one."""
        return bool(self.goals)

    def warning(self) -> str:
        """The banner of a poisoned artefact, or nothing."""
        return ""

    def headline(self) -> str:
        """What happened, in a sentence with numbers."""
        shown = [
            f"{metric_names.label_and_unit(k)[0]} {metric_names.format_value(m.value, metric_names.label_and_unit(k)[1])}"
            for k, m in self.measures.items()
        ]
        return ", ".join(shown[:3]) or "This run reports no figures."

    def more(self) -> str:
        """What else is to be said first, in smaller type."""
        return ""

    def undone(self) -> str:
        """What was asked and could not be done, in sentences; nothing where everything was."""
        return " ".join(
            f"{line[:1].upper()}{line[1:]}."
            for line in map(str, self.notes.get("incomplete") or ())
        )

    def cards(self) -> list[str]:
        """Names of the key figures."""
        return list(self.measures)[:6]

    def chapters(self) -> list[Chapter]:
        """What comes after the key figures, in order."""
        return []

    def metric(self, name: str) -> Measure | None:
        """A metric by name; of several triggers, the first one's."""
        return metric_names.first_measure(self.measures, name)

    def input(self, name: str) -> Run | None:
        """The run that was given as an input, if it was a run."""
        asked = self.ask.get(name)
        return (
            self.run.sibling(asked["run"]) if isinstance(asked, dict) and "run" in asked else None
        )

    @functools.cached_property
    def tested(self) -> Pairs:
        """The test data, of a run or a spec, as they were measured on."""
        run = self.input("test")
        return (
            inputs.read_pairs(registry.make("data", self.notes["test"]))
            if run is None
            else inputs.open_dataset(run).pairs
        )

    def json(self, name: str) -> Any:
        """A JSON file of the run."""
        return json.loads(self.run.file(name).read_text(encoding="utf-8"))

    def tensors(self, name: str) -> dict[str, Any]:
        """A safetensors file of the run, as arrays."""
        from safetensors.numpy import load_file

        return load_file(self.run.file(name))


def tell(run: Run) -> Story:
    """The story of a run, by its verb."""
    verb = run.verb
    if verb not in {p.stem for p in SECTIONS.glob("[a-z]*.py")}:
        return Story(run)
    return getattr(importlib.import_module(f"bezoar.reports.sections.{verb}"), verb.title())(run)
