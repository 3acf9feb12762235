"""The content of a run's page (`Page`), and the data that pages read from a run (`RunView`).

The page of a verb is a function `build_page(run) -> Page` in the file of `sections/` with the
verb's name. A verb without such a file gets a page of its metrics.
"""

import functools
import importlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data.files.artefacts import read_facts_lines, read_json
from bezoar.data.files.tensors import read_tensors
from bezoar.data.pairs import Pairs
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure
from bezoar.reports import metric_names
from bezoar.reports.page_parts import Section, Step
from bezoar.runs import inputs
from bezoar.runs.run import Run

SECTIONS = Path(__file__).parent / "sections"


@dataclass(frozen=True)
class Page:
    """The content of a run's page."""

    headline: str  # The finding in one sentence; it is the title of the page
    lead: str = ""  # Further sentences below the headline
    warning: str = ""  # The banner of a poisoned artefact; empty for none
    # Names of the metrics to show first; those that the run lacks are left out
    cards: Sequence[str] = ()
    # For each title a function that makes the section, or returns None if there is nothing to show.
    # They are called when the page is rendered, so that an error in one does not affect the others
    sections: Mapping[str, Callable[[], Section | None]] = field(default_factory=dict)
    # Whether the measured encoder is poisoned: its clean accuracy is then called benign accuracy
    poisoned: bool = False
    lines: Sequence[str] = ()  # Findings that the terminal shows below the sentences, one a line
    look: str = ""  # The colour of the headline: 'bad', 'good', 'warn' or ''
    steps: Sequence[Step] = ()  # What the user may do next


class RunView:
    """A run with all data that a page reads.

    Attributes:
        run: The run.
        manifest: Its manifest.
        measures: Its metrics by name.
        goals: The attacker's goals.
        notes: The notes of its manifest.
        ask: The question, with its inputs resolved.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.manifest = run.manifest
        self.measures: dict[str, Measure] = metric_names.read_measures(run)
        self.goals: list[Goal] = metric_names.read_goals(run)
        self.notes: dict[str, Any] = self.manifest.get("notes", {})
        self.ask: dict[str, Any] = self.manifest.get("ask", {})

    @functools.cached_property
    def data(self) -> inputs.Dataset:
        """The records that the run goes back to, and what is poisoned in them."""
        return inputs.open_dataset(self.run)

    @functools.cached_property
    def test_pairs(self) -> Pairs:
        """The test records that the run was measured on."""
        run = self.run.input_run("test")
        if run is None:
            return inputs.read_pairs(self.test_method)
        return inputs.open_dataset(run).pairs

    @property
    def test_method(self) -> Any:
        """The test data of a run, by default those of its encoder's training data."""
        test = self.ask.get("test")
        if isinstance(test, dict):
            return inputs.recorded_method(test, self.run)
        method = inputs.test_split(inputs.root_method(self.run.input_run("encoder") or self.run))
        if registry.spec(method) != self.notes.get("test"):
            raise UserError("the run was measured on test data that it was not asked for with")
        return method

    @property
    def incomplete(self) -> str:
        """The parts of the question that could not be done, in sentences, or ""."""
        return as_sentences(self.notes.get("incomplete") or ())

    def metric(self, name: str) -> Measure | None:
        """Return a metric by name, the first trigger's if there are several."""
        return metric_names.first_measure(self.measures, name)

    def note_dict(self, name: str) -> dict[str, Any]:
        """Return a note that is an object; empty if the run has no such note."""
        return metric_names.as_dict(self.notes.get(name))

    def input_text(self, name: str) -> str:
        """An input as text for a command: a run's name, its path elsewhere, or the user's text."""
        run = self.run.input_run(name)
        if run is not None:
            is_beside = run.path.parent.resolve() == self.run.path.parent.resolve()
            return run.name if is_beside else shlex.quote(str(run.path))
        typed = as_list(self.manifest.get("typed", {}).get(name))
        return " ".join(shlex.quote(str(word)) for word in typed)

    def command(self, words: str) -> str:
        """A command of bezoar for the directory of this run."""
        runs = self.run.path.parent
        return f"bezoar {words}" + (
            "" if runs.name in ("", "runs") else f" --runs {shlex.quote(str(runs))}"
        )

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the run."""
        return read_json(self.run.file(name))

    def read_tensors(self, name: str) -> dict[str, NDArray[Any]]:
        """Read a safetensors file of the run."""
        return {k: v.numpy() for k, v in read_tensors(self.run.file(name)).items()}

    def read_log(self) -> list[dict[str, float]]:
        """Read the training log, one entry an epoch; empty if there is none."""
        path = self.run.path / "log.jsonl"
        return list(read_facts_lines(path)) if path.exists() else []


def as_list(value: Any) -> list[Any]:
    """The values of an input that may be one, several or none."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def as_sentences(lines: Sequence[str]) -> str:
    """Join lines as sentences with a capital letter and a full stop."""
    return " ".join(f"{line[:1].upper()}{line[1:]}." for line in map(str, lines))


def build_page(run: Run) -> Page:
    """Return the page of a run, by its verb; of metrics alone if that fails on its files."""
    verb = run.verb
    if verb not in {path.stem for path in SECTIONS.glob("[a-z]*.py")}:
        return metrics_page(run)
    try:
        page: Page = importlib.import_module(f"bezoar.reports.sections.{verb}").build_page(run)
    except Exception as problem:
        return metrics_page(run, f"Only figures are shown: {type(problem).__name__}: {problem}")
    return page


def metrics_page(run: Run, lead: str = "") -> Page:
    """Return a page of metrics alone, whose headline states the first three."""
    view = RunView(run)
    phrases = []
    for key, measure in list(view.measures.items())[:3]:
        label, unit = metric_names.label_and_unit(key)
        phrases.append(f"{label} {metric_names.format_value(measure.value, unit)}")
    return Page(
        ", ".join(phrases) or "This run reports no figures.",
        lead,
        cards=list(view.measures)[:6],
        poisoned=bool(view.goals),
    )
