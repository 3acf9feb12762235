"""Scores inputs one by one at test time, to find those with a trigger."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import beta
from torch import Tensor

from bezoar import registry
from bezoar.attacks.stamping import stamp_records
from bezoar.data.files.tensors import write_tensors
from bezoar.data.files.writing import whole_file, write_json
from bezoar.data.pairs import Pairs, distinct_image_rows
from bezoar.data.randomness import sample_rows
from bezoar.data.stored_pairs import class_name
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.classifiers import ClassifierKind, make_classifier
from bezoar.evaluation.scores import Measure, Scores, detection_measures, proportion
from bezoar.runs import inputs
from bezoar.runs.execute import Job
from bezoar.runs.verb import Input, Takes
from bezoar.terminal import warn
from bezoar.verbs.evaluate import check_disjoint

SHOWN = 24  # images of each check that are kept for the page
SIDE = 96  # pixels of their sides, at most
MIN_CLEAN = 4  # clean images; with fewer there is nothing to calibrate on
SCORES_FILE = "scores.parquet"
CLEAN_SCORES_FILE = "clean.parquet"
FLAGGED_FILE = "flagged.json"
PICTURES_FILE = "pictures.safetensors"
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Check:
    """Score images as they would arrive at an encoder, and flag those above what clean images
    score.

    One half of the clean images calibrates the checks, the other sets the thresholds. With
    --trigger, or on a poison run, it is known which images carry a trigger, and how well they are
    detected is measured.
    """

    main_files: ClassVar[tuple[str, ...]] = ("flagged.json", "scores.parquet")

    encoder: Annotated[
        Input,
        Takes("encoder", positional=True),
        "a file or folder of weights, a name of the Hugging Face hub (hf-hub:...), or a run",
    ]
    images: Annotated[
        Input,
        Takes("data", positional=True),
        "the images that arrive: a folder, tars, a table, a spec, or a poison run",
    ]
    clean: Annotated[
        Input, Takes("data"), "images known to be clean, like those that arrive, and not among them"
    ] = None
    check: Annotated[tuple[Input, ...], Takes("check"), "see `bezoar list check`"] = (
        "masking_path",
    )
    rate: Annotated[float, "share of clean images that may be flagged; it sets the threshold"] = (
        0.01
    )
    classifier: Annotated[ClassifierKind, "head of checks that read classes"] = "auto"
    trigger: Annotated[
        Input,
        Takes("trigger"),
        "stamp it on one half of the images, to measure how well it is detected",
    ] = None

    def work(self, job: Job) -> dict[str, Measure]:
        """Score the images and the clean ones by every check.

        Writes scores.parquet (every image), clean.parquet (those that set the thresholds),
        flagged.json and pictures.safetensors. A check that cannot work here is named and left out;
        the exit status is then 4.
        """
        if not 0 < self.rate < 1:
            raise UserError(f"rate must be a share inside (0, 1); got {self.rate}")
        images, truth = load_images(job)
        calibration, held_out = load_clean(job, images)
        encoder = inputs.load_encoder(job.inputs["encoder"], job.device, calibration)
        results, failed = self._run_checks(job, encoder, images, calibration, held_out)
        limits = [f"{n}: {r.threshold.limit}" for n, r in results.items() if r.threshold.limit]
        for line in limits[:1]:
            warn(f"check: {line}")
        write_results(job.folder, images, truth, held_out, results)
        job.notes |= {
            "images": len(images),
            "side": images.size,
            "clean": {"calibrating": len(calibration), "thresholds": len(held_out)},
            "checks": {name: result.spec for name, result in results.items()},
            "said": {name: result.scores.notes or {} for name, result in results.items()},
            "limits": limits,
            "incomplete": failed,
        }
        metrics: dict[str, Measure] = {}
        for name, result in results.items():
            metrics |= {f"{name}.{key}": m for key, m in result.measures(truth).items()}
        return metrics

    def _run_checks(
        self, job: Job, encoder: Encoder, images: Pairs, calibration: Pairs, held_out: Pairs
    ) -> tuple[dict[str, CheckResult], list[str]]:
        """The result of every check by its name; and a line for each that cannot work here.

        Raises UserError if none can.
        """
        checks = job.inputs["check"]
        names = [registry.method_name(type(check)) for check in checks]
        results: dict[str, CheckResult] = {}
        failed: list[str] = []
        classifier = None
        for check, name in zip(checks, names, strict=True):
            if Counter(names)[name] > 1:
                name = registry.spec(check)
            try:
                if images.text_only and not getattr(check, "reads_texts", False):
                    raise UserError("it reads images, and these records are texts")
                if "classifier" in registry.needs(check) and classifier is None:
                    classifier = make_classifier(encoder, calibration, self.classifier)
                offered = {
                    "clean": calibration,
                    "classifier": classifier,
                    "report": job.reporter(name),
                }
                clean_scores, scores = score_both(check, encoder, held_out, images, offered)
                threshold = Threshold.of(clean_scores.values, self.rate)
                results[name] = CheckResult(registry.spec(check), scores, clean_scores, threshold)
            except UserError as error:
                failed.append(f"check {name}: {error}")
        if not results:
            raise UserError("; ".join(failed) or "give a --check")
        return results, failed


def score_both(
    check: Any, encoder: Encoder, clean: Pairs, images: Pairs, offered: Mapping[str, Any]
) -> tuple[Scores, Scores]:
    """Score the clean images and those that arrive.

    Where all are of one size they are scored by one call, so that the check is calibrated once.
    """
    if clean.images.shape[1:] != images.images.shape[1:]:
        return (
            registry.call(check, encoder, clean, **offered),
            registry.call(check, encoder, images, **offered),
        )
    scores = registry.call(check, encoder, Pairs.concat([clean, images]), **offered)
    of_clean, of_images = (
        replace(
            scores,
            ids=records.ids,
            values=scores.values[rows],
            boxes=None if scores.boxes is None else scores.boxes[rows],
        )
        for records, rows in (
            (clean, slice(len(clean))),
            (images, slice(len(clean), None)),
        )
    )
    return of_clean, of_images


def load_images(job: Job) -> tuple[Pairs, Mask | None]:
    """The images to check, one half of them stamped where a trigger is given.

    Returns:
        The images; and bool (N,), which of them carry a trigger, or None if that is unknown.
    """
    dataset = inputs.open_dataset(job.inputs["images"])
    images = dataset.pairs
    job.notes |= dataset.reading_notes()
    trigger = job.inputs["trigger"]
    if trigger is None:
        return images, dataset.plan.mask(images.ids) if dataset.plan.edits else None
    if dataset.plan.edits:
        raise UserError(
            "these images are poisoned already: leave --trigger out, or give clean ones"
        )
    rows = np.sort(sample_rows(images.ids, len(images) // 2, 1))
    truth = np.zeros(len(images), bool)
    truth[rows] = True
    clean = images.take(rows)
    stamped = stamp_records(trigger, clean)
    job.notes["trigger"] = registry.spec(trigger)
    if images.text_only:
        texts = list(images.captions)
        for row, text in zip(rows.tolist(), stamped.captions, strict=True):
            texts[row] = text
        return replace(images, captions=tuple(texts)), truth
    pixels = images.images.clone()
    pixels[truth] = stamped.images
    return replace(images, images=pixels), truth


def load_clean(job: Job, images: Pairs) -> tuple[Pairs, Pairs]:
    """The clean images: one half calibrates the checks, the other sets the thresholds."""
    if job.inputs["clean"] is None:
        raise UserError(
            "give --clean: images known to be clean, of which checks and thresholds are made"
        )
    clean = inputs.in_memory(inputs.open_dataset(job.inputs["clean"]).clean)
    # An image with several captions is several records, which must be in the same half.
    clean = clean.take(distinct_image_rows(clean.ids))
    check_disjoint(clean, images, "of the images are among the clean ones too", "give others")
    if len(clean) < MIN_CLEAN:
        raise UserError(
            f"checks need at least {MIN_CLEAN} clean images, better some hundreds; there are "
            f"{len(clean)}"
        )
    calibrates = np.zeros(len(clean), bool)
    calibrates[sample_rows(clean.ids, len(clean) // 2, 2)] = True
    return clean.take(np.flatnonzero(calibrates)), clean.take(np.flatnonzero(~calibrates))


@dataclass(frozen=True)
class Threshold:
    """The k-th largest of n clean scores, with the largest k for which k / (n + 1) <= rate.

    The share of similar clean images above it is distributed as Beta(k, n + 1 - k) over draws of
    the n, whatever the scores; it is less if there are ties.
    """

    value: float  # the score
    rank: int  # k
    n: int  # number of clean images
    limit: str = ""  # why the share differs from the rate, in a sentence; "" if it does not

    @staticmethod
    def of(clean: Tensor, rate: float) -> Threshold:
        """Set the threshold by scores, float (n,), of clean images that calibrated nothing."""
        n = len(clean)
        rank = max(1, int(rate * (n + 1) + 1e-9))
        limit = ""
        if rate * (n + 1) < 1 - 1e-9:
            needed = math.ceil(1 / rate - 1 - 1e-9)
            limit = (
                f"{n} clean images can set no threshold for a rate of {rate:g}, which takes "
                f"{needed}; theirs is their largest score, for a rate of {1 / (n + 1):.2g}"
            )
        return Threshold(float(clean.sort(descending=True).values[rank - 1]), rank, n, limit)

    def false_positives(self) -> Measure:
        """The share of images like the clean ones that lie above the threshold."""
        low, high = beta.ppf([0.025, 0.975], self.rank, self.n + 1 - self.rank)
        how = (
            f"expected share of clean images above the threshold, the {self.rank}. largest of "
            f"{self.n} clean scores (at most, where scores tie); beta interval over such draws"
        )
        return Measure(self.rank / (self.n + 1), self.n, float(low), float(high), how)


@dataclass(frozen=True)
class CheckResult:
    """The result of a check: spec, scores of the images and the clean images, and threshold."""

    spec: str
    scores: Scores
    clean: Scores
    threshold: Threshold

    @property
    def flagged(self) -> Mask:
        """bool (N,): which images score above the threshold."""
        return np.asarray((self.scores.values > self.threshold.value).numpy())

    def measures(self, truth: Mask | None) -> dict[str, Measure]:
        """The metrics of the check. truth: bool (N,), which images carry a trigger."""
        flagged = self.flagged
        threshold = self.threshold
        how = f"the {threshold.rank}. largest of {threshold.n} clean scores"
        measures = {
            "flagged": proportion(
                int(flagged.sum()), len(flagged), "images that score above the threshold"
            ),
            "threshold": Measure.exact(threshold.value, threshold.n, how),
            "expected_false_positives": threshold.false_positives(),
        }
        if truth is None or not 0 < int(truth.sum()) < len(truth):
            return measures
        measures["caught"] = proportion(
            int(flagged[truth].sum()), int(truth.sum()), "images with a trigger that are flagged"
        )
        measures["false_positives"] = proportion(
            int(flagged[~truth].sum()),
            int((~truth).sum()),
            "images without a trigger that are flagged",
        )
        for name, measure in detection_measures(self.scores, truth).items():
            if "_at_" not in name or name.startswith("fpr"):
                measures[name] = measure
        return measures


def write_results(
    folder: Path,
    images: Pairs,
    truth: Mask | None,
    held_out: Pairs,
    results: Mapping[str, CheckResult],
) -> None:
    """Write the tables of scores, the flagged images, and pictures of the highest scored."""
    classes = [class_name(images, row) for row in range(len(images))]
    columns: dict[str, Any] = {"id": list(images.ids), "class": classes}
    if truth is not None:
        columns["triggered"] = truth
    clean_columns: dict[str, Any] = {"id": list(held_out.ids)}
    flagged: dict[str, list[dict[str, Any]]] = {}
    pictures: dict[str, Tensor] = {}
    for number, (name, result) in enumerate(results.items()):
        columns |= {name: result.scores.values.numpy(), f"{name}.flagged": result.flagged}
        clean_columns[name] = result.clean.values.numpy()
        ranking = result.scores.ranking()
        flagged[name] = [
            image_json(images, truth, result, int(i)) for i in ranking if result.flagged[i]
        ]
        highest = images.images[torch.from_numpy(ranking[:SHOWN])]
        small = limit_side(highest.float(), SIDE).round().clamp(0, 255).byte()
        pictures[str(number)] = small.contiguous().cpu()
    write_table(folder / SCORES_FILE, columns)
    write_table(folder / CLEAN_SCORES_FILE, clean_columns)
    write_json(folder / FLAGGED_FILE, flagged)
    write_tensors(folder / PICTURES_FILE, pictures)


def image_json(images: Pairs, truth: Mask | None, result: CheckResult, row: int) -> dict[str, Any]:
    """A flagged image or text for flagged.json, with its suspicious window if known."""
    facts: dict[str, Any] = {
        "id": images.ids[row],
        "score": float(result.scores.values[row]),
    }
    if result.scores.boxes is not None:
        facts["box"] = result.scores.boxes[row].tolist()
    if truth is not None:
        facts["triggered"] = bool(truth[row])
    if images.text_only:
        facts["text"] = images.captions[row]
    return facts


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """Write columns as a Parquet file."""
    with whole_file(path, "wb") as file:
        pq.write_table(pa.table(dict(columns)), file)


def limit_side(images: Tensor, side: int) -> Tensor:
    """Make images, float (N, 3, H, W), smaller where a side is longer than `side` pixels."""
    height, width = images.shape[-2:]
    longest = max(height, width)
    if longest <= side:  # texts have no sides
        return images
    shape = [max(1, round(n * side / longest)) for n in (height, width)]
    return F.interpolate(images, shape, mode="bilinear", antialias=True)
