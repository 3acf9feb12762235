"""Measures an encoder: accuracy and attack success, beside those of its clean twin."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.errors import UserError
from bezoar.evaluation import success
from bezoar.evaluation.scores import Measure
from bezoar.runs import inputs
from bezoar.runs.execute import Job
from bezoar.runs.inputs import Dataset
from bezoar.runs.run import Run
from bezoar.runs.verb import Input, Takes, input_name
from bezoar.terminal import warn

DEFAULT_PROBES = ("zero_shot", "z_score")
LABELLED = 10_000  # records of a training split that is made to order


@dataclass(frozen=True)
class Evaluate:
    """Measure an encoder with one or more probes.

    Trigger and target are learnt from the encoder's parents.
    """

    encoder: Annotated[
        Input,
        Takes("encoder", positional=True),
        "a run, a file or folder of weights, or a name of the Hugging Face hub",
    ]
    test: Annotated[
        Input,
        Takes("data", positional=True),
        "test data; without it, the test split of the training data",
    ] = None
    probe: Annotated[
        tuple[Input, ...],
        Takes("probe"),
        "one or more: see `bezoar list probe`; of a classifier without a text tower: own",
    ] = DEFAULT_PROBES
    baseline: Annotated[
        Input, Takes("encoder"), "the clean twin, for attack_success_baseline (ASR-B)"
    ] = None
    attack: Annotated[
        Input,
        Takes("run"),
        "poison run whose goals are measured, when the encoder's parents have none",
    ] = None
    train: Annotated[
        Input,
        Takes("data"),
        "labelled data that heads are fitted on; without it, TEST's training split",
    ] = None
    trigger: Annotated[
        Input,
        Takes("trigger"),
        "a known trigger, in place of a poison run; TARGET is what images with it are to be read "
        "as",
    ] = None
    target: Annotated[str, "the class that TRIGGER aims at, by its name in the test data"] = ""
    place: Annotated[
        str, "where patches are put, when not as in training: see the trigger's place"
    ] = ""

    def work(self, job: Job) -> dict[str, Measure]:
        """Measure the encoder, and its clean twin if there is one, with every probe."""
        encoder_input = job.inputs["encoder"]
        attack = job.inputs["attack"]
        if attack is None and isinstance(encoder_input, Run):
            attack = encoder_input
        victims = attack_victims(attack)
        method = test_method(job.inputs["test"], encoder_input)
        dataset = inputs.open_dataset(method)
        test = dataset.pairs.to(job.device)
        job.notes = dataset.reading_notes() | {"test": input_name(method), "records": len(test)}
        all_goals = inputs.goals_to_stamp(attack) + known_trigger(
            job.inputs["trigger"], self.target, test
        )
        goals = [with_place(goal, self.place) for goal in goals_of_task(job, all_goals, test)]
        job.goals = [vars(goal) for goal in goals]
        probes = job.inputs["probe"]
        needs_train = any("train" in registry.needs(probe) for probe in probes)
        # Before the weights, which may take long to load, because it refuses more often.
        train = load_labelled(job, dataset) if needs_train else None
        encoder = inputs.load_encoder(encoder_input, job.device, test)
        if weights := inputs.describe_weights(encoder):
            job.notes["weights"] = weights
        baseline = job.inputs["baseline"]
        twin = None if baseline is None else inputs.load_encoder(baseline, job.device)
        is_classifier = encoder.text is None and encoder.head is not None
        if is_classifier and self.probe == DEFAULT_PROBES:
            probes = (registry.make("probe", "own"),)
        # A probe that needs the twin measures both.
        of_twin = [p for p in probes if twin is not None and "baseline" not in registry.needs(p)]
        tasks = [(encoder, p) for p in probes] + [(twin, p) for p in of_twin]
        metrics: dict[str, Measure] = {}
        with success.embedding_cache():
            for i, (measured, probe) in enumerate(tasks):
                is_twin = measured is not encoder
                name = registry.method_name(type(probe))
                if is_twin:
                    name += " of the clean twin"
                job.progress.step(i, len(tasks), name)
                report = job.reporter(name)
                measures = registry.call(
                    probe, measured, train, test, goals, victims, baseline=twin, report=report
                )
                if is_twin:
                    measures = twin_metrics(measures)
                if clash := sorted(metrics.keys() & measures.keys()):
                    raise UserError(
                        f"two of the probes measure {clash[0]!r}; ask for them in two runs"
                    )
                metrics |= measures
        return metrics


def known_trigger(trigger: Any, target: str, test: Pairs) -> list[Goal]:
    """The goal of a trigger that the user names, or none.

    Raises UserError for a trigger without a target, or the other way round, and for a target that
    is no class of the test data.
    """
    if trigger is None and not target:
        return []
    if trigger is None or not target:
        raise UserError(
            "a known trigger needs both: --trigger, and the class that it aims at (--target)"
        )
    success.class_index(target, test.classes)
    return [Goal(target, registry.spec(trigger), how="named by the user")]


def test_method(test: Any, encoder: Any) -> Any:
    """The test data of an encoder: those given, or the test split of its training data."""
    if test is not None:
        return test
    if not isinstance(encoder, Run):
        raise UserError("name the TEST data: this encoder's training data are not known")
    return inputs.test_split(inputs.root_method(encoder))


def goals_of_task(job: Job, goals: list[Goal], test: Pairs) -> list[Goal]:
    """The goals whose target is a class of the test set, in order; the job's notes name the others.

    An encoder's goals may belong to several tasks with different classes. If no goal's target is a
    class of the test set, all are kept: probes that read classes then refuse them.
    """
    of_task = [g for g in goals if g.target in test.classes]
    if of_task and len(of_task) < len(goals):
        others = [g.target for g in goals if g not in of_task]
        job.notes["goals_of_other_tasks"] = others
        warn(
            "evaluate: not measured, because no class of the test data has this name: "
            f"{', '.join(others)}"
        )
    if test.classes and test.labels is not None:
        labels = set(test.labels.tolist())
        if empty := [c for i, c in enumerate(test.classes) if i not in labels]:
            job.notes["classes_without_test_images"] = empty
    return of_task or goals


def load_labelled(job: Job, test: Dataset) -> Pairs:
    """The clean records that heads are fitted on, on the CPU: those given, or TEST's training
    split.

    Raises UserError if there is no such split, or if it holds test records.
    """
    train = job.inputs["train"]
    train = training_split(test.method) if train is None else train
    clean = inputs.in_memory(inputs.open_dataset(train).clean)
    check_disjoint(
        clean, test.pairs, "labelled records are test records too", "name other train data"
    )
    job.notes |= {"train": input_name(train), "labelled": len(clean)}
    return clean


def with_place(goal: Goal, place: str) -> Goal:
    """The goal with its trigger elsewhere. Raises UserError for a trigger without a place."""
    if not place or goal.trigger is None:
        return goal
    trigger = registry.make("trigger", goal.trigger)
    if not registry.has_fields(trigger, "place"):
        raise UserError(
            f"trigger {goal.trigger!r} covers the image; it has no place to be moved from"
        )
    try:
        trigger = dataclasses.replace(trigger, place=place)
    except ValueError as error:
        raise UserError(str(error)) from error
    return dataclasses.replace(goal, trigger=registry.spec(trigger))


def attack_victims(attack: Run | None) -> Pairs | None:
    """The victims of targeted goals: images from elsewhere, or records of the data set."""
    poison = attack.ancestor("poison") if attack else None
    if poison is None:
        return None
    dataset = inputs.open_dataset(poison)
    victim_ids = {v for goal in inputs.goals_to_stamp(attack) for v in goal.victims}
    if dataset.victims is not None or not victim_ids:
        return dataset.victims
    return dataset.clean.take(dataset.clean.find_rows(victim_ids))


def training_split(method: Any) -> Any:
    """The whole training split of test data, as a data method. Raises UserError without one."""
    if getattr(method, "split", None) in (None, "train"):
        raise UserError(
            f"{registry.spec(method)} has no training split of its own; name the labelled data "
            "(train)"
        )
    size: dict[str, int | None] = {}
    if registry.has_fields(method, "count"):
        size = {"count": LABELLED}
    elif registry.has_fields(method, "limit"):
        size = {"limit": None}
    return dataclasses.replace(method, split="train", **size)


def check_disjoint(records: Pairs, others: Pairs, mistake: str, advice: str) -> None:
    """Raise UserError, with the mistake and the advice, where records are among the others."""
    if shared := shared_records(records, others):
        raise UserError(f"{len(shared)} {mistake}, such as {shared[0]!r}; {advice}")


def shared_records(a: Pairs, b: Pairs) -> list[str]:
    """Ids of the records that two sets share: the same id and the same pixels, or text."""
    row_of_id = {k: i for i, k in enumerate(b.ids)}
    rows_a = a.find_rows(row_of_id).tolist()
    if not rows_a or a.images.shape[1:] != b.images.shape[1:]:
        return []
    rows_b = [row_of_id[a.ids[i]] for i in rows_a]
    is_same = (a.images[rows_a].cpu() == b.images[rows_b].cpu()).flatten(1).all(1).tolist()
    if a.text_only:
        is_same = [a.captions[i] == b.captions[j] for i, j in zip(rows_a, rows_b, strict=True)]
    return [a.ids[i] for i, same in zip(rows_a, is_same, strict=True) if same]


def twin_metrics(measures: Mapping[str, Measure]) -> dict[str, Measure]:
    """The metrics of a clean twin to report, such as `linear.attack_success_baseline`."""
    metrics = {}
    for key, measure in measures.items():
        group, dot, name = key.rpartition(".")
        if name.startswith("attack_success"):
            name = name.replace("attack_success", "attack_success_baseline", 1)
            metrics[group + dot + name] = measure
        elif name == "clean_accuracy" or name.startswith("targeted_s"):
            metrics["baseline." + key] = measure
    return metrics
