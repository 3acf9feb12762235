"""Measures success against the number of poisons for the user's own data and recipe."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from bezoar import registry
from bezoar.data.files.paths import existing_file
from bezoar.data.files.writing import write_json
from bezoar.errors import UserError
from bezoar.evaluation import purchase
from bezoar.evaluation.scores import Measure
from bezoar.runs import inputs, sweep
from bezoar.runs.execute import Job, resolve_inputs
from bezoar.runs.tables import Cell, Results, Row, Table, readings
from bezoar.runs.verb import Input, Settings, Takes, Trial, input_spec
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.poison import Poison
from bezoar.verbs.reproduce import count_trainings, table_json
from bezoar.verbs.train import Train


@dataclass(frozen=True)
class Dose:
    """How many poisons your own data and recipe take: success against log dose, fitted, and the
    dose for 50 %.
    """

    sweeps: ClassVar[bool] = True

    data: Annotated[Input, Takes("data", positional=True), "data set"]
    poison: Annotated[
        Input,
        Takes("poison"),
        "method of poisoning; its count (of captions, if targeted) is varied",
    ] = "backdoor"
    trigger: Annotated[Input, Takes("trigger"), "the trigger; none for targeted"] = "patch"
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
        "measure of success: zero_shot, or retrieval for data without classes",
    ] = "zero_shot"

    domains: Annotated[
        str,
        "table of domains (records, price) or of URLs (captions): what share and sum the doses "
        "take from it",
    ] = ""
    price: Annotated[float, "of a domain whose price the table does not state"] = 10.0

    def files(self) -> list[Path]:
        """The table of domains, part of the question. Raises UserError without it."""
        return [existing_file(self.domains, "table of domains")] if self.domains else []

    def planned_trials(self, settings: Settings) -> list[Trial]:
        """The trials of every dose, for an estimate. Raises UserError for missing inputs."""
        return self.table(resolve_inputs(self, settings)[0], list(self.doses), settings.seed).trials

    def work(self, job: Job) -> dict[str, Measure]:
        """Train at every dose, and fit success against log dose. Writes tables.json."""
        doses = sorted(set(self.doses))
        if len(doses) < 2 or doses[0] < 1 or self.trainings < 1:
            raise UserError(
                f"give at least two doses of 1 and more, and at least one training; got {doses}, "
                f"{self.trainings}"
            )
        if len(doses) * self.trainings < 3:
            raise UserError(
                f"a dose-response fit needs at least three readings; {len(doses)} doses by one "
                f"training are {len(doses)}"
            )
        if not 0 <= self.price <= 1e9:
            raise UserError(f"price must be a number from 0 to 1e9; got {self.price}")
        domains = [purchase.read_domains(f, self.price, self.target) for f in self.files()]
        table = self.table(job.inputs, doses, job.seed)
        runs = sweep.run_trials(table.trials, job.settings, job.progress)
        job.child_runs += dict.fromkeys(runs.values())
        results = Results(table, runs)
        points = list(results.points())
        facts = {"name": "dose", "scale": "", **table_json(results, points)}
        write_json(job.folder / "tables.json", [facts])
        fit = results.fit_dose_response("success")
        job.notes = {
            "law": fit.describe(table.unit),
            "trainings": count_trainings(job.child_runs),
        }
        metrics = {f"success@{row.name}": m for row, cell, m in points if cell.name == "success"}
        metrics |= {"dose_for_50_percent": fit.x50, "dose_for_90_percent": fit.dose(0.9)}
        for of_domains in domains:
            bought = of_domains.measures(fit.x50, "for_50_percent")
            bought |= of_domains.measures(fit.dose(0.9), "for_90_percent")
            job.notes["purchase"] = purchase.describe(bought, "for_50_percent")
            metrics |= bought
        return metrics

    def table(self, job_inputs: Mapping[str, Any], doses: list[int], seed: int) -> Table:
        """The doses as a table, like those of papers: a row for each dose and for dose zero."""
        poison = job_inputs["poison"]
        is_targeted = registry.has_fields(poison, "victims")
        trigger = None if is_targeted else input_spec(job_inputs["trigger"])
        data = input_spec(job_inputs["data"])
        test_method = job_inputs["test"]
        if test_method is None:
            test_method = inputs.test_split(job_inputs["data"])
        test = input_spec(test_method)
        probe, network, objective = (
            registry.spec(job_inputs[name]) for name in ("probe", "network", "objective")
        )

        def trial(configured_poison: Any, seed: int, is_attacked: bool) -> Trial:
            plan = Poison(
                data,
                registry.spec(configured_poison),
                trigger,
                self.target,
                victims=test if is_targeted else None,
            )
            trained = Train(plan if is_attacked else data, network, objective)
            attack = None if is_attacked else plan
            return Trial(Evaluate(trained, test, (probe,), attack=attack), seed)

        rows = []
        for dose in [0, *doses]:
            if is_targeted:  # one training carries victims of every count of captions
                configured = dataclasses.replace(poison, captions=tuple(doses))
                counts = doses if dose == 0 else [dose]
                metrics = [f"targeted_success@{count}" for count in counts]
            else:
                configured = dataclasses.replace(poison, count=dose or doses[0])
                metrics = ["attack_success"]
            seeds = range(seed, seed + self.trainings)
            trials = [trial(configured, s, dose > 0) for s in seeds]
            rows.append(Row(str(dose), (Cell("success", readings(trials, *metrics)),), dose))
        return Table(
            f"{registry.method_name(type(poison))}: success against dose",
            "",
            "captions of one image" if is_targeted else "poisoned pairs",
            tuple(rows),
            dose_response_cells=("success",),
            unit="captions" if is_targeted else "poisons",
        )
