"""The summary of a run: its finding in one to three sentences, its main figures and files.

It is taken from the page and saved as summary.json, for the command line and notebooks. This module
imports no torch.
"""

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from bezoar.data.files.artefacts import Facts, read_facts
from bezoar.data.files.writing import write_json
from bezoar.errors import UserError

SUMMARY = "summary.json"
MOST_SENTENCES, MOST_FIGURES, MOST_FILES = 3, 6, 6
NUMBERS = ("value", "low", "high")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9“])")

BREAKABLE = str.maketrans({"\u00a0": " ", "\u2060": None})  # no-break space, word joiner


@dataclass(frozen=True)
class Figure:
    """A number that a run is summed up by, as text too: `98.1 % [96.5 – 99.0 %], n = 484`."""

    name: str
    label: str
    value: float
    low: float
    high: float
    n: int
    text: str


@dataclass(frozen=True)
class Summary:
    """A run's finding."""

    finding: str  # one to three sentences
    lines: tuple[str, ...] = ()  # further results, one a line, such as the claims of a paper
    figures: tuple[Figure, ...] = ()  # the most important ones
    files: tuple[str, ...] = ()  # names of the files for the user, within the run's directory


def first_sentences(*texts: str) -> str:
    """The first three sentences of some texts together."""
    sentences = [s for text in texts for s in SENTENCE_END.split(text.strip()) if s]
    return " ".join(sentences[:MOST_SENTENCES])


def write_summary(folder: Path, summary: Summary) -> None:
    """Write summary.json into a run's directory, without the page's no-break marks."""
    raw = dataclasses.asdict(summary)
    raw["finding"] = raw["finding"].translate(BREAKABLE)
    raw["lines"] = [line.translate(BREAKABLE) for line in raw["lines"]]
    for figure in raw["figures"]:
        figure |= {key: figure[key].translate(BREAKABLE) for key in ("label", "text")}
    for figure in raw["figures"]:  # JSON has no infinities; `float` reads these texts
        for key in NUMBERS:
            figure[key] = figure[key] if math.isfinite(figure[key]) else str(figure[key])
    write_json(folder / SUMMARY, raw)


def read_summary(folder: Path) -> Summary | None:
    """Read a run's summary; None if it has none. Raises UserError for another kind of file."""
    path = folder / SUMMARY
    if not path.exists():
        return None
    facts = read_facts(path)
    figures = tuple(_read_figure(figure) for figure in facts.objects("figures"))
    files = [n for n in facts.texts("files") if "/" not in n and os.path.exists(folder / n)]
    return Summary(facts.text("finding"), tuple(facts.texts("lines")), figures, tuple(files))


def _read_figure(facts: Facts) -> Figure:
    try:
        value, low, high = (float(facts[key]) for key in NUMBERS)
        n = int(facts["n"])
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{facts.file}: a figure holds no numbers: {error}") from error
    return Figure(facts.text("name"), facts.text("label"), value, low, high, n, facts.text("text"))
