"""Runs a paper's tables: published numbers beside ours, with intervals and runs."""

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from bezoar import registry
from bezoar.data.files.paths import existing_file
from bezoar.data.files.writing import write_json
from bezoar.errors import UserError
from bezoar.evaluation import dose_response
from bezoar.evaluation.scores import Measure
from bezoar.runs import sweep
from bezoar.runs.execute import Job
from bezoar.runs.run import Run
from bezoar.runs.table_files import write_table_files
from bezoar.runs.tables import Cell, Claim, Results, Row, TableOptions, is_rate
from bezoar.runs.verb import Input, Settings, Takes, Trial, input_spec

Points = Sequence[tuple[Row, Cell, Measure]]  # every cell of a table with its row and its number


@dataclass(frozen=True)
class Reproduce:
    """A paper's tables beside ours, with n, intervals and the paper's claims judged.

    Runs that are done are not repeated.
    """

    sweeps: ClassVar[bool] = True
    main_files: ClassVar[tuple[str, ...]] = ("tables.csv", "tables.tex", "charts", "tables.json")

    paper: Annotated[
        tuple[Input, ...],
        Takes("paper", positional=True),
        "a paper or some of its tables: see `bezoar list paper`",
    ]
    scale: Annotated[
        Literal["smoke", "small", "gpu", "paper"], "seconds, two cores, one GPU, the paper's own"
    ] = "small"
    data: Annotated[
        Input, Takes("data"), "training data in place of the scale's; scale paper needs them"
    ] = None
    test: Annotated[Input, Takes("data"), "test data in place of the scale's"] = None

    root: Annotated[
        str, "folder that holds the data sets by name: cifar10, gtsrb, svhn, stl10, or NAME.npz"
    ] = ""

    add: Annotated[
        tuple[str, ...],
        "kind and spec of methods of your own (detector, audit, repair, trigger), which get rows "
        "beside the table's: detector ./mine.py",
    ] = ()

    def __post_init__(self) -> None:
        papers = (self.paper,) if isinstance(self.paper, str) else self.paper
        tables: list[Any] = []
        for paper in papers:
            tables += tables_of(paper) if isinstance(paper, str) else [paper]
        object.__setattr__(self, "paper", tuple(tables))

    def planned_trials(self, settings: Settings) -> list[Trial]:
        """The trials of the tables, for an estimate."""
        papers = [registry.make("paper", p) if isinstance(p, str) else p for p in self.paper]
        options = self._options(self.data, self.test, papers)
        return [trial for paper in papers for trial in paper(options).trials]

    def files(self) -> list[Path]:
        """The files of the added methods, so that a changed method is another question."""
        return [existing_file(f, "method") for s in self.add for f in registry.method_files(s)]

    def _options(self, data: Any, test: Any, papers: Sequence[Any]) -> TableOptions:
        """The options of the tables. Raises UserError for a method that a table has no row for."""
        if not papers:
            raise UserError("name a paper or some of its tables: see `bezoar list paper`")
        added = tuple(zip(self.add[::2], self.add[1::2], strict=False))
        if len(self.add) % 2 or any(kind not in registry.KINDS for kind, _ in added):
            raise UserError(
                "--add takes pairs of a kind and a method, such as detector ./mine.py; got "
                f"{' '.join(self.add)}"
            )
        for kind, spec in added:
            registry.allow(spec)  # the user wrote it
            registry.make(kind, spec)
            for paper in papers:
                if kind not in getattr(paper, "takes", ()):
                    raise UserError(
                        f"table {registry.method_name(type(paper))} compares no {kind}s, so --add "
                        f"{kind} has no row in it"
                    )
        return TableOptions(self.scale, input_spec(data), input_spec(test), self.root, added)

    def work(self, job: Job) -> dict[str, Measure]:
        """Run the trials, and write tables.json, tables.csv and tables.tex.

        The metrics are `TABLE.CELL@ROW`, one for every cell.
        """
        papers = job.inputs["paper"]
        options = self._options(job.inputs["data"], job.inputs["test"], papers)
        tables = {registry.method_name(type(paper)): paper(options) for paper in papers}
        trials = [trial for table in tables.values() for trial in table.trials]
        runs = sweep.run_trials(trials, job.settings, job.progress)
        job.child_runs += dict.fromkeys(runs.values())
        written = []
        metrics: dict[str, Measure] = {}
        for name, table in tables.items():
            results = Results(table, runs)
            points = list(results.points())
            for row, cell, measure in points:
                where = f"{row.curve}, {row.name}" if row.curve else row.name
                metrics[f"{name}.{cell.name}@{where}"] = measure
            written.append({"name": name, "scale": self.scale, **table_json(results, points)})
        write_json(job.folder / "tables.json", written)
        write_table_files(job.folder, written)
        verdicts = [claim["verdict"] for table in written for claim in table["claims"]]
        job.notes = {
            "scale": self.scale,
            "tables": list(tables),
            "trainings": count_trainings(runs.values()),
        }
        for verdict in get_args(dose_response.ClaimVerdict):
            job.notes[verdict] = verdicts.count(verdict)
        return metrics


def tables_of(name: str) -> list[str]:
    """The tables of a paper in order, such as those of `carlini2022`.

    The name of a table, or the path of a user's own, means that table alone.
    """
    if not any(n.startswith(f"{name}/") for n in registry.method_names("paper")):
        return [name]
    return [f"{name}/{table}" for table in importlib.import_module(f"bezoar.papers.{name}").TABLES]


def count_trainings(runs: Iterable[Run]) -> int:
    """The number of trainings behind these runs."""
    trainings = [run.ancestor("train") for run in runs]
    return len({training.name for training in trainings if training is not None})


def table_json(results: Results, points: Points) -> dict[str, Any]:
    """A table for tables.json: declaration, measures, fits and judgements."""
    table = results.table
    return {
        "title": table.title,
        "paper": table.paper_finding,
        "axis": table.axis,
        "unit": table.unit,
        "grid": table.grid,
        "notes": list(table.notes),
        "rows": rows_json(results, points),
        "laws": fits_json(results),
        "claims": [claim_json(claim, results) for claim in table.claims],
    }


def rows_json(results: Results, points: Points) -> list[dict[str, Any]]:
    """The rows of a table with their cells."""
    rows: dict[int, dict[str, Any]] = {}
    for row, cell, measure in points:
        facts = rows.setdefault(
            id(row), {"name": row.name, "x": row.x, "curve": row.curve, "cells": []}
        )
        facts["cells"].append(
            {
                "name": cell.name,
                "rate": is_rate(cell),
                "printed": cell.published_value,
                "measure": measure.json(),
                "values": [m.value for m in results.measures(cell)],
                "runs": sorted({results.runs[trial].name for trial, _ in cell.readings}),
            }
        )
    return list(rows.values())


def fits_json(results: Results) -> list[dict[str, Any]]:
    """The dose-response fits of a table, one for each column that is fitted and each curve."""
    fits = []
    for name in results.table.dose_response_cells:
        for curve in results.table.curves:
            fit = results.fit_dose_response(name, curve)
            fits.append(
                {
                    "cell": name,
                    "curve": curve,
                    "units": results.dose_readings(name, curve),
                    "text": fit.describe(results.table.unit),
                    "x50": fit.x50.json(),
                    "x90": fit.dose(0.9).json(),
                }
            )
    return fits


def claim_json(claim: Claim, results: Results) -> dict[str, Any]:
    """A claim of the paper, and how the results judge it."""
    contrast = claim.contrast(results)
    return {
        "text": claim.text,
        "source": claim.source,
        "expected": claim.expected,
        "margin": claim.margin,
        "verdict": dose_response.judge(contrast, claim.expected, claim.margin),
        **contrast.json(),
    }
