"""Makes a bank: the results of audits for encoders known to be clean, and for attacked ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from bezoar import registry
from bezoar.auditing import bank
from bezoar.auditing.bank import Bank, Calibration, Entry, Family, Sample
from bezoar.errors import UserError
from bezoar.evaluation.classifiers import ClassifierKind
from bezoar.evaluation.scores import Measure, average
from bezoar.runs import inputs, sweep
from bezoar.runs.execute import Job
from bezoar.runs.run import MANIFEST, Run
from bezoar.runs.verb import Input, Takes, Trial, input_spec
from bezoar.verbs.audit import (
    DEFAULT_AUDITS,
    audit_seconds,
    read_findings,
    single_audit,
    with_parent_audit,
)
from bezoar.verbs.train import Train

NOT_ATTACKS = ("baseline", "branch_swap")  # groups of metrics that measure something else


@dataclass(frozen=True)
class Calibrate:
    """Audit encoders known to be clean, given or trained here, and perhaps attacked ones; `bezoar
    audit --bank` reads it.

    Every training and every audit is a run of its own: a calibration that was cut off goes on with
    what is missing, and one with more encoders audits those alone.
    """

    main_files: ClassVar[tuple[str, ...]] = ("bank.json",)

    sweeps: ClassVar[bool] = True

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
    ] = DEFAULT_AUDITS
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
        "how many are trained here, each with a seed of its own (and data, where they are made to "
        "order)",
    ] = 20
    classifier: Annotated[ClassifierKind, "head that audits of classes use"] = "auto"
    parent: Annotated[Input, Takes("encoder"), "the encoder that all of them were tuned from"] = (
        None
    )
    rate: Annotated[
        float, "false-positive rate that the figures are for; a bank holds values, for any rate"
    ] = 0.05
    images: Annotated[int, "clean images that the audits use"] = 512

    def __post_init__(self) -> None:
        if self.parent is not None:
            object.__setattr__(self, "audit", with_parent_audit(self.audit))

    def work(self, job: Job) -> dict[str, Measure]:
        """Audit every encoder by every audit, and write bank.json."""
        if not 0 < self.rate < 1 or self.count < 1:
            raise UserError(
                f"rate must be inside 0..1 and count at least 1; got {self.rate:g} and {self.count}"
            )
        clean = [check_clean(encoder) for encoder in job.inputs["encoder"]]
        attacked = [AttackedEncoder.find(run) for run in job.inputs["attacked"]]
        if job.inputs["train"] is not None:
            trainings = self._trainings(job)
            clean += sweep.run_trials(trainings, job.settings, job.progress).values()
        if not clean:
            raise UserError("give encoders known to be clean, or --train DATA to train some")
        audit_runs = self._audit_all(job, [*clean, *(a.run for a in attacked)])
        verdicts = {key: read_findings(run) for key, run in audit_runs.items()}
        family, sample = check_same_kind(list(verdicts.values()))
        calibrations = []
        metrics: dict[str, Measure] = {}
        for audit in map(registry.spec, job.inputs["audit"]):
            of_clean = [verdicts[input_spec(encoder), audit] for encoder in clean]
            of_attacked = [(verdicts[input_spec(a.run), audit], a) for a in attacked]
            calibrations.append(calibration_of(audit, of_clean, of_attacked))
            seconds = [
                took
                for (_, spec), run in audit_runs.items()
                if spec == audit
                for took in audit_seconds(run, calibrations[-1].name).values()
            ]
            metrics |= calibration_measures(calibrations[-1], seconds, self.rate)
        Bank(family, sample, tuple(calibrations)).write(job.folder / bank.FILE)
        job.goals = []  # a bank is no poisoned artefact, whatever it was measured on
        job.notes = {
            "clean": len(clean),
            "attacked": len(attacked),
            "family": vars(family),
            "sample": vars(sample),
        }
        return metrics

    def _trainings(self, job: Job) -> list[Trial]:
        """Trainings of clean encoders with different seeds, and different data if drawn."""
        data = job.inputs["train"]
        if isinstance(data, Run) and data.manifest["goal"]:
            raise UserError(
                f"the data of {data.name} are poisoned; a bank's encoders are trained on clean "
                "ones (--train)"
            )
        network = registry.spec(job.inputs["network"])
        objective = registry.spec(job.inputs["objective"])
        made_to_order = not isinstance(data, Run) and registry.has_fields(data, "count", "seed")
        trials = []
        for seed in range(job.seed, job.seed + self.count):
            train = dataclasses.replace(data, seed=data.seed + seed) if made_to_order else data
            trials.append(Trial(Train(input_spec(train), network, objective), seed))
        return trials

    def _audit_all(self, job: Job, encoders: Sequence[Any]) -> dict[tuple[str, str], Run]:
        """Run every audit on every encoder. Returns the runs by the specs of encoder and audit."""
        data = input_spec(job.inputs["data"]) or None
        parent = input_spec(job.inputs["parent"]) or None
        trials: dict[tuple[str, str], Trial] = {}
        for encoder in map(input_spec, encoders):
            for audit in job.inputs["audit"]:
                verb = single_audit(audit, encoder, data, self.classifier, parent, self.images)
                audit_text = registry.spec(audit)  # a trial travels to a worker as JSON
                verb = dataclasses.replace(verb, audit=(audit_text,))
                trials[encoder, audit_text] = Trial(verb, job.seed)
        runs = sweep.run_trials(trials.values(), job.settings, job.progress)
        job.child_runs += dict.fromkeys(runs.values())
        return {key: runs[trial] for key, trial in trials.items()}


@dataclass(frozen=True)
class AttackedEncoder:
    """The run of an attacked encoder, and its attack success; None if that is unknown."""

    run: Run
    success: float | None

    @staticmethod
    def find(run: Run) -> AttackedEncoder:
        """The encoder of a run, and its attack's success by an evaluate run."""
        encoder_run = attacked_run(run)
        if run.verb == "evaluate":
            return AttackedEncoder(encoder_run, highest_success([run]))
        manifests = sorted(run.path.parent.glob(f"evaluate-*/{MANIFEST}"))
        evaluations = [Run(path.parent) for path in manifests]
        of_encoder = [e for e in evaluations if measures_encoder(e, encoder_run)]
        return AttackedEncoder(encoder_run, highest_success(of_encoder))


def check_clean(encoder: Any) -> Any:
    """Return the encoder. Raises UserError for an encoder of an attacked run."""
    if isinstance(encoder, Run) and encoder.manifest["goal"]:
        raise UserError(
            f"run {encoder.name} is poisoned; a bank's clean encoders must be clean (--attacked "
            "takes it)"
        )
    return encoder


def attacked_run(run: Run) -> Run:
    """The run of an attacked encoder: the run itself, or the one that an evaluate run measured.

    Raises UserError for one that was not attacked.
    """
    if run.verb == "evaluate":
        run = run.input_run("encoder") or run
    if not run.manifest["goal"]:
        raise UserError(
            f"run {run.name} was not attacked; --attacked takes train or inject runs that were"
        )
    return run


def measures_encoder(evaluation: Run, encoder_run: Run) -> bool:
    """Whether an evaluate run measured the encoder of a run."""
    encoder = evaluation.asked_for("encoder")
    return encoder is not None and encoder.get("run") == encoder_run.name


def highest_success(evaluations: Iterable[Run]) -> float | None:
    """The highest attack success of evaluate runs, over goals and heads; None without one."""
    values = []
    for run in evaluations:
        for key, measure in run.manifest["metrics"].items():
            group, _, name = key.rpartition(".")
            if name.partition("@")[0] == "attack_success" and not group.startswith(NOT_ATTACKS):
                values.append(float(measure["value"]))
    return max(values, default=None)


def check_same_kind(verdicts: Sequence[dict[str, Any]]) -> tuple[Family, Sample]:
    """The family of the encoders and the clean images that all verdicts share.

    Raises UserError for an encoder of another kind, or other images.
    """
    first = verdicts[0]
    for verdict in verdicts[1:]:
        for part, title in (("family", ""), ("sample", "clean ")):
            for key, value in verdict[part].items():
                if value != first[part][key]:
                    raise UserError(
                        f"{verdict['encoder']} does not belong to this bank: its {title}{key} is "
                        f"{value!r}, that of {first['encoder']} is {first[part][key]!r}"
                    )
    return Family(**first["family"]), Sample(**first["sample"])


def calibration_of(
    audit: str,
    of_clean: Sequence[dict[str, Any]],
    of_attacked: Sequence[tuple[dict[str, Any], AttackedEncoder]],
) -> Calibration:
    """The results of an audit for clean and attacked encoders, from the verdict.json of each."""
    first = of_clean[0]["audits"][0]
    attacked = []
    for verdict, encoder in of_attacked:
        attack, trigger = bank.describe_attack(inputs.known_goals(encoder.run))
        attacked.append(entry_of(verdict, attack, trigger, encoder.success))
    return Calibration(
        audit,
        first["code"],
        first["classifier"],
        tuple(entry_of(verdict) for verdict in of_clean),
        tuple(attacked),
    )


def entry_of(
    verdict: dict[str, Any], attack: str = "", trigger: str = "", success: float | None = None
) -> Entry:
    """A bank's entry for one encoder, from its verdict.json."""
    audit = verdict["audits"][0]
    return Entry(verdict["encoder"], audit["value"], attack, trigger, success)


def calibration_measures(
    calibration: Calibration, seconds: Sequence[float], rate: float
) -> dict[str, Measure]:
    """The metrics of an audit over the bank, under its name.

    Args:
        calibration: the audit's results.
        seconds: its time for each encoder.
        rate: the false-positive rate of the metrics.
    """
    n = len(calibration.clean)
    measures = {"clean": Measure.exact(n, n, "clean encoders, counted")}
    if len(seconds) > 1:
        measures["seconds"] = average(seconds, "wall-clock seconds of an audit")
    threshold = calibration.threshold(rate)
    if threshold is not None:
        how = f"quantile of the clean values at false-positive rate {rate:g}, counted"
        measures["threshold"] = Measure.exact(threshold, n, how)
    optional = {
        "false_positive_rate": calibration.false_positive_rate(rate),
        "sensitivity": calibration.sensitivity(rate).get(""),
        "auroc": bank.measure_auroc(calibration),
    }
    measures |= {name: measure for name, measure in optional.items() if measure is not None}
    return {f"{calibration.name}.{name}": measure for name, measure in measures.items()}
