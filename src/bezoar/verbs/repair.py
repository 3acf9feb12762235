"""Repairs an encoder with clean data, and measures the result."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data.files.writing import write_json
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import sample_rows
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.classifiers import fits_own_head
from bezoar.evaluation.scores import Measure
from bezoar.evaluation.verdict import Inversion
from bezoar.repair import rate_ladder, receipt
from bezoar.repair.receipt import EvaluationData
from bezoar.runs import inputs
from bezoar.runs.execute import Job
from bezoar.runs.inputs import Dataset
from bezoar.runs.run import Run
from bezoar.runs.verb import Input, Takes, input_name
from bezoar.terminal import warn
from bezoar.verbs import evaluate

# Clean records that are drawn: their number, and the distance of their seed from the training's.
FRESH, SEED_OFFSET = 4000, 1009
LABELLED = 4000  # records that linear heads are fitted on, a fixed sample at most
DEFAULTS = ("finetune", "unlearn")  # repairs by captions, and without


@dataclass(frozen=True)
class Repair:
    """Take a backdoor out of an encoder with clean data alone, and say what that did: before,
    after, and after a relapse.

    Learning rates are chosen on clean validation records, never on the attack. Known triggers are
    only measured, with those that an audit inverted; a repair is given none but the audit's.
    """

    main_files: ClassVar[tuple[str, ...]] = ("encoder.safetensors", "readings.json")

    encoder: Annotated[
        Input,
        Takes("encoder", positional=True),
        "the suspect: a run, a file or folder of weights, or a name of the Hugging Face hub",
    ]
    data: Annotated[
        Input,
        Takes("data"),
        "clean data; without it, fresh records where the training data are made to order",
    ] = None
    repair: Annotated[
        tuple[Input, ...],
        Takes("repair"),
        "one or more, one after another: see `bezoar list repair`; without any, finetune where "
        "the encoder reads text and the data have captions, else unlearn",
    ] = ()
    test: Annotated[
        Input, Takes("data"), "test data; without it, the test split of the training data"
    ] = None
    audit: Annotated[
        Input,
        Takes("run"),
        "audit run whose inverted triggers are measured, and unlearnt by `unlearn`",
    ] = None
    labelled: Annotated[
        Input, Takes("data"), "labelled data for linear heads; without it, TEST's training split"
    ] = None
    repaired: Annotated[
        Input,
        Takes("encoder"),
        "repaired already (trained on a keep-list, say): write the receipt alone",
    ] = None
    twin: Annotated[
        Input, Takes("encoder"), "the clean twin: what ten poisons do where no backdoor was"
    ] = None
    attack: Annotated[
        Input,
        Takes("run"),
        "poison run whose goals are measured, when the encoder's parents have none",
    ] = None
    trigger: Annotated[
        Input, Takes("trigger"), "a known trigger that is measured; no repair is told it"
    ] = None
    target: Annotated[str, "the class that TRIGGER aims at, by its name in the test data"] = ""
    held: Annotated[float, "share of the clean data held apart to choose learning rates by"] = 0.2
    revive: Annotated[bool, "whether short fine-tunes try to bring the backdoor back"] = True

    def files(self) -> list[Path]:
        """The source of the default repairs, if none is named: it is part of the question."""
        repairs = [] if self.repair else [registry.make("repair", name) for name in DEFAULTS]
        return [Path(inspect.getfile(type(repair))) for repair in repairs]

    def work(self, job: Job) -> dict[str, Measure]:
        """Repair the encoder, and measure it before, after and after short fine-tunes.

        Writes encoder.json and encoder.safetensors (unless `repaired`), inverted-*.npz and
        readings.json.
        """
        if not 0 < self.held < 1:
            raise UserError(f"held must be a share above 0 and below 1; got {self.held}")
        clean = load_clean(job)
        suspect = inputs.load_encoder(job.inputs["encoder"], job.device, clean)
        case = load_case(job, suspect, self.target)
        evaluate.check_disjoint(
            clean, case.test, "clean records are test records too", "name other data"
        )
        train, validation = rate_ladder.split_validation(clean, self.held, job.seed)
        audit = job.inputs["audit"]
        inversions = receipt.load_inversions(audit.path) if audit is not None else ()
        head_before = case.default_head(suspect)
        inverted = receipt.export_goals(inversions, job.folder, case, head_before)
        case = dataclasses.replace(case, inverted=inverted)
        before = case.measure(suspect, head_before)
        metrics = {f"before.{key}": measure for key, measure in before.items()}
        outcome = self._repair(job, suspect, train, validation, inversions)
        repaired = outcome.encoder
        head_after = case.default_head(repaired)
        after = case.measure(repaired, head_after)
        metrics |= {f"after.{key}": measure for key, measure in after.items()}
        metrics["clean_accuracy_lost"] = receipt.accuracy_loss(case, head_before, head_after)
        readings = receipt.compare_readings(case, head_before, head_after)
        write_json(job.folder / "readings.json", readings)
        metrics |= outcome.durations
        if weights := inputs.describe_weights(suspect):
            job.notes["weights"] = weights
        goal = next((g for g in (*case.goals, *case.inverted) if g.trigger), None)
        if not self.revive or (suspect.text is not None and not clean.captions):
            goal = None
        if goal is not None:
            twin_input = job.inputs["twin"]
            twin = None if twin_input is None else inputs.load_encoder(twin_input, job.device)
            revival = receipt.RevivalTest(case, train, goal, job.seed, job.progress.step)
            metrics |= revival.measure(repaired, twin)
        limits = describe_limits(case, outcome.log, self.revive and goal is None)
        for line in limits:
            warn(f"repair: {line}")
        job.notes |= {
            "poisoned": any(g.trigger or g.victims or g.query for g in case.goals),
            "records": len(train),
            "validation": len(validation),
            "repairs": outcome.repairs,
            "inverted": [g.target for g in case.inverted],
            "relapse": {"target": goal.target, "trigger": goal.trigger} if goal else None,
            "limits": limits,
            **outcome.log,
        }
        return metrics

    def _repair(
        self,
        job: Job,
        suspect: Encoder,
        train: Pairs,
        validation: Pairs,
        inversions: Sequence[Inversion],
    ) -> Outcome:
        """Apply the repairs and save the encoder, unless it was repaired already."""
        if job.inputs["repaired"] is not None:
            return Outcome(inputs.load_encoder(job.inputs["repaired"], job.device))
        repairs = job.inputs["repair"] or (default_repair(suspect, train),)
        report = job.progress.step
        start, cpu_start = time.monotonic(), time.process_time()
        repaired, log = receipt.apply_repairs(
            repairs, suspect, train, validation, inversions, job.seed, report
        )
        repaired.save(job.folder)
        durations = duration_metrics(time.monotonic() - start, time.process_time() - cpu_start)
        return Outcome(repaired, log, durations, [registry.spec(repair) for repair in repairs])


@dataclass(frozen=True)
class Outcome:
    """A repaired encoder, and the repairs' logs (JSON), seconds and specs."""

    encoder: Encoder
    log: dict[str, Any] = field(default_factory=dict)
    durations: dict[str, Measure] = field(default_factory=dict)
    repairs: list[str] = field(default_factory=list)


def default_repair(suspect: Encoder, clean: Pairs) -> Any:
    """The default repair: the one that uses most of the information in the data."""
    reads_captions = suspect.text is not None and bool(clean.captions)
    return registry.make("repair", DEFAULTS[0] if reads_captions else DEFAULTS[1])


def load_case(job: Job, suspect: Encoder, target: str) -> EvaluationData:
    """The data that the encoder is measured on: test data, known goals, victims, labelled data.

    target: of the trigger that the user names.
    """
    encoder_input, attack = job.inputs["encoder"], job.inputs["attack"]
    method = evaluate.test_method(job.inputs["test"], encoder_input)
    dataset = inputs.open_dataset(method)
    test = dataset.pairs.to(job.device)
    source = encoder_input if attack is None else attack
    all_goals = inputs.goals_to_stamp(source)
    all_goals += evaluate.known_trigger(job.inputs["trigger"], target, test)
    goals = goals_of_task(all_goals, test)
    victims = None
    if isinstance(source, Run) and any(goal.victims for goal in goals):
        victims = evaluate.attack_victims(source)
    labelled = load_labelled(job, dataset, test, suspect)
    job.notes["test"] = input_name(method)
    return EvaluationData(test, goals, victims, labelled)


def load_labelled(job: Job, dataset: Dataset, test: Pairs, suspect: Encoder) -> Pairs | None:
    """Clean labelled records that are no test records.

    None if there are none, and the suspect's text tower or own head reads classes without them.
    """
    method = job.inputs["labelled"]
    if method is None:
        try:
            method = evaluate.training_split(dataset.method)
        except UserError:
            if suspect.text is None and not fits_own_head(suspect, test.classes):
                raise
            return None
        if registry.has_fields(method, "count"):
            method = dataclasses.replace(method, count=LABELLED)
    labelled = inputs.in_memory(inputs.open_dataset(method).clean)
    evaluate.check_disjoint(
        labelled, test, "labelled records are test records too", "name other labelled data"
    )
    return labelled.take(sample_rows(labelled.ids, LABELLED, 0))


def load_clean(job: Job) -> Pairs:
    """The records for the repair. Raises UserError if they are poisoned, or none are named."""
    data = job.inputs["data"]
    if data is None:
        data = fresh_records(job.inputs["encoder"])
    dataset = inputs.open_dataset(data)
    if dataset.plan.edits:
        raise UserError(f"the data of {data.name} are poisoned; a repair needs clean ones")
    job.notes |= dataset.reading_notes() | {"data": input_name(data)}
    return inputs.in_memory(dataset.clean)


def fresh_records(encoder: Any) -> Any:
    """Records like an encoder's training data, as a data method.

    Raises UserError if there are none.
    """
    method = inputs.root_method(encoder) if isinstance(encoder, Run) else None
    if method is None or not registry.has_fields(method, "count", "seed"):
        raise UserError(
            "name clean DATA (--data): this encoder's training data cannot be made anew"
        )
    seed = method.seed + SEED_OFFSET
    return dataclasses.replace(method, count=FRESH, seed=seed, split="train")


def goals_of_task(goals: list[Goal], test: Pairs) -> tuple[Goal, ...]:
    """The goals whose target is a class of the test data; if there are none, all goals."""
    return tuple(goal for goal in goals if goal.target in test.classes) or tuple(goals)


def describe_limits(case: EvaluationData, log: Mapping[str, Any], no_relapse: bool) -> list[str]:
    """The limits of the receipt, a sentence each.

    no_relapse: whether the test for a relapse was asked for and left out.
    """
    limits = []
    if not any(goal.trigger for goal in case.goals):
        limits.append(
            "No trigger is known: success is measured for inverted triggers alone, and accuracy."
        )
    if not case.inverted:
        limits.append(
            "No audit was named, or it inverted nothing: no inverted trigger is measured."
        )
    if no_relapse and any(goal.trigger for goal in (*case.goals, *case.inverted)):
        limits.append("No relapse was looked for: the clean data have no captions.")
    for rungs in log.get("ladder", []):
        if not rungs["held"]:
            limits.append(
                f"No learning rate kept the validation score within {rungs['tolerance']:g}; the "
                "least fall was taken."
            )
    return limits


def duration_metrics(wall: float, cpu: float) -> dict[str, Measure]:
    """How long the repair took, in seconds; the choice of its learning rate is included."""
    wall_how = "seconds of the repair, all learning rates that were tried; one run"
    cpu_how = "the same in processor time of this process; one run"
    return {
        "seconds": Measure.exact(wall, 1, wall_how),
        "cpu_seconds": Measure.exact(cpu, 1, cpu_how),
    }
