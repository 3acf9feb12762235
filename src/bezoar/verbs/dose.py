"""How many poisons would it take? Success against dose for the user's own data and recipe, and the dose for 50 %."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

from bezoar import registry
from bezoar.errors import UserError
from bezoar.runs.execute import Job
from bezoar.runs.verb import Input, Takes
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.poison import Poison
from bezoar.verbs.reproduce import count_trainings, input_spec, table_json
from bezoar.verbs.train import Train


@dataclass(frozen=True)
class Dose:
    """How many poisons your own data and recipe take: success against log dose, fitted, and the dose for 50 %."""

    data: Annotated[Input, Takes("data", positional=True), "data set"]
    poison: Annotated[
        Input, Takes("poison"), "how; its count (of captions, if targeted) is what is varied"
    ] = "backdoor"
    trigger: Annotated[Input, Takes("trigger"), "what is stamped on images; none for targeted"] = (
        "patch"
    )
    target: Annotated[str, "class or word that poisoned images are to be read as"] = ""
    doses: Annotated[
        tuple[int, ...], "numbers of poisons, or of captions a victim; 0 is measured too"
    ] = (10, 30, 100, 300)
    trainings: Annotated[int, "of each dose, with seeds of their own"] = 3
    network: Annotated[Input, Takes("network"), "see `bezoar list network`"] = "clip_small"
    objective: Annotated[
        Input, Takes("objective"), "loss and recipe: see `bezoar list objective`"
    ] = "clip"
    test: Annotated[
        Input, Takes("data"), "test data; without it, the test split of the training data"
    ] = None
    probe: Annotated[
        Input,
        Takes("probe"),
        "what measures success: zero_shot, or retrieval for data without classes",
    ] = "zero_shot"

    def work(self, job: Job) -> dict[str, Any]:
        """-> tables.json; metrics `success@DOSE`, `dose_for_50_percent`, `dose_for_90_percent`."""
        from bezoar.runs import inputs
        from bezoar.runs.sweep import sweep
        from bezoar.runs.tables import Results

        doses = sorted(set(self.doses))
        if len(doses) < 2 or doses[0] < 1 or self.trainings < 1:
            raise UserError(
                f"give at least two doses of 1 and more, and at least one training; got {doses}, {self.trainings}"
            )
        if len(doses) * self.trainings < 3:
            raise UserError(
                f"a law needs at least three readings; {len(doses)} doses by one training are {len(doses)}"
            )
        table = self.table(job.inputs, doses, job.seed)
        results = Results(table, sweep(table.trials, job.settings, job.progress))
        job.child_runs += dict.fromkeys(results.runs.values())
        points = list(results.points())
        inputs.write_json(
            job.folder / "tables.json",
            [{"name": "dose", "scale": "", **table_json(results, points)}],
        )
        law = results.fit_dose_response("success")
        job.notes = {"law": law.describe(table.unit), "trainings": count_trainings(job.child_runs)}
        found = {f"success@{row.name}": m for row, cell, m in points if cell.name == "success"}
        return found | {"dose_for_50_percent": law.x50, "dose_for_90_percent": law.dose(0.9)}

    def table(self, given: dict[str, Any], doses: list[int], seed: int) -> Any:
        """The doses as a table, like those of papers."""
        from bezoar.runs.inputs import test_split
        from bezoar.runs.sweep import Trial
        from bezoar.runs.tables import Cell, Row, Table

        poison, data = given["poison"], input_spec(given["data"])
        test = (
            input_spec(given["test"])
            if given["test"] is not None
            else input_spec(test_split(given["data"]))
        )
        probe, network, objective = (
            registry.spec(given[n]) for n in ("probe", "network", "objective")
        )
        targeted = "victims" in {f.name for f in dataclasses.fields(poison)}
        trigger = None if targeted else input_spec(given["trigger"])

        def measured(how: Any, seed: int, attacked: bool) -> Trial:
            plan = Poison(
                data, registry.spec(how), trigger, self.target, victims=test if targeted else None
            )
            trained = Train(plan if attacked else data, network, objective)
            return Trial(Evaluate(trained, test, (probe,), attack=None if attacked else plan), seed)

        seeds = range(seed, seed + self.trainings)
        rows = []
        for dose in [0, *doses]:
            if targeted:
                trials = [
                    measured(dataclasses.replace(poison, captions=tuple(doses)), s, dose > 0)
                    for s in seeds
                ]
                names = [f"targeted_success@{d}" for d in (doses if dose == 0 else [dose])]
            else:
                trials = [
                    measured(dataclasses.replace(poison, count=dose or doses[0]), s, dose > 0)
                    for s in seeds
                ]
                names = ["attack_success"]
            success = Cell("success", tuple((t, n) for t in trials for n in names))
            rows.append(Row(str(dose), (success,), dose))
        return Table(
            f"{registry.method_name(type(poison))}: success against dose",
            "",
            "captions of one image" if targeted else "poisoned pairs",
            tuple(rows),
            dose_response_cells=("success",),
            unit="captions" if targeted else "poisons",
        )
