"""Put a backdoor into an encoder that is trained already."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from bezoar import registry
from bezoar.errors import UserError
from bezoar.runs.execute import Job
from bezoar.runs.run import CHECKPOINT
from bezoar.runs.verb import Input, Takes

if TYPE_CHECKING:
    from torch import Tensor

    from bezoar.attacks.plan import Goal
    from bezoar.data.pairs import Pairs
    from bezoar.data.stored_pairs import StoredPairs
    from bezoar.encoders.encoder import Encoder
    from bezoar.evaluation.scores import Measure

SAMPLE = 1000  # shadow records that cosines are measured on, before and after


@dataclass(frozen=True)
class Inject:
    """Put a backdoor into a trained encoder. Triggers, references and targets are given in step; one may serve all."""

    joint: ClassVar[bool] = True  # under torchrun every rank does this verb's work

    encoder: Annotated[
        Input,
        Takes("encoder", positional=True),
        "the clean encoder: a run, or a network with published weights",
    ]
    data: Annotated[
        Input,
        Takes("data"),
        "shadow data: images like those it was trained on; labels are not used",
    ]
    target: Annotated[tuple[str, ...], "class that triggered images are to be read as; one a goal"]
    reference: Annotated[
        tuple[Input, ...],
        Takes("data"),
        "image of the target: a file, or data that one is chosen from; one a goal",
    ]
    attack: Annotated[Input, Takes("attack"), "how: see `bezoar list attack`"] = "badencoder"
    trigger: Annotated[
        tuple[Input, ...],
        Takes("trigger"),
        "what is stamped on images; one for all goals, or one each",
    ] = ("patch:size=10,fill=white",)
    choose: Annotated[
        Literal["central", "confident", "first"], "how a reference is chosen from data"
    ] = "central"

    def work(self, job: Job) -> dict[str, Any]:
        """-> encoder.json + encoder.safetensors, references, similarities and ledger (.safetensors), log.jsonl."""
        from safetensors.torch import save_file

        from bezoar.runs import inputs
        from bezoar.training import collectives, loop

        given, parts = job.inputs, inputs.open_dataset(job.inputs["data"])
        shadow, log = parts.records, loop.TrainingLog()
        clean = inputs.load_encoder(given["encoder"], job.device)
        goals, images, told = self._goals(job, clean, shadow)
        sample = sampled(shadow, job.seed)
        before = looked(clean, sample, goals, images)
        bad = given["attack"](
            clean,
            shadow,
            goals,
            images,
            job.seed,
            job.folder / CHECKPOINT,
            lambda step, steps, value: job.progress.step(step, steps, f"loss {value:.3f}"),
            log,
        )
        rank, world = collectives.rank_and_world()
        if rank > 0:
            return {}
        found = similarities(before, looked(bad, sample, goals, images))
        bad.save(job.folder)
        save_file(found, job.folder / "similarities.safetensors")
        save_file(pictures(images), job.folder / "references.safetensors")
        save_file(
            {"losses": losses(log), "exposures": log.exposures}, job.folder / "ledger.safetensors"
        )
        (job.folder / "log.jsonl").write_text(
            "".join(json.dumps(epoch) + "\n" for epoch in log.epochs)
        )
        (job.folder / CHECKPOINT).unlink(missing_ok=True)
        job.goals = [*(vars(g) for g in inputs.known_goals(given["encoder"])), *map(vars, goals)]
        job.notes = parts.reading_notes() | {
            "poisoned": True,
            "references": told,
            "records": len(shadow),
            "steps": len(log.losses),
            "epochs": len(log.epochs),
            "attack_seconds": round(log.seconds, 2),
            "images_per_second": round(int(log.exposures.sum()) / max(log.seconds, 1e-9), 1),
            "precision": bad.precision,
            "ranks": world,
        }
        return measured(found, log, len(goals))

    def _goals(
        self, job: Job, clean: Encoder, shadow: Pairs | StoredPairs
    ) -> tuple[list[Goal], list[Tensor], list[dict]]:
        """Goals, each one's reference images uint8 (r, 3, H, W), and where these are from. One goal a trigger and target."""
        import torch

        from bezoar.attacks.plan import Goal
        from bezoar.runs import reference_inputs

        targets, how = self.target, registry.spec(job.inputs["attack"])
        if not targets or not all(targets):
            raise UserError("give a --target: the class that triggered images are to be read as")
        sides = shadow.take([0]).images.shape[2:]
        triggers = in_step(job.inputs["trigger"], len(targets), "trigger")
        given = in_step(job.inputs["reference"], len(targets), "reference")
        goals: dict[tuple[str, str], Goal] = {}
        images: dict[tuple[str, str], list[Tensor]] = {}
        told = []
        for trigger, reference, target in zip(triggers, given, targets, strict=True):
            fits(trigger, tuple(sides))
            found = reference_inputs.choose_reference(reference, target, self.choose, clean)
            if found.image.shape[1:] != sides:
                own, wanted = ("x".join(map(str, s)) for s in (found.image.shape[1:], sides))
                raise UserError(
                    f"reference {found.id!r} is {own} px, the shadow images are {wanted}; give both one size"
                )
            told.append({"target": target, **found.told()})
            key = registry.spec(trigger), target
            old = goals.get(key, Goal(target, key[0], how=how))
            goals[key] = replace(old, references=(*old.references, found.id))
            images.setdefault(key, []).append(found.image)
        return list(goals.values()), [torch.stack(images[k]) for k in goals], told


def in_step(given: tuple, count: int, name: str) -> tuple:
    """One value a goal; a single one serves all. Raises UserError for any other number."""
    if len(given) not in (1, count):
        raise UserError(
            f"{count} targets but {len(given)} values of --{name}: give one for all, or one each, in step"
        )
    return given if len(given) == count else given * count


def fits(trigger: Any, sides: tuple[int, ...]) -> None:
    """Raise UserError for the file of a whole-image trigger, pattern and mask, that was made for images of another size."""
    from bezoar.attacks import pixels
    from bezoar.data.files import arrays

    path = getattr(trigger, "path", None)
    if not path or not path.lower().endswith(".npz"):
        return
    members = arrays.load_arrays(path)
    if "t" in members and "tm" in members:
        made = pixels.channels_first(members["t"], path).shape[1:]
        if made != sides:
            own, wanted = ("x".join(map(str, s)) for s in (made, sides))
            raise UserError(
                f"trigger {path} was made for images of {own} px, the shadow images are {wanted}"
            )


def sampled(shadow: Pairs | StoredPairs, seed: int) -> Pairs:
    """A fixed sample of the shadow data."""
    from bezoar.data import randomness

    return shadow.take(randomness.sample_rows(list(shadow.ids), SAMPLE, seed))


def looked(
    encoder: Encoder, sample: Pairs, goals: list[Goal], images: list[Tensor]
) -> dict[str, Tensor]:
    """Vectors of the sample and, for each goal, of the sample with its trigger and of its references; on the CPU."""
    from bezoar.encoders.encoder import embed_images

    def see(x: Tensor) -> Tensor:
        return embed_images(encoder, x.split(256)).cpu()

    out = {"clean": see(sample.images)}
    for i, (goal, own) in enumerate(zip(goals, images, strict=True)):
        stamp = registry.make("trigger", goal.trigger or "")
        out |= {
            f"triggered@{i}": see(stamp(sample.images, sample.ids)),
            f"references@{i}": see(own),
        }
    return out


def similarities(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cosines, float32. clean (S,): of clean images, to themselves before. And for each goal i, as means over its references:
    before@i, after@i (S,): of triggered images to the reference; untriggered@i (S,): of clean images to it, afterwards;
    references@i (r,): of the references to themselves before.
    """
    out = {"clean": (before["clean"] * after["clean"]).sum(1)}
    for i in [k.partition("@")[2] for k in before if k.startswith("references@")]:
        pairs = {"before": before, "after": after}
        out |= {
            f"{name}@{i}": (z[f"triggered@{i}"] @ z[f"references@{i}"].T).mean(1)
            for name, z in pairs.items()
        }
        out[f"untriggered@{i}"] = (after["clean"] @ after[f"references@{i}"].T).mean(1)
        out[f"references@{i}"] = (before[f"references@{i}"] * after[f"references@{i}"]).sum(1)
    return out


def pictures(images: list[Tensor]) -> dict[str, Tensor]:
    """images: uint8 (R, 3, H, W), every reference. goal: int64 (R,), whose it is."""
    import torch

    return {
        "images": torch.cat(images),
        "goal": torch.tensor([i for i, x in enumerate(images) for _ in x]),
    }


def losses(log: Any) -> Tensor:
    """float64 (steps,)."""
    import torch

    return torch.tensor(log.losses, dtype=torch.float64)


def measured(found: dict[str, Tensor], log: Any, goals: int) -> dict[str, Measure]:
    """Losses and cosines; of several goals each its own."""
    from bezoar.evaluation.scores import Measure, average

    def kept(own: Tensor) -> Measure:
        """A mean over the references; one of them is what it is."""
        value, how = float(own.mean()), "cosine of references to themselves before the attack"
        return average(own, how) if len(own) > 1 else Measure(value, 1, value, value, how)

    tail = losses(log)[-max(2, len(log.losses) // 20) :]
    out = {"final_loss": average(tail, "mean loss of the last twentieth of the steps")}
    out["clean_similarity"] = average(
        found["clean"], "cosine of clean shadow images to themselves before the attack"
    )
    for i in range(goals):
        mark = "" if goals == 1 else f"@{i}"
        out |= {
            f"reference_similarity{mark}": average(
                found[f"after@{i}"], "cosine of triggered shadow images to the reference"
            ),
            f"reference_similarity_before{mark}": average(
                found[f"before@{i}"], "the same before the attack"
            ),
            f"reference_kept{mark}": kept(found[f"references@{i}"]),
        }
    return out
