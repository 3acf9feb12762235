"""Puts a backdoor into a trained encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from bezoar import registry
from bezoar.attacks import pixels
from bezoar.attacks.plan import Goal
from bezoar.attacks.stamping import stamp_records
from bezoar.data import randomness
from bezoar.data.files import arrays
from bezoar.data.files.tensors import write_tensors
from bezoar.data.pairs import Pairs
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders.encoder import Encoder, embed_records
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, average
from bezoar.runs import inputs, reference_inputs
from bezoar.runs.execute import Job
from bezoar.runs.run import CHECKPOINT
from bezoar.runs.verb import Input, Takes
from bezoar.training import collectives
from bezoar.training.loop import TrainingLog
from bezoar.verbs.train import finish_log

SAMPLE = 1000  # shadow records that cosines are measured on, before and after
BATCH = 256  # images that are embedded at a time


@dataclass(frozen=True)
class Inject:
    """Put a backdoor into a trained encoder.

    Triggers, references and targets are given in step; one may serve all.
    """

    main_files: ClassVar[tuple[str, ...]] = ("encoder.safetensors", "encoder.json")

    joint: ClassVar[bool] = True  # under torchrun every rank does this verb's work

    encoder: Annotated[
        Input,
        Takes("encoder", positional=True),
        "the clean encoder: a run, a file or folder of weights, or a name of the Hugging Face hub",
    ]
    data: Annotated[
        Input,
        Takes("data"),
        "shadow data: images, or texts, like those it was trained on; labels are not used",
    ]
    target: Annotated[tuple[str, ...], "class that triggered records are to be read as; one a goal"]
    reference: Annotated[
        tuple[Input, ...],
        Takes("data"),
        "image or text of the target: a file, or data that one is chosen from; one a goal",
    ]
    attack: Annotated[Input, Takes("attack"), "how: see `bezoar list attack`; of texts: badcse"] = (
        "badencoder"
    )
    trigger: Annotated[
        tuple[Input, ...],
        Takes("trigger"),
        "what is stamped on images, or put into texts; one for all goals, or one each",
    ] = ("patch:size=10,fill=white",)
    choose: Annotated[
        Literal["central", "confident", "first"], "how a reference is chosen from data"
    ] = "central"

    def work(self, job: Job) -> dict[str, Measure]:
        """Attack a copy of the encoder.

        Writes encoder.json, encoder.safetensors, log.jsonl, and references, similarities and ledger
        (.safetensors).
        """
        dataset = inputs.open_dataset(job.inputs["data"])
        shadow = dataset.records
        rows = randomness.sample_rows(list(shadow.ids), SAMPLE, job.seed)
        sample = shadow.take(rows)
        clean = inputs.load_encoder(job.inputs["encoder"], job.device, sample)
        targets = self._choose_targets(job, clean, shadow)
        before = embed_sample(clean, sample, targets)
        log = TrainingLog()

        def report(step: int, steps: int, value: float) -> None:
            job.progress.step(step, steps, f"loss {value:.3f}")

        attacked: Encoder = job.inputs["attack"](
            clean,
            shadow,
            targets.goals,
            targets.inputs,
            job.seed,
            job.folder / CHECKPOINT,
            report,
            log,
        )
        rank, world = collectives.rank_and_world()
        if rank > 0:
            return {}
        similarities = measure_similarities(before, embed_sample(attacked, sample, targets))
        attacked.save(job.folder)
        write_tensors(job.folder / "similarities.safetensors", similarities)
        write_tensors(job.folder / "references.safetensors", targets.tensors())
        losses = torch.tensor(log.losses, dtype=torch.float64)
        ledger = {"losses": losses, "exposures": log.exposures}
        write_tensors(job.folder / "ledger.safetensors", ledger)
        finish_log(job.folder, log)
        goals = [*inputs.known_goals(job.inputs["encoder"]), *targets.goals]
        job.goals = [vars(goal) for goal in goals]
        speed = int(log.exposures.sum()) / max(log.seconds, 1e-9)
        job.notes = dataset.reading_notes() | {
            "poisoned": True,
            "references": targets.notes,
            "records": len(shadow),
            "steps": len(log.losses),
            "epochs": len(log.epochs),
            "attack_seconds": round(log.seconds, 2),
            "images_per_second": round(speed, 1),
            "precision": attacked.precision,
            "ranks": world,
        }
        return attack_metrics(similarities, losses, len(targets.goals))

    def _choose_targets(
        self, job: Job, clean: Encoder, shadow: Pairs | StoredPairs
    ) -> AttackTargets:
        """Make a goal for each pair of trigger and target, with its reference images."""
        if not self.target or not all(self.target):
            raise UserError("give a --target: the class that triggered images are to be read as")
        attack = registry.spec(job.inputs["attack"])
        first = shadow.take([0])
        sides = first.images.shape[2:]
        count = len(self.target)
        triggers = one_each(job.inputs["trigger"], count, "trigger")
        references = one_each(job.inputs["reference"], count, "reference")
        goals: dict[tuple[str, str], Goal] = {}
        records: dict[tuple[str, str], list[Pairs]] = {}
        notes = []
        for trigger, source, target in zip(triggers, references, self.target, strict=True):
            check_trigger_size(trigger, sides)
            stamp_records(trigger, first)
            trigger_spec = registry.spec(trigger)
            key = trigger_spec, target
            goal = goals.get(key, Goal(target, trigger_spec, how=attack))
            reference = reference_inputs.choose_reference(
                source, target, self.choose, clean, goal.references
            )
            check_reference(reference.record, first)
            notes.append({"target": target, **reference.to_json()})
            goals[key] = replace(goal, references=(*goal.references, reference.id))
            records.setdefault(key, []).append(reference.record)
        return AttackTargets(
            list(goals.values()), [Pairs.concat(records[key]) for key in goals], notes
        )


@dataclass(frozen=True)
class AttackTargets:
    """The aims of an attack."""

    goals: list[Goal]  # one for each pair of trigger and target
    references: list[Pairs]  # for each goal its reference inputs
    notes: list[dict[str, str]] = field(default_factory=list)  # their origins, for the manifest

    @property
    def inputs(self) -> list[Any]:
        """The references of each goal as an attack takes them: images, or texts."""
        return [r.captions if r.text_only else r.images for r in self.references]

    def tensors(self) -> dict[str, Tensor]:
        """`images`: the reference images, uint8 (R, 3, H, W); `goal`: their goals, int64 (R,)."""
        numbers = [i for i, records in enumerate(self.references) for _ in records.ids]
        images = torch.cat([records.images for records in self.references])
        return {"images": images, "goal": torch.tensor(numbers)}


def one_each(values: tuple[Any, ...], count: int, name: str) -> tuple[Any, ...]:
    """One value for each of `count` goals; a single one is repeated, other numbers refused."""
    if len(values) not in (1, count):
        raise UserError(
            f"{count} targets but {len(values)} values of --{name}: give one for all, or one each, "
            "in step"
        )
    return values if len(values) == count else values * count


def check_reference(reference: Pairs, shadow: Pairs) -> None:
    """Raise UserError for a reference, one record, that is not like a record of the shadow data."""
    if reference.text_only != shadow.text_only:
        kinds = ["a text" if r.text_only else "an image" for r in (reference, shadow)]
        raise UserError(
            f"reference {reference.ids[0]!r} is {kinds[0]}, a record of the shadow data {kinds[1]}"
        )
    sides = [records.images.shape[2:] for records in (reference, shadow)]
    if sides[0] != sides[1]:
        raise UserError(
            f"reference {reference.ids[0]!r} is {in_pixels(sides[0])} px, "
            f"the shadow images are {in_pixels(sides[1])}; give both one size"
        )


def check_trigger_size(trigger: Any, sides: Sequence[int]) -> None:
    """Raise UserError for a whole-image trigger file that was made for another image size."""
    path = getattr(trigger, "path", None)
    if not path or not path.lower().endswith(".npz"):
        return
    members = arrays.load_arrays(path)
    if "t" in members and "tm" in members:  # a pattern and its mask
        trigger_sides = pixels.channels_first(members["t"], path).shape[1:]
        if tuple(trigger_sides) != tuple(sides):
            raise UserError(
                f"trigger {path} was made for images of {in_pixels(trigger_sides)} px, "
                f"the shadow images are {in_pixels(sides)}"
            )


def in_pixels(sides: Sequence[int]) -> str:
    """The sides of an image as text, such as `32x32`."""
    return "x".join(map(str, sides))


def embed_sample(encoder: Encoder, sample: Pairs, targets: AttackTargets) -> dict[str, Tensor]:
    """Embed the sample, and for each goal i the sample with its trigger and the goal's references.

    Returns:
        `clean`, and `triggered@i` and `references@i`: vectors (S, d) or (r, d) on the CPU.
    """
    vectors = {"clean": embed_records(encoder, sample, BATCH).cpu()}
    for i, (goal, records) in enumerate(zip(targets.goals, targets.references, strict=True)):
        stamped = stamp_records(registry.make("trigger", goal.trigger or ""), sample)
        vectors[f"triggered@{i}"] = embed_records(encoder, stamped, BATCH).cpu()
        vectors[f"references@{i}"] = embed_records(encoder, records, BATCH).cpu()
    return vectors


def measure_similarities(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cosines between the vectors of `embed_sample` before and after the attack.

    Returns:
        `clean` (S,): clean images after and before. For each goal i, as means over its references:
        `before@i` and `after@i` (S,): triggered images and the reference; `untriggered@i` (S,):
        clean images and the reference, after the attack. `references@i` (r,): references after and
        before.
    """
    cosines = {"clean": (before["clean"] * after["clean"]).sum(1)}
    for i in [key.partition("@")[2] for key in before if key.startswith("references@")]:
        for name, vectors in (("before", before), ("after", after)):
            products = vectors[f"triggered@{i}"] @ vectors[f"references@{i}"].T  # (S, r)
            cosines[f"{name}@{i}"] = products.mean(1)
        cosines[f"untriggered@{i}"] = (after["clean"] @ after[f"references@{i}"].T).mean(1)
        cosines[f"references@{i}"] = (before[f"references@{i}"] * after[f"references@{i}"]).sum(1)
    return cosines


def attack_metrics(
    similarities: dict[str, Tensor], losses: Tensor, goals: int
) -> dict[str, Measure]:
    """The last loss, and the cosines of each goal. losses: float64 (steps,)."""
    tail = losses[-max(2, len(losses) // 20) :]
    metrics = {
        "final_loss": average(tail, "mean loss of the last twentieth of the steps"),
        "clean_similarity": average(
            similarities["clean"], "cosine of clean shadow images to themselves before the attack"
        ),
    }
    for i in range(goals):
        suffix = "" if goals == 1 else f"@{i}"
        metrics[f"reference_similarity{suffix}"] = average(
            similarities[f"after@{i}"], "cosine of triggered shadow images to the reference"
        )
        metrics[f"reference_similarity_before{suffix}"] = average(
            similarities[f"before@{i}"], "the same before the attack"
        )
        of_references = similarities[f"references@{i}"]
        how = "cosine of references to themselves before the attack"
        metrics[f"reference_kept{suffix}"] = (
            average(of_references, how)
            if len(of_references) > 1
            else Measure.exact(float(of_references.mean()), 1, how)
        )
    return metrics
