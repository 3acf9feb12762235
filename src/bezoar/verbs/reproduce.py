"""A paper's tables beside ours: printed number, our number with its interval, the runs that made it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from bezoar import registry
from bezoar.errors import UserError
from bezoar.runs.execute import Job
from bezoar.runs.run import Run
from bezoar.runs.verb import Input, Takes


@dataclass(frozen=True)
class Reproduce:
    """A paper's tables beside ours, with n, intervals and the paper's claims judged. What is done is not done again."""

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

    def __post_init__(self) -> None:
        given = (self.paper,) if isinstance(self.paper, str) else self.paper
        tables = [t for p in given for t in (tables_of(p) if isinstance(p, str) else (p,))]
        object.__setattr__(self, "paper", tuple(tables))

    def work(self, job: Job) -> dict[str, Any]:
        """-> tables.json, and a metric `TABLE.CELL@ROW` for every cell."""
        from bezoar.evaluation import dose_response
        from bezoar.runs import inputs
        from bezoar.runs.sweep import sweep
        from bezoar.runs.tables import Results, TableOptions

        given = job.inputs
        if not given["paper"]:
            raise UserError("name a paper or some of its tables: see `bezoar list paper`")
        asked = TableOptions(
            self.scale, input_spec(given["data"]), input_spec(given["test"]), self.root
        )
        tables = {registry.method_name(type(p)): p(asked) for p in given["paper"]}
        runs = sweep(
            (t for table in tables.values() for t in table.trials), job.settings, job.progress
        )
        job.child_runs += dict.fromkeys(runs.values())
        written, out = [], {}
        for name, table in tables.items():
            results = Results(table, runs)
            points = list(results.points())
            for row, cell, m in points:
                where = f"{row.curve}, {row.name}" if row.curve else row.name
                out[f"{name}.{cell.name}@{where}"] = m
            written.append({"name": name, "scale": self.scale, **table_json(results, points)})
        inputs.write_json(job.folder / "tables.json", written)
        judged = [c["verdict"] for t in written for c in t["claims"]]
        job.notes = {
            "scale": self.scale,
            "tables": list(tables),
            "trainings": count_trainings(runs.values()),
        }
        job.notes |= {
            verdict: judged.count(verdict) for verdict in get_args(dose_response.ClaimVerdict)
        }
        return out


def tables_of(name: str) -> list[str]:
    """`carlini2022` -> its tables, in its own order; a table's name, or the path of a user's own, stays as it is."""
    if not any(n.startswith(f"{name}/") for n in registry.method_names("paper")):
        return [name]
    return [f"{name}/{table}" for table in importlib.import_module(f"bezoar.papers.{name}").TABLES]


def input_spec(given: Any) -> str:
    """Data as text: a run's directory, a spec, or nothing."""
    if given is None:
        return ""
    return str(given.path) if isinstance(given, Run) else registry.spec(given)


def count_trainings(runs: Any) -> int:
    """How many trainings these runs stand on."""
    return len({found.name for run in runs if (found := run.ancestor("train"))})


def table_json(results: Any, points: list) -> dict[str, Any]:
    """A table in JSON, as the page reads it: what was asked, found, fitted and judged."""
    from bezoar.evaluation import dose_response
    from bezoar.runs.tables import is_rate

    table = results.table
    rows: dict[int, dict] = {}
    for row, cell, m in points:
        at = rows.setdefault(
            id(row), {"name": row.name, "x": row.x, "curve": row.curve, "cells": []}
        )
        values = [v.value for v in results.measures(cell)]
        made = sorted({results.runs[t].name for t, _ in cell.readings})
        at["cells"].append(
            {
                "name": cell.name,
                "rate": is_rate(cell),
                "printed": cell.published_value,
                "measure": m.json(),
                "values": values,
                "runs": made,
            }
        )
    fitted = []
    for name in table.dose_response_cells:
        for curve in table.curves:
            found = results.fit_dose_response(name, curve)
            told = {
                "text": found.describe(table.unit),
                "x50": found.x50.json(),
                "x90": found.dose(0.9).json(),
            }
            fitted.append(
                {"cell": name, "curve": curve, "units": results.dose_readings(name, curve), **told}
            )
    claims = []
    for claim in table.claims:
        contrast = claim.contrast(results)
        verdict = dose_response.judge(contrast, claim.expected, claim.margin)
        stated = {
            "text": claim.text,
            "source": claim.source,
            "expected": claim.expected,
            "margin": claim.margin,
        }
        claims.append({**stated, "verdict": verdict, **contrast.json()})
    asked = {
        "title": table.title,
        "paper": table.paper_finding,
        "axis": table.axis,
        "unit": table.unit,
        "grid": table.grid,
    }
    asked["notes"] = list(table.notes)
    return {**asked, "rows": list(rows.values()), "laws": fitted, "claims": claims}
