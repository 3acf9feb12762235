"""Detectors run over a corpus: their scores, how long each took, and which of them refused."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from bezoar import registry
from bezoar.detection import scan_findings
from bezoar.detection.corpus.corpus import Corpus
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.progress import Progress
from bezoar.runs.execute import Job


@dataclass
class Detections:
    """The scores of all detectors."""

    # by the detector's name, or by its spec where a name is asked for twice
    scores: dict[str, Scores]
    # that each took. What several share (neighbours, a short training) counts for the first.
    seconds: dict[str, float]
    failed: list[str]  # a line for each detector that refused


def run_detectors(detectors: Sequence[Any], data: Corpus, job: Job) -> Detections:
    """Score the records by every detector. Raises UserError where all refuse."""
    detections = Detections({}, {}, [])
    names = [registry.method_name(type(detector)) for detector in detectors]
    for detector, name in zip(detectors, names, strict=True):
        if Counter(names)[name] > 1:
            name = registry.spec(detector)
        start = time.perf_counter()
        try:
            detections.scores[name] = load_or_score(detector, name, data, job)
        except UserError as error:
            detections.failed.append(f"detector {name}: {error}")
        detections.seconds[name] = round(time.perf_counter() - start, 2)
    if not detections.scores:
        problems = scan_findings.describe_incomplete(data, detections.failed)
        raise UserError("; ".join(problems) if detections.failed else "give a --detector")
    return detections


def load_or_score(detector: Any, name: str, data: Corpus, job: Job) -> Scores:
    """Return a detector's scores of an earlier scan of the same vectors, or compute them."""
    if data.shared is None:
        return score_records(detector, name, data, job)
    scores = data.shared.load_scores(detector, data.ids)
    if scores is None:
        scores = score_records(detector, name, data, job)
        with suppress(UserError, OSError):  # a disk that is full: they are made again
            data.shared.store_scores(detector, scores, data.ids)
    return scores


def score_records(detector: Any, name: str, data: Corpus, job: Job) -> Scores:
    """Score the records by one detector.

    A detector that needs `report` reports its own progress; that of any other is measured by the
    images it embeds.
    """
    scores: Scores
    if "report" in registry.needs(detector):
        scores = registry.call(detector, data.encoder, data, report=job.reporter(name))
        return scores
    passes = detector.passes(len(data)) if hasattr(detector, "passes") else len(data)
    with report_images(data.encoder, passes, job.progress, name):
        scores = detector(data.encoder, data)
        return scores


@contextmanager
def report_images(encoder: Any, total: int, progress: Progress, name: str) -> Iterator[None]:
    """Report progress by the images that the image tower reads. total: how many in all."""
    if not hasattr(encoder, "image"):  # ready embeddings have no encoder
        yield
        return
    done = 0

    def count(_: Any, arguments: Any, __: Any) -> None:
        nonlocal done
        done += len(arguments[0])
        progress.step(min(done, total), total, name)

    progress.step(0, total, name)
    hook = encoder.image.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()
