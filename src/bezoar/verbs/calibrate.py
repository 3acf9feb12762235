"""Make a bank: what audits say of encoders known to be clean, and of attacked ones."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from bezoar import registry
from bezoar.errors import UserError
from bezoar.runs.execute import Job
from bezoar.runs.run import Run
from bezoar.runs.verb import Input, Takes
from bezoar.verbs.audit import VERDICT_FILE, audit_spec, single_audit
from bezoar.verbs.reproduce import input_spec
from bezoar.verbs.train import Train

if TYPE_CHECKING:
    from bezoar.auditing.bank import Calibration
    from bezoar.evaluation.scores import Measure
    from bezoar.runs.sweep import Trial


@dataclass(frozen=True)
class Calibrate:
    """Audit encoders known to be clean, given or trained here, and perhaps attacked ones; `bezoar audit --bank` reads it.

    Every training and every audit is a run of its own: a calibration that was cut off goes on with what is missing, and
    one with more encoders audits those alone.
    """

    encoder: Annotated[
        tuple[Input, ...],
        Takes("encoder", positional=True),
        "encoders known to be clean, all of one kind",
    ] = ()
    data: Annotated[
        Input, Takes("data"), "clean images; without them, the test split of the training data"
    ] = None
    audit: Annotated[
        tuple[Input, ...],
        Takes("audit"),
        "see `bezoar list audit`; a parent adds the audit `parent`",
    ] = (
        "whitening",
        "whole_image",
        "decree",
        "cleanse",
    )
    attacked: Annotated[
        tuple[Input, ...],
        Takes("run"),
        "attacked ones of that kind: train, inject or evaluate runs",
    ] = ()
    train: Annotated[Input, Takes("data"), "train clean encoders here, on these data"] = None
    network: Annotated[Input, Takes("network"), "of those that are trained here"] = "clip_small"
    objective: Annotated[Input, Takes("objective"), "of those that are trained here"] = "clip"
    count: Annotated[
        int,
        "how many are trained here, each with a seed of its own (and data, where they are made to order)",
    ] = 20
    classifier: Annotated[
        Literal["auto", "own", "zero_shot", "linear", "mlp"], "head that audits of classes invert"
    ] = "auto"
    parent: Annotated[Input, Takes("encoder"), "the encoder that all of them were tuned from"] = (
        None
    )
    rate: Annotated[
        float, "false-positive rate that the figures are for; a bank holds values, for any rate"
    ] = 0.05
    images: Annotated[int, "clean images that are looked at"] = 512

    def __post_init__(self) -> None:
        if self.parent is not None and not any(
            a.partition(":")[0] == "parent" for a in map(audit_spec, self.audit)
        ):
            object.__setattr__(self, "audit", (*self.audit, "parent"))

    def work(self, job: Job) -> dict[str, Any]:
        """-> bank.json, and figures of every audit."""
        from bezoar.auditing import bank
        from bezoar.runs.sweep import Trial, sweep

        if not 0 < self.rate < 1 or self.count < 1:
            raise UserError(
                f"rate must be inside 0..1 and count at least 1; got {self.rate:g} and {self.count}"
            )
        given = job.inputs
        clean = [check_clean(e) for e in given["encoder"]]
        attacked = [known_attacked(r) for r in given["attacked"]]
        if given["train"] is not None:
            trained = sweep(self._trainings(given, job.seed), job.settings, job.progress)
            clean += trained.values()
        if not clean:
            raise UserError("give encoders known to be clean, or --train DATA to train some")
        asked: dict[tuple[str, str], Trial] = {}
        data = input_spec(given["data"]) or None
        for e in [*clean, *(r for r, _ in attacked)]:
            for audit in given["audit"]:
                leaf = single_audit(
                    audit,
                    input_spec(e),
                    data,
                    self.classifier,
                    input_spec(given["parent"]) or None,
                    self.images,
                )
                asked[input_spec(e), registry.spec(audit)] = Trial(
                    dataclasses.replace(leaf, audit=(registry.spec(audit),)), job.seed
                )
        runs = sweep(asked.values(), job.settings, job.progress)
        job.child_runs += dict.fromkeys(runs.values())
        told = {
            k: json.loads(runs[t].file(VERDICT_FILE).read_text(encoding="utf-8"))
            for k, t in asked.items()
        }
        family, sample = same(list(told.values()))
        made = []
        for audit in map(registry.spec, given["audit"]):
            own = tuple(entry(told[input_spec(e), audit]) for e in clean)
            bad = tuple(entry(told[input_spec(r), audit], r, success) for r, success in attacked)
            first = told[input_spec(clean[0]), audit]["audits"][0]
            made.append(bank.Calibration(audit, first["code"], first["classifier"], own, bad))
        bank.Bank(family, sample, tuple(made)).write(job.folder / bank.FILE)
        job.goals = []  # a bank is no poisoned artefact, whatever it was measured on
        job.notes = {
            "clean": len(clean),
            "attacked": len(attacked),
            "family": vars(family),
            "sample": vars(sample),
        }
        return {k: m for c in made for k, m in measures(c, self.rate).items()}

    def _trainings(self, given: dict[str, Any], seed: int) -> list[Trial]:
        """Clean encoders to train, each with a seed of its own, and data of its own where they are made to order."""
        from bezoar.runs.sweep import Trial

        data = given["train"]
        if isinstance(data, Run) and data.manifest["goal"]:
            raise UserError(
                f"the data of {data.name} are poisoned; a bank's encoders are trained on clean ones (--train)"
            )
        recipe = [registry.spec(given[k]) for k in ("network", "objective")]
        fields = () if isinstance(data, Run) else {f.name for f in dataclasses.fields(data)}
        out = []
        for k in range(seed, seed + self.count):
            own = (
                dataclasses.replace(data, seed=data.seed + k)
                if {"seed", "count"} <= set(fields)
                else data
            )
            out.append(Trial(Train(input_spec(own), *recipe), k))
        return out


def check_clean(given: Any) -> Any:
    """An encoder as given. Raises UserError for a run that says it was attacked."""
    if isinstance(given, Run) and given.manifest["goal"]:
        raise UserError(
            f"run {given.name} is poisoned; a bank's clean encoders must be clean (--attacked takes it)"
        )
    return given


def attacked_run(given: Run) -> Run:
    """An attacked encoder's run: itself, or the one that an evaluate run measured. Raises UserError for one that was not."""
    asked = given.manifest["ask"].get("encoder")
    run = (
        given.sibling(asked["run"])
        if given.verb == "evaluate" and asked and "run" in asked
        else given
    )
    if not run.manifest["goal"]:
        raise UserError(
            f"run {run.name} was not attacked; --attacked takes train or inject runs that were"
        )
    return run


def known_attacked(given: Run) -> tuple[Run, float | None]:
    """An attacked encoder's run, and what its attack was measured at: by the evaluate run given, or by one beside it."""
    run = attacked_run(given)
    return run, success(given) if given.verb == "evaluate" else known_success(run)


def known_success(run: Run) -> float | None:
    """The highest attack success that an evaluate run beside a run states of it; None where there is none."""
    found = []
    for path in sorted(run.path.parent.glob("evaluate-*/manifest.json")):
        measured = Run(path.parent)
        if (measured.manifest["ask"].get("encoder") or {}).get("run") == run.name:
            found.append(success(measured))
    return max((v for v in found if v is not None), default=None)


def success(measured: Run) -> float | None:
    """The highest attack success of an evaluate run, over its goals and heads; None where it measured none."""
    values = []
    for key, m in measured.manifest["metrics"].items():
        group, _, name = key.rpartition(".")
        if name.partition("@")[0] == "attack_success" and not group.startswith(
            ("baseline", "branch_swap")
        ):
            values.append(float(m["value"]))
    return max(values, default=None)


def same(told: list[dict[str, Any]]) -> tuple[Any, Any]:
    """The family and the clean images of all audits. Raises UserError for an encoder of another kind."""
    from bezoar.auditing import bank

    first = told[0]
    for other in told[1:]:
        for what, title in (("family", ""), ("sample", "clean ")):
            odd = [k for k, v in other[what].items() if v != first[what][k]]
            if odd:
                values = f"{other[what][odd[0]]!r}, that of {first['encoder']} is {first[what][odd[0]]!r}"
                raise UserError(
                    f"{other['encoder']} does not belong to this bank: its {title}{odd[0]} is {values}"
                )
    return bank.Family(**first["family"]), bank.Sample(**first["sample"])


def entry(told: dict[str, Any], run: Run | None = None, success: float | None = None) -> Any:
    """What one audit says of one encoder. run: of an attacked one."""
    from bezoar.auditing import bank
    from bezoar.runs import inputs

    attack, trigger = bank.describe_attack(inputs.known_goals(run)) if run is not None else ("", "")
    found = told["audits"][0]
    return bank.Entry(told["encoder"], found["value"], found["seconds"], attack, trigger, success)


def measures(found: Calibration, rate: float) -> dict[str, Measure]:
    """An audit's figures over the bank, under its name."""
    from bezoar.auditing import bank
    from bezoar.evaluation.scores import Measure, average

    seconds = [e.seconds for e in (*found.clean, *found.attacked)]
    out = {"clean": counted(len(found.clean), "clean encoders, counted")}
    if len(seconds) > 1:
        out["seconds"] = average(seconds, "wall-clock seconds of an audit")
    threshold = found.threshold(rate)
    if threshold is not None:
        how = f"quantile of the clean values at false-positive rate {rate:g}, counted"
        out["threshold"] = Measure(threshold, len(found.clean), threshold, threshold, how)
    spread = found.false_positive_rate(rate)
    if spread is not None:
        out["false_positive_rate"] = spread
    if all_ := found.sensitivity(rate).get(""):
        out["sensitivity"] = all_
    if (area := bank.measure_auroc(found)) is not None:
        out["auroc"] = area
    return {f"{found.name}.{k}": m for k, m in out.items()}


def counted(n: int, how: str) -> Measure:
    """A number of things."""
    from bezoar.evaluation.scores import Measure

    return Measure(n, n, n, n, how)
