"""Measure an encoder: accuracy, attack success, what it was before the attack."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from bezoar.errors import UserError
from bezoar.runs.execute import Job
from bezoar.runs.run import Run
from bezoar.runs.verb import Input, Takes

if TYPE_CHECKING:
    from bezoar.attacks.plan import Goal
    from bezoar.data.pairs import Pairs
    from bezoar.runs.inputs import Dataset

LABELLED = 10_000  # records of a training split that is made to order


@dataclass(frozen=True)
class Evaluate:
    """Measure an encoder with one or more probes. Trigger and target are learnt from the encoder's parents."""

    encoder: Annotated[
        Input, Takes("encoder", positional=True), "a train run, or a network with published weights"
    ]
    test: Annotated[
        Input,
        Takes("data", positional=True),
        "test data; without it, the test split of the training data",
    ] = None
    probe: Annotated[tuple[Input, ...], Takes("probe"), "one or more: see `bezoar list probe`"] = (
        "zero_shot",
        "z_score",
    )
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
    place: Annotated[
        str, "where patches are put, when not as in training: see the trigger's place"
    ] = ""

    def work(self, job: Job) -> dict[str, Any]:
        """-> the metrics of the manifest."""
        from bezoar import registry
        from bezoar.evaluation import success
        from bezoar.runs import inputs

        given = job.inputs
        run = given["encoder"]
        attack = given["attack"] or (run if isinstance(run, Run) else None)
        victims = attack_victims(attack)
        method = given["test"]
        if method is None:
            if not isinstance(run, Run):
                raise UserError("name the TEST data: this encoder's training data are not known")
            method = inputs.test_split(inputs.root_method(run))
        parts = inputs.open_dataset(method)
        test = parts.pairs.to(job.device)
        job.notes = parts.reading_notes() | {
            "test": registry.spec(method) if not isinstance(method, Run) else method.name,
            "records": len(test),
        }
        goals = [moved(g, self.place) for g in self._goals(job, inputs.known_goals(attack), test)]
        job.goals = [vars(g) for g in goals]
        encoder = inputs.load_encoder(run, job.device)
        twin = (
            None
            if given["baseline"] is None
            else inputs.load_encoder(given["baseline"], job.device)
        )
        train = None
        if any("train" in needs(p) for p in given["probe"]):
            train = self._train(job, parts)
        out: dict[str, Any] = {}
        asked = [(p, e) for e in (encoder, twin) if e is not None for p in given["probe"]]
        with success.embedding_cache():
            for i, (probe, measured) in enumerate(asked):
                if measured is twin and "baseline" in needs(probe):
                    continue  # it has measured both
                name = registry.method_name(type(probe)) + (
                    " of the clean twin" if measured is twin else ""
                )
                job.progress.step(i, len(asked), name)
                found = probe(measured, train, test, goals, victims, **more(probe, twin, job, name))
                found = of_twin(found) if measured is twin else found
                if clash := sorted(out.keys() & found.keys()):
                    raise UserError(
                        f"two of the probes measure {clash[0]!r}; ask for them in two runs"
                    )
                out |= found
        return out

    @staticmethod
    def _goals(job: Job, goals: list[Goal], test: Pairs) -> list[Goal]:
        """The goals of this test set's task, in their order; the manifest names what is left out.

        An encoder's goals may belong to several tasks, each with its classes. Where no goal's target is a class of the
        test set, all are kept: the probes that read classes refuse them.
        """
        fitting = [g for g in goals if g.target in test.classes]
        if fitting and len(fitting) < len(goals):
            job.notes["goals_of_other_tasks"] = [g.target for g in goals if g not in fitting]
        if test.classes and test.labels is not None:
            there = set(test.labels.tolist())
            if empty := [c for i, c in enumerate(test.classes) if i not in there]:
                job.notes["classes_without_test_images"] = empty
        return fitting or goals

    def _train(self, job: Job, test: Dataset) -> Pairs:
        """The clean records that heads are fitted on, on the CPU: as named, or the training split of the test data.

        Raises UserError when there is no such split, or when it holds records that are tested on.
        """
        from bezoar import registry
        from bezoar.runs import inputs

        named = job.inputs["train"]
        found = inputs.open_dataset(training_split(test.method) if named is None else named)
        clean = inputs.in_memory(found.clean)
        if both := shared_records(clean, test.pairs):
            raise UserError(
                f"{len(both)} labelled records are test records too, such as {both[0]!r}; name other train data"
            )
        job.notes |= {
            "train": named.name if isinstance(named, Run) else registry.spec(found.method),
            "labelled": len(clean),
        }
        return clean


def moved(goal: Goal, place: str) -> Goal:
    """A goal whose trigger stands elsewhere than in training. Raises UserError for a trigger without a place."""
    from bezoar import registry

    if not place or goal.trigger is None:
        return goal
    trigger = registry.make("trigger", goal.trigger)
    if "place" not in {f.name for f in dataclasses.fields(trigger)}:
        raise UserError(
            f"trigger {goal.trigger!r} covers the image; it has no place to be moved from"
        )
    try:
        return dataclasses.replace(
            goal, trigger=registry.spec(dataclasses.replace(trigger, place=place))
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def needs(probe: Any) -> tuple[str, ...]:
    """What a probe asks for: `train`, clean data for a head; as one more argument `baseline`, the clean twin, or `report`."""
    return getattr(probe, "needs", ())


def more(probe: Any, twin: Any, job: Job, name: str) -> dict[str, Any]:
    """What a probe needs beyond what every probe is called with."""

    def report(done: int, total: int, text: str) -> None:
        job.progress.step(done, total, f"{name}: {text}")

    known = {"baseline": twin, "report": report}
    return {k: known[k] for k in needs(probe) if k in known}


def attack_victims(attack: Run | None) -> Pairs | None:
    """The victims of an attack's targeted goals: added from elsewhere, or records of the data set itself."""
    from bezoar.runs import inputs

    poison = attack.ancestor("poison") if attack else None
    if poison is None:
        return None
    parts = inputs.open_dataset(poison)
    wanted = {v for g in inputs.known_goals(attack) for v in g.victims}
    if parts.victims is not None or not wanted:
        return parts.victims
    return parts.clean.take([i for i, k in enumerate(parts.clean.ids) if k in wanted])


def training_split(method: Any) -> Any:
    """The training split that belongs to test data, whole. Raises UserError where there is none."""
    from bezoar import registry

    if getattr(method, "split", None) in (None, "train"):
        raise UserError(
            f"{registry.spec(method)} has no training split of its own; name the labelled data (train)"
        )
    fields = {f.name for f in dataclasses.fields(method)}
    sizes = (
        {"count": LABELLED} if "count" in fields else {"limit": None} if "limit" in fields else {}
    )
    return dataclasses.replace(method, split="train", **sizes)


def shared_records(a: Pairs, b: Pairs) -> list[str]:
    """Ids of the records that two sets share: the same id and the same pixels."""
    row = {k: i for i, k in enumerate(b.ids)}
    pairs = [(i, row[k]) for i, k in enumerate(a.ids) if k in row]
    if not pairs or a.images.shape[1:] != b.images.shape[1:]:
        return []
    mine, theirs = (list(rows) for rows in zip(*pairs, strict=True))
    same = (a.images[mine].cpu() == b.images[theirs].cpu()).flatten(1).all(1).tolist()
    return [a.ids[i] for i, equal in zip(mine, same, strict=True) if equal]


def of_twin(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the clean twin: `linear.attack_success_baseline`, `baseline.linear.clean_accuracy`."""
    out = {}
    for key, m in found.items():
        group, dot, name = key.rpartition(".")
        if name.startswith("attack_success"):
            out[group + dot + name.replace("attack_success", "attack_success_baseline", 1)] = m
        elif name == "clean_accuracy" or name.startswith("targeted_s"):
            out["baseline." + key] = m
    return out
