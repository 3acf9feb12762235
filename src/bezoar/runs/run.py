"""A run: a directory that answers one question. Reads its manifest, and finds its parents.

The directory's name is the verb and a hash of the whole question (`ask` in the manifest), so that
the same question has one answer on disk.
"""

from __future__ import annotations

import glob
import html
import importlib.util
import os
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from bezoar.data.files import parquet
from bezoar.data.files.artefacts import Facts, read_facts, shown
from bezoar.errors import UserError, describe_neighbours, suggest
from bezoar.runs.summary import SUMMARY, Summary, read_summary
from bezoar.terminal import clean_line

if TYPE_CHECKING:
    from bezoar.evaluation.scores import Measure

SCHEMA = 1
MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint.safetensors"
PAGE = "report.html"
# Files and folders of a run that its manifest does not list as outputs.
UNHASHED = {MANIFEST, CHECKPOINT, PAGE, SUMMARY, "charts", "log.jsonl", ".lock", "vectors"}
MAX_LINEAGE = 10_000  # runs that a run may be made from
MEASURE = {"value": 0, "n": 0, "low": 0, "high": 0, "how": ""}.keys()  # of a metric
NOT_FINITE = ("Infinity", "-Infinity", "NaN")  # as metrics hold them
MAX_NAMES = 6  # names of runs in an error message


@dataclass(frozen=True)
class Run:
    """A finished or unfinished run on disk."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def name(self) -> str:
        """The directory's name: the verb and a hash."""
        return self.path.name

    @property
    def manifest(self) -> Facts:
        """The manifest on disk, with checked types. Raises UserError if there is none."""
        try:
            manifest = read_facts(self.path / MANIFEST)
        except UserError as error:
            message = f"{self.path} is not a run directory: no readable {MANIFEST} in it: {error}"
            raise UserError(message) from error
        if manifest.get("schema") != SCHEMA or "verb" not in manifest:
            raise UserError(f"{self.path}/{MANIFEST} is not of schema {SCHEMA}")
        check_manifest(manifest)
        return manifest

    @property
    def verb(self) -> str:
        """The name of the verb that made the run."""
        return str(self.manifest["verb"])

    @property
    def is_done(self) -> bool:
        """Whether the run exists and is finished."""
        return (self.path / MANIFEST).exists() and self.manifest["status"] == "done"

    def file(self, name: str) -> Path:
        """The path of one of the run's files. Raises UserError if it does not exist."""
        path = self.path / name
        if not path.exists():
            raise UserError(f"run {self.name} holds no {name} (status: {self.manifest['status']})")
        return path

    def metric(self, name: str) -> Measure:
        """A metric by name. For an unknown name, raises UserError, which lists the names."""
        # Imported here so that `bezoar show` and `bezoar list` do without torch.
        from bezoar.evaluation.scores import Measure

        metrics = self.manifest["metrics"]
        if name not in metrics:
            names = ", ".join(sorted(metrics)) or "none"
            raise UserError(f"run {self.name} has no metric {name!r}; it has: {names}")
        return Measure(**metrics[name])

    @property
    def metrics(self) -> dict[str, Measure]:
        """Every metric by name."""
        return {name: self.metric(name) for name in self.manifest["metrics"]}

    @property
    def summary(self) -> Summary:
        """The run's finding, from its page. Raises UserError if it has no page."""
        summary = read_summary(self.path)
        if summary is None:
            raise UserError(
                f"run {self.name} has no page yet (status: {self.manifest['status']}); "
                f"`bezoar show {self.name}` makes the page of a run that is done"
            )
        return summary

    @property
    def verdict(self) -> str:
        """The run's finding, in one to three sentences; see `summary`."""
        return self.summary.finding

    def table(self, name: str) -> Any:
        """A Parquet table of the run, such as `scores`: a pandas DataFrame if pandas is installed.

        Without pandas it is an Arrow table. For an unknown name, raises UserError, which lists the
        names.
        """
        names = sorted(path.stem for path in self.path.glob("*.parquet"))
        if name.removesuffix(".parquet") not in names:
            raise UserError(
                f"run {self.name} has no table {name!r}; it has: {', '.join(names) or 'none'}"
            )
        path = self.path / f"{name.removesuffix('.parquet')}.parquet"
        columns = parquet.read_header(path).names
        batches = list(parquet.read_batches(path, columns))
        table = (
            pa.Table.from_batches(batches) if batches else pa.table({key: [] for key in columns})
        )
        return table.to_pandas() if importlib.util.find_spec("pandas") else table

    def open(self) -> None:
        """Open the run's page in the browser. Raises UserError if it has none."""
        webbrowser.open(self.file(PAGE).absolute().as_uri())

    def _repr_html_(self) -> str:
        """The run in a notebook: name, finding, figures, a link to the page."""
        try:
            summary = self.summary
        except UserError as error:
            return f"<p>{_escape(str(error))}</p>"
        rows = "".join(
            f"<tr><td>{_escape(figure.label)}</td><td>{_escape(figure.text)}</td></tr>"
            for figure in summary.figures
        )
        href = html.escape((self.path / PAGE).absolute().as_uri())
        return (
            f"<p><b>{_escape(self.name)}</b>: {_escape(summary.finding)}</p>"
            f"<table>{rows}</table><p><a href='{href}'>page</a></p>"
        )

    @property
    def parents(self) -> list[Run]:
        """The runs that this one was made from."""
        return [self.sibling(name) for name in self.manifest.texts("parents")]

    def lineage(self, through: Callable[[Run], bool] = lambda run: True) -> Iterator[Run]:
        """This run and its ancestors, each once, depth first.

        Args:
            through: whether to go on to the parents of a run.

        Raises UserError if a parent is missing, or there are absurdly many.
        """
        pending, seen = [self], set()
        while pending:
            run = pending.pop()
            if run.path in seen:
                continue
            seen.add(run.path)
            if len(seen) > MAX_LINEAGE:
                raise UserError(f"run {self.name} was made from more than {MAX_LINEAGE} runs")
            yield run
            if through(run):
                pending += reversed(run.parents)

    def sibling(self, name: str) -> Run:
        """A run by name: in the same directory, or where the manifest says that this parent lies.

        Raises UserError for a text that names no directory.
        """
        if name in ("", ".", "..") or set(name) & {"/", "\0"} or len(name) > 255:
            raise UserError(f"run {self.name} names {shown(name)} as a run; expected a name")
        path = self.path.parent / name
        if path.exists():
            return Run(path)
        return Run(Path(self.manifest.get("elsewhere", {}).get(name, path)))

    def input_run(self, field: str) -> Run | None:
        """The run that is the value of a verb's field; None if the value is no run."""
        value = self.manifest.get("ask", {}).get(field)
        return self.sibling(value["run"]) if isinstance(value, dict) and "run" in value else None

    def asked_for(self, field: str) -> Facts | None:
        """The manifest's entry for an input: a run, or a spec with hashes of its files; or None.

        Raises UserError for anything else.
        """
        ask = self.manifest["ask"]
        return None if ask.get(field) is None else ask.object(field)

    def ancestor(self, verb: str) -> Run | None:
        """This run if the verb made it, else the first such ancestor, depth first."""
        return next((run for run in self.lineage() if run.verb == verb), None)


def follow(run: Run, step: Callable[[Run], Run | None]) -> Iterator[Run]:
    """A run, the run that `step` returns for it, and so on. Raises UserError for a cycle."""
    seen: set[Path] = set()
    current: Run | None = run
    while current is not None:
        if current.path in seen:
            raise UserError(f"run {current.name} is made from itself")
        seen.add(current.path)
        yield current
        current = step(current)


def check_manifest(manifest: Facts) -> None:
    """Raise UserError where a part of a manifest is of another type than it is written as."""
    for key in ("verb", "status", "bezoar", "started"):
        if key in manifest:
            manifest.text(key)
    for key in ("ask", "metrics", "notes", "typed", "elsewhere", "environment", "outputs"):
        if key in manifest:
            manifest.object(key)
    for key, kind in (("error", str), ("seconds", int | float), ("peak_memory_bytes", int)):
        if not isinstance(manifest.get(key), kind | None):
            raise UserError(f"{manifest.file}: {key} is {shown(manifest[key])}")
    if "parents" in manifest and len(manifest.texts("parents")) > MAX_LINEAGE:
        raise UserError(f"{manifest.file}: more than {MAX_LINEAGE} parents")
    if "goal" in manifest:
        manifest.objects("goal")
    for name in manifest.get("elsewhere", {}):
        manifest.object("elsewhere").text(name)
    for name in manifest.get("outputs", {}):
        output = manifest.object("outputs").object(name)
        if type(output["bytes"]) is not int:
            raise UserError(f"{manifest.file}: output {name!r} has no size")
        output.text("sha256")
    for name in manifest.get("metrics", {}):
        _check_measure(manifest.object("metrics").object(name), name)
    for value in manifest.get("ask", {}).values():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Facts):
                part.text("run" if "run" in part else "spec")
                if "files" in part:
                    part.text("files")
    notes = manifest.get("notes", {})
    for key in notes.keys() & {"verdict"}:
        notes.text(key)
    if notes.get("incomplete"):
        notes.texts("incomplete")


def _check_measure(measure: Facts, name: str) -> None:
    """Raise UserError for a metric without a number, an interval, n and a definition."""
    if measure.keys() != MEASURE or type(measure["n"]) is not int:
        raise UserError(f"{measure.file}: metric {name!r} is not an object of {', '.join(MEASURE)}")
    measure.text("how")
    for key in ("value", "low", "high"):
        value = measure[key]
        if type(value) not in (int, float) and value not in NOT_FINITE:
            raise UserError(
                f"{measure.file}: {key} of metric {name!r} is {shown(value)}, no number"
            )


def find_run(runs: Path, text: str) -> Run | None:
    """Find a run by its directory, or by the start of its name.

    The start of a name means no run where a file or folder has this very name: a folder `train` is
    the user's data, whatever runs begin so.

    Args:
        runs: the directory in which names are looked up.
        text: the user's text; `last` is the newest run.

    Returns:
        The run; None if there is none.

    Raises:
        UserError: if several runs have names with this start.
    """
    path = Path(text)
    if os.path.isfile(path / MANIFEST):  # Path.is_file raises for a text that no name can be
        return Run(path)
    if not text or "/" in text or ":" in text:
        return None
    if text == "last":
        return next(iter(newest_runs(runs)), None)
    if os.path.isfile(runs / text / MANIFEST):
        return Run(runs / text)
    if os.path.lexists(text):
        return None
    matches = sorted(p.parent for p in runs.glob(f"{glob.escape(text)}*/{MANIFEST}"))
    if len(matches) > 1:
        names = ", ".join(p.name for p in matches[:4])
        raise UserError(f"{text!r} begins the names of {len(matches)} runs: {names}")
    return Run(matches[0]) if matches else None


def get_run(runs: Path, text: str, holds: str = "") -> Run:
    """Find a run as `find_run` does.

    If there is none, raises UserError, which lists the newest runs; with `holds`, only finished
    runs with a file of this name.
    """
    if run := find_run(runs, text):
        return run
    others = newest_runs(runs)
    if holds:
        others = [run for run in others if (run.path / holds).exists() and _ended_well(run)]
    names = [run.name for run in others]
    listed = ", ".join(names[:MAX_NAMES]) or "none"
    more = f", ... ({len(names)})" if len(names) > MAX_NAMES else ""
    file = ", and no file or folder of that name" if holds else ""
    hint = suggest(text, [*names, *os.listdir()] if holds else names)
    if "/" in text:
        hint = describe_neighbours(text)
    raise UserError(f"no run {text!r} in {runs}{file}{hint}; runs there are: {listed}{more}")


def newest_runs(runs: Path) -> list[Run]:
    """All runs in a directory, the newest first."""
    manifests = sorted(runs.glob(f"*/{MANIFEST}"), key=lambda p: p.stat().st_mtime, reverse=True)
    return [Run(path.parent) for path in manifests]


def _ended_well(run: Run) -> bool:
    try:
        return run.is_done
    except UserError:
        return False


def _escape(text: str) -> str:
    """A text from a file, as a notebook shows it."""
    return html.escape(clean_line(text))
