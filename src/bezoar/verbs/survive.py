"""Measures how much of a trigger survives image processing. Nothing is trained."""

import csv
import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from bezoar import registry
from bezoar.data.files.tensors import write_tensors
from bezoar.data.files.writing import whole_file, write_json
from bezoar.errors import UserError
from bezoar.evaluation import canaries, survival
from bezoar.evaluation.scores import Measure
from bezoar.runs import inputs
from bezoar.runs.execute import Job
from bezoar.runs.verb import Input, Takes
from bezoar.verbs.check import limit_side

CANARIES = "canaries.csv"
EXAMPLES = 2  # images that are kept for the page, one treatment after another
SIDE = 96  # pixels of their sides, at most
QUALITIES = (0, 95, 85, 75, 50)
FACTORS = (1.0, 0.75, 0.5, 0.25)
AUGMENTATIONS = ("shift", "flip", "colour", "gray", "blur", "simclr")


@dataclass(frozen=True)
class Survive:
    """Put a trigger through JPEG, resizing, crops, augmentations and normalisations, and measure
    what is left of it.

    Of a poison run of canaries, count those that come out of a pipeline of your own: of its data
    (`--after`), and of its training (`--encoder`).
    """

    main_files: ClassVar[tuple[str, ...]] = ("canaries.csv",)

    data: Annotated[
        Input,
        Takes("data", positional=True),
        "clean images, or a run: its clean images and, without --trigger, its trigger",
    ]
    trigger: Annotated[
        Input,
        Takes("trigger"),
        "what is stamped on images; without it, the first trigger of the run",
    ] = None
    encoder: Annotated[
        Input, Takes("encoder"), "whose embedding the trigger is to move; without it, pixels alone"
    ] = None
    after: Annotated[
        Input, Takes("data"), "data behind your pipeline, in which the run's canaries are counted"
    ] = None
    count: Annotated[int, "images"] = 64
    jpeg: Annotated[tuple[int, ...], "qualities, 1 to 100; 0: not stored as JPEG"] = QUALITIES
    resize: Annotated[tuple[float, ...], "factors of the side, before it is stored"] = FACTORS
    crop: Annotated[
        tuple[float, ...], "least shares of the area of random resized crops; 1: none"
    ] = (1.0, 0.9, 0.5, 0.08)
    augment: Annotated[tuple[str, ...], "some of shift, flip, colour, gray, blur, simclr"] = (
        AUGMENTATIONS
    )
    normalise: Annotated[
        tuple[str, ...], "some of none, half, imagenet, clip, in place of the encoder's own"
    ] = ("none", "half", "imagenet", "clip")

    def work(self, job: Job) -> dict[str, Measure]:
        """Measure how much of the trigger each treatment leaves.

        Writes treatments.json, and pictures.safetensors with treated images.
        """
        dataset = inputs.open_dataset(job.inputs["data"])
        if job.inputs["after"] is not None or (
            job.inputs["trigger"] is None and canaries.canary_edits(dataset.plan)
        ):
            return count_canaries(job, dataset)
        if self.count < 2:
            raise UserError(f"count must be at least 2; got {self.count}")
        trigger_spec = find_trigger(job)
        trigger = registry.make("trigger", trigger_spec)
        records = dataset.clean
        clean = records.take(range(min(self.count, len(records))))
        encoder_input = job.inputs["encoder"]
        encoder = None if encoder_input is None else inputs.load_encoder(encoder_input, job.device)
        stamped = trigger(clean.images, clean.ids)
        subject = survival.Survival(
            clean.images.to(job.device), stamped.to(job.device), encoder, job.seed
        )
        normalise = self.normalise if encoder is not None else ()
        treatments = survival.build_treatments(
            self.jpeg, self.resize, self.crop, self.augment, normalise
        )
        metrics: dict[str, Measure] = {}
        facts: list[dict[str, Any]] = []
        pictures: list[Tensor] = []
        for i, treatment in enumerate(treatments):
            job.progress.step(i, len(treatments), treatment.title)
            measures, views = subject.measure(treatment)
            metrics |= {f"{treatment.name}.{key}": m for key, m in measures.items()}
            facts.append({**vars(treatment), "name": treatment.name, "title": treatment.title})
            pictures.append(draw_views(views[:EXAMPLES]))
        write_json(job.folder / "treatments.json", facts)
        write_tensors(job.folder / "pictures.safetensors", {"pictures": torch.stack(pictures)})
        job.notes = {
            "trigger": trigger_spec,
            "images": len(subject.clean),
            "untouched": len(clean) - len(subject.clean),
            "side": clean.size,
            "encoder": encoder is not None,
        }
        return metrics


def count_canaries(job: Job, dataset: inputs.Dataset) -> dict[str, Measure]:
    """Count the canaries of a poison run in the data after a pipeline, and in an encoder.

    Writes canaries.csv: id, form, word and outcome of each. Raises UserError if there is nothing to
    count.
    """
    put_in = canaries.make_canaries(dataset.plan, dataset.clean)
    after, encoder = job.inputs["after"], job.inputs["encoder"]
    if after is None and encoder is None:
        raise UserError("give --after DATA, what your pipeline made of the canaries, or --encoder")
    metrics: dict[str, Measure] = {}
    outcomes = ["not asked"] * len(put_in.edits)
    if after is not None:
        outcomes = canaries.find_outcomes(put_in, inputs.open_dataset(after).records)
        metrics |= canaries.count_outcomes(put_in, outcomes)
    if encoder is not None:
        learner = inputs.load_encoder(encoder, job.device)
        moved = dataclasses.replace(put_in, images=put_in.images.to(job.device))
        metrics |= canaries.measure_learning(moved, learner)
    with whole_file(job.folder / CANARIES, newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(("id", "form", "word", "outcome"))
        for edit, word, outcome in zip(put_in.edits, put_in.words, outcomes, strict=True):
            out.writerow((edit.id, edit.id.rpartition("-")[2], word, outcome))
    job.notes = {
        "canaries": len(put_in.edits),
        "verdict": canaries.describe(metrics, len(outcomes)),
    }
    return metrics


def find_trigger(job: Job) -> str:
    """The trigger's spec: the one given, or the first of the encoder's and the data's goals."""
    if job.inputs["trigger"] is not None:
        return registry.spec(job.inputs["trigger"])
    for run in (job.inputs["encoder"], job.inputs["data"]):
        for goal in inputs.goals_to_stamp(run):
            if goal.trigger:
                return goal.trigger
    raise UserError("give a --trigger, or a run whose goals name one")


def draw_views(views: Tensor) -> Tensor:
    """Make pictures of treated images and their residues; a residue is drawn on middle gray.

    Args:
        views: float (N, 2, 3, H, W), images in 0..1 and residues in -1..1.

    Returns:
        uint8 (N, 2, 3, S, S) on the CPU.
    """
    residues = (0.5 + views[:, 1] / 2).clamp(0, 1)
    pictures = torch.stack((views[:, 0], residues), 1)
    small = limit_side(pictures.flatten(0, 1), SIDE)  # (2 N, 3, S, S)
    small = small.reshape(*pictures.shape[:3], *small.shape[2:])
    return (small * 255).round().clamp(0, 255).byte().cpu()
