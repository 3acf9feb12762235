"""Does this input carry a trigger? Inputs scored one by one at test time, against a threshold set on clean images."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from bezoar.errors import UserError
from bezoar.runs.execute import Job
from bezoar.runs.verb import Input, Takes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from bezoar.data.pairs import Pairs
    from bezoar.evaluation.scores import Measure, Scores

SHOWN = 24  # images of each check that are kept for the page
SIDE = 96  # pixels of their sides, at most
SCORES_FILE, CLEAN_SCORES_FILE, FLAGGED_FILE, PICTURES_FILE = (
    "scores.parquet",
    "clean.parquet",
    "flagged.json",
    "pictures.safetensors",
)


@dataclass(frozen=True)
class Check:
    """Score images as they would arrive at an encoder, and flag those above what clean images score.

    One half of the clean images calibrates the checks, the other sets the thresholds. With --trigger, or on a poison run,
    it is known which images carry a trigger, and how well they are told is measured.
    """

    encoder: Annotated[
        Input,
        Takes("encoder", positional=True),
        "a train, inject or repair run, or a network with published weights",
    ]
    images: Annotated[
        Input, Takes("data", positional=True), "what arrives: a data set, or a poison run"
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
    classifier: Annotated[
        Literal["auto", "own", "zero_shot", "linear", "mlp"], "head of checks that read classes"
    ] = "auto"
    trigger: Annotated[
        Input,
        Takes("trigger"),
        "stamp it on one half of the images, to measure how well it is told",
    ] = None

    def work(self, job: Job) -> dict[str, Any]:
        """-> scores.parquet (every image), clean.parquet (those that set the thresholds), flagged.json, pictures.safetensors.

        A check that cannot be asked here is named, the others are; the exit status is then 4.
        """
        from bezoar import registry
        from bezoar.runs import inputs

        if not 0 < self.rate < 1:
            raise UserError(f"rate must be a share inside (0, 1); got {self.rate}")
        encoder = inputs.load_encoder(job.inputs["encoder"], job.device)
        images, truth = self._images(job)
        calibration, held = self._clean(job, images)
        known = CheckInputs(encoder, calibration, self.classifier)
        names = [registry.method_name(type(c)) for c in job.inputs["check"]]
        found: dict[str, CheckResult] = {}
        specs: dict[str, str] = {}
        failed: list[str] = []
        for method, name in zip(job.inputs["check"], names, strict=True):
            name = name if Counter(names)[name] == 1 else registry.spec(method)
            try:
                more = known.needed(method, job, name)
                clean = method(encoder, held, **more)
                specs[name] = registry.spec(method)
                found[name] = CheckResult(
                    method(encoder, images, **more), clean, Threshold.of(clean.values, self.rate)
                )
            except UserError as error:
                failed.append(f"check {name}: {error}")
        if not found:
            raise UserError("; ".join(failed) or "give a --check")
        limits = [f"{n}: {f.threshold.limit}" for n, f in found.items() if f.threshold.limit]
        for line in limits[:1]:
            print(f"check: {line}", file=sys.stderr)
        write(job, images, truth, held, found)
        job.notes |= {
            "images": len(images),
            "side": images.size,
            "clean": {"calibrating": len(calibration), "thresholds": len(held)},
            "checks": {n: specs[n] for n in found},
            "said": {n: f.scores.notes or {} for n, f in found.items()},
            "limits": limits,
            "incomplete": failed,
        }
        return {f"{n}.{k}": m for n, f in found.items() for k, m in f.measures(truth).items()}

    def _images(self, job: Job) -> tuple[Pairs, np.ndarray | None]:
        """What is checked, and which of it carries a trigger, where that is known."""
        import numpy as np

        from bezoar import registry
        from bezoar.data.randomness import sample_rows
        from bezoar.runs import inputs

        parts = inputs.open_dataset(job.inputs["images"])
        images = parts.pairs
        job.notes |= parts.reading_notes()
        trigger = job.inputs["trigger"]
        if trigger is None:
            return images, parts.plan.mask(images.ids) if parts.plan.edits else None
        if parts.plan.edits:
            raise UserError(
                "these images are poisoned already: leave --trigger out, or give clean ones"
            )
        rows = np.sort(sample_rows(images.ids, len(images) // 2, 1))
        truth = np.zeros(len(images), bool)
        truth[rows] = True
        chosen = images.take(rows)
        pixels = images.images.clone()
        pixels[truth] = trigger(chosen.images, chosen.ids)
        job.notes["trigger"] = registry.spec(trigger)
        return replace(images, images=pixels), truth

    def _clean(self, job: Job, images: Pairs) -> tuple[Pairs, Pairs]:
        """The half of the clean images that calibrates, and the half that sets the thresholds."""
        import numpy as np

        from bezoar.data.pairs import distinct_image_rows
        from bezoar.data.randomness import sample_rows
        from bezoar.runs import inputs
        from bezoar.verbs.evaluate import shared_records

        if job.inputs["clean"] is None:
            raise UserError(
                "give --clean: images known to be clean, of which checks and thresholds are made"
            )
        clean = inputs.in_memory(inputs.open_dataset(job.inputs["clean"]).clean)
        clean = clean.take(
            distinct_image_rows(clean.ids)
        )  # an image counted for each caption would stand on both sides
        if both := shared_records(clean, images):
            raise UserError(
                f"{len(both)} of the images are among the clean ones too, such as {both[0]!r}; give others"
            )
        if len(clean) < 4:
            raise UserError(
                f"checks need at least 4 clean images, better some hundreds; there are {len(clean)}"
            )
        first = np.zeros(len(clean), bool)
        first[sample_rows(clean.ids, len(clean) // 2, 2)] = True
        return clean.take(np.flatnonzero(first)), clean.take(np.flatnonzero(~first))


@dataclass
class CheckInputs:
    """What checks may be called with; the classifier is made when one first needs it."""

    encoder: Any
    clean: Pairs
    kind: Any
    classifier: Any = None

    def needed(self, method: Any, job: Job, name: str) -> dict[str, Any]:
        """The arguments by keyword that a check needs."""
        from bezoar.evaluation import classifiers

        def report(done: int, total: int, text: str = "") -> None:
            job.progress.step(done, total, f"{name}: {text}" if text else name)

        needs = getattr(method, "needs", ())
        if "classifier" in needs and self.classifier is None:
            self.classifier = classifiers.make_classifier(self.encoder, self.clean, self.kind)
        every = {"clean": self.clean, "classifier": self.classifier, "report": report}
        return {k: every[k] for k in needs if k in every}


@dataclass(frozen=True)
class Threshold:
    """The k-th largest of n clean scores, k the largest with k / (n + 1) <= rate: above it, a clean image like these falls
    with a chance that is Beta(k, n + 1 - k) over draws of the n, whatever the scores are; with less where they tie.
    limit: why that is not the rate.
    """

    value: float
    rank: int
    n: int
    limit: str = ""

    @staticmethod
    def of(clean: Tensor, rate: float) -> Threshold:
        """Of float (n,) scores of clean images that calibrated nothing."""
        n = len(clean)
        rank = max(1, int(rate * (n + 1) + 1e-9))
        limit = ""
        if rate * (n + 1) < 1 - 1e-9:
            least = math.ceil(1 / rate - 1 - 1e-9)
            limit = (
                f"{n} clean images can set no threshold for a rate of {rate:g}, which takes {least}; "
                f"theirs is their largest score, for a rate of {1 / (n + 1):.2g}"
            )
        return Threshold(float(clean.sort(descending=True).values[rank - 1]), rank, n, limit)

    def false_positives(self) -> Measure:
        """The rate that the threshold has on images like the clean ones."""
        from scipy.stats import beta

        from bezoar.evaluation.scores import Measure

        low, high = beta.ppf([0.025, 0.975], self.rank, self.n + 1 - self.rank)
        how = f"expected share of clean images above the threshold, the {self.rank}. largest of {self.n} clean scores"
        how += " (at most, where scores tie)"
        return Measure(
            self.rank / (self.n + 1),
            self.n,
            float(low),
            float(high),
            how + "; beta interval over such draws",
        )


@dataclass(frozen=True)
class CheckResult:
    """One check's answer: the scores of the images, of the clean ones, and the threshold."""

    scores: Scores
    clean: Scores
    threshold: Threshold

    @property
    def flagged(self) -> np.ndarray:
        """bool (N,): above the threshold."""
        return (self.scores.values > self.threshold.value).numpy()

    def measures(self, truth: np.ndarray | None) -> dict[str, Measure]:
        """Of one check; with truth bool (N,), how well it tells triggers."""
        from bezoar.evaluation.scores import Measure, detection_measures, proportion

        flagged, t = self.flagged, self.threshold
        out = {
            "flagged": proportion(
                int(flagged.sum()), len(flagged), "images that score above the threshold"
            ),
            "threshold": Measure(
                t.value, t.n, t.value, t.value, f"the {t.rank}. largest of {t.n} clean scores"
            ),
            "expected_false_positives": t.false_positives(),
        }
        if truth is None or not 0 < int(truth.sum()) < len(truth):
            return out
        caught, wrong = int(flagged[truth].sum()), int(flagged[~truth].sum())
        out["caught"] = proportion(
            caught, int(truth.sum()), "images with a trigger that are flagged"
        )
        out["false_positives"] = proportion(
            wrong, int((~truth).sum()), "images without a trigger that are flagged"
        )
        return out | {
            k: m
            for k, m in detection_measures(self.scores, truth).items()
            if "_at_" not in k or k.startswith("fpr")
        }


def write(
    job: Job, images: Pairs, truth: np.ndarray | None, held: Pairs, found: dict[str, CheckResult]
) -> None:
    """The run's files: tables of scores, the flagged images by check, pictures of the highest."""
    import torch
    from safetensors.torch import save_file

    from bezoar.runs import inputs

    columns: dict[str, Any] = {"id": list(images.ids), "class": classes(images)}
    if truth is not None:
        columns["triggered"] = truth
    for name, f in found.items():
        columns |= {name: f.scores.values.numpy(), f"{name}.flagged": f.flagged}
    table(job, SCORES_FILE, columns)
    table(
        job,
        CLEAN_SCORES_FILE,
        {"id": list(held.ids), **{n: f.clean.values.numpy() for n, f in found.items()}},
    )
    worst: dict[str, list[dict]] = {}
    pictures: dict[str, Tensor] = {}
    for at, (name, f) in enumerate(found.items()):
        order = f.scores.ranking()
        rows = [int(i) for i in order if f.flagged[i]]
        worst[name] = [entry(images, truth, f, i) for i in rows]
        top = order[:SHOWN]
        pictures[f"{at}"] = shrunk(images.images[torch.from_numpy(top)])
    inputs.write_json(job.folder / FLAGGED_FILE, worst)
    save_file(pictures, job.folder / PICTURES_FILE)


def entry(images: Pairs, truth: np.ndarray | None, f: CheckResult, row: int) -> dict:
    """A flagged image as it stands in flagged.json: with the window that a check accuses, where it says one."""
    told: dict[str, Any] = {"id": images.ids[row], "score": float(f.scores.values[row])}
    if f.scores.boxes is not None:
        told["box"] = f.scores.boxes[row].tolist()
    return told if truth is None else {**told, "triggered": bool(truth[row])}


def classes(images: Pairs) -> list[str]:
    """Each image's class, "" where it is not known."""
    if images.labels is None or not images.classes:
        return [""] * len(images)
    return [images.classes[k] if k >= 0 else "" for k in images.labels.tolist()]


def table(job: Job, name: str, columns: dict[str, Any]) -> None:
    """A Parquet file, under a temporary name first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = job.folder / f"{name}.tmp"
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(job.folder / name)


def shrunk(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> the same, sides at most SIDE."""
    import torch.nn.functional as F

    if max(images.shape[-2:]) > SIDE:
        shape = [max(1, round(n * SIDE / max(images.shape[-2:]))) for n in images.shape[-2:]]
        images = (
            F.interpolate(images.float(), shape, mode="bilinear", antialias=True)
            .round()
            .clamp(0, 255)
            .byte()
        )
    return images.contiguous().cpu()
