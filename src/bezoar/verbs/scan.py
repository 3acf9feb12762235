"""Rank the records of a data set by how suspicious they are."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bezoar import registry
from bezoar.attacks.plan import Plan
from bezoar.data.files.paths import existing_file
from bezoar.data.files.writing import write_json
from bezoar.data.source import as_source
from bezoar.detection import goal_measures, merging, reliability, source_pooling
from bezoar.detection.corpus import corpus, keep_lists, record_sources
from bezoar.detection.corpus.corpus import Corpus
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, Scores, detection_measures, proportion
from bezoar.progress import Progress
from bezoar.runs import inputs
from bezoar.runs.execute import Job
from bezoar.runs.run import Run
from bezoar.runs.verb import Input, Takes
from bezoar.terminal import warn

RANKED = 500  # records of ranked.json
MAX_REASONS = 6  # reasons why records could not be read, in one line
# Triggers with fixed pixels, triggers of any shape, targeted poisons, captions that do not fit.
DEFAULT_DETECTORS = ("transplant", "common_cause", "duplicates", "clip_score")
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Scan:
    """Rank a data set's records, most suspicious first, and write a keep-list. Several detectors are merged by rank.

    Shards, tables, folders and ready embeddings of any size are embedded piece by piece; a scan that was cut off goes on
    with the piece it was in. What cannot be read is named and left out, and the exit status is then 4 in place of 0.
    """

    sweeps: ClassVar[bool] = True
    fail_on: ClassVar[dict[str, str]] = {"trigger": "a detector has found a trigger"}

    data: Annotated[
        Input,
        Takes("data", positional=True),
        "data set, poison run, or a train run: its data scanned with its encoder",
    ]
    encoder: Annotated[
        Input, Takes("encoder"), "what embeds the records; without it, the train run's own"
    ] = None
    detector: Annotated[tuple[Input, ...], Takes("detector"), "see `bezoar list detector`"] = (
        DEFAULT_DETECTORS
    )
    remove: Annotated[
        float, "share of the records, the worst first, that the keep-list leaves out"
    ] = 0.03
    dedup: Annotated[
        int,
        "records that the keep-list keeps of one picture with diverging captions, as `duplicates` finds them; 0: any number",
    ] = 0
    write: Annotated[
        Literal["keep-list", "shards"], "lists alone, or cleaned shards too (of files: their bytes)"
    ] = "keep-list"
    leaks: Annotated[
        bool,
        "measure whether file sizes, headers, order, paths or caption templates alone separate poisons",
    ] = False
    trusted: Annotated[
        str,
        "file of ids of records known to be clean, a random sample: calibrates false discoveries",
    ] = ""
    sources: Annotated[
        str,
        "what records come from, to pool them: auto, metadata, domain, folder, shard, none, or a table of id, source",
    ] = "auto"

    def files(self) -> list[Path]:
        """The files that plain fields name, so that a changed one is another question. Raises UserError without one."""
        trusted = [existing_file(self.trusted, "list of clean records")] if self.trusted else []
        return [*trusted, *record_sources.check_wanted(self.sources)]

    def work(self, job: Job) -> dict[str, Measure]:
        """Rank the records, write the lists, and measure the ranking where the poisons are known.

        Writes scores.parquet (all scores), ranked.json (the worst 500), keep.txt, keep.parquet and skipped.jsonl. The plan
        of a poisoned set is read only after the ranking is written.
        """
        if not 0 <= self.remove < 1:
            raise UserError(f"remove must be a share in 0..1; got {self.remove}")
        self._check_dedup(job.inputs["detector"])
        by = embedding_encoder(job)
        data = corpus.embed_corpus(job.inputs["data"], by, job.folder, job.settings, job.progress)
        if warning := resolution_warning(data):
            warn(f"scan: {warning}")
        detections = run_detectors(job.inputs["detector"], data, job)
        by_detector = detections.scores
        merged = merging.merge(list(by_detector.values()))
        pooled = source_pooling.pool_sources(data, merged, by_detector, self.sources)
        if pooled is not None:
            merged = source_pooling.lift_records(merged, pooled, by_detector)
            source_pooling.write_table(job.folder, data, pooled)
        order = merged.ranking()
        removed = order[: round(self.remove * len(data))]
        # Of copies, the least suspicious stay.
        surplus = order[:0]
        if self.dedup:
            kept = order[len(removed) :][::-1]
            surplus = keep_lists.find_surplus(by_detector.values(), kept, self.dedup)
        kept_rows = np.setdiff1d(order[len(removed) :], surplus)
        corpus.write_scores(job.folder / corpus.SCORES, data, merged, by_detector)
        keep_lists.write_keep_lists(job.folder, data, kept_rows)
        worst = [record_json(data, row, merged, by_detector) for row in order[:RANKED].tolist()]
        write_json(job.folder / "ranked.json", worst)
        if any(scores.boxes is not None for scores in by_detector.values()):
            ids, boxes = flagged_windows(by_detector, order[: max(RANKED, len(removed))])
            reliability.write_windows(job.folder, ids, boxes)
        decisions = describe_decisions(by_detector)
        sentences, source_notes, source_metrics = source_pooling.describe_table(pooled)
        left_out = (
            f"keep.txt leaves out the {len(removed):,} most suspicious of {len(data):,} records"
        )
        if self.dedup:
            left_out += f" and {len(surplus):,} more copies of pictures with diverging captions"
        job.notes = data.reading_notes() | {
            "records": len(data),
            "removed": len(removed),
            "deduplicated": len(surplus),
            "decided": decisions,
            "verdict": "; ".join([*decisions, left_out, "ranked.json names them", *sentences]),
            "detectors": [registry.spec(detector) for detector in job.inputs["detector"]],
            "told": {name: s.notes for name, s in by_detector.items() if s.notes},
            "seconds": detections.seconds,
            "incomplete": describe_incomplete(data, detections.failed),
            **source_notes,
        }
        if self.write == "shards":
            job.notes |= keep_lists.write_clean_copy(
                job.folder / "shards", data, kept_rows, job.progress
            )
        return source_metrics | self._measure(job, data, merged, by_detector, removed, surplus)

    def _check_dedup(self, detectors: Sequence[Any]) -> None:
        """Raise UserError for a number below 0, or where no detector finds copies."""
        names = [registry.method_name(type(detector)) for detector in detectors]
        if self.dedup < 0 or (self.dedup and "duplicates" not in names):
            raise UserError("dedup must be at least 0, and needs --detector duplicates")

    def _measure(
        self,
        job: Job,
        data: Corpus,
        merged: Scores,
        by_detector: dict[str, Scores],
        removed: Rows,
        surplus: Rows,
    ) -> dict[str, Measure]:
        """The metrics, now that the ranking is written and the plan may be read."""
        dataset = inputs.open_dataset(job.inputs["data"])
        plan = dataset.plan
        # Goals of the encoder are no attack on these data.
        job.goals = [vars(goal) for goal in plan.goals]
        metrics: dict[str, Measure] = {}
        if plan.edits:
            metrics |= detection_metrics(plan, merged, by_detector)
            metrics |= goal_measures.measure_goals(plan, merged, by_detector)
            metrics |= removal_metrics(plan, {merged.ids[row] for row in (*removed, *surplus)})
        metrics |= decision_metrics(by_detector)
        reliability_metrics, notes = reliability.measure_ranking(
            job.inputs["data"],
            dataset,
            data,
            merged,
            removed,
            self.leaks,
            self.trusted,
        )
        job.notes |= notes
        return metrics | reliability_metrics

    @staticmethod
    def fails(case: str, manifest: Mapping[str, Any]) -> bool:
        """Whether a detector that decides has found a trigger.

        Raises UserError where no detector decides, because that would pass whatever there is.
        """
        decisions = [
            measure["value"]
            for name, measure in manifest["metrics"].items()
            if name.endswith(".raised")
        ]
        if not decisions and not manifest["notes"].get("incomplete"):
            raise UserError(
                f"--fail-on {case}: no detector asked for says whether there is one; --detector transplant does"
            )
        return any(decisions)


@dataclass
class Detections:
    """What detectors said.

    Attributes:
        scores: by the detector's name, or by its spec where a name is asked for twice.
        seconds: that each took. What several share (neighbours, a short training) counts for the first.
        failed: a line for each detector that refused.
    """

    scores: dict[str, Scores]
    seconds: dict[str, float]
    failed: list[str]


def embedding_encoder(job: Job) -> Any:
    """What embeds the records: a run or a configured network; None for ready embeddings.

    Raises UserError where it is not known.
    """
    data = job.inputs["data"]
    encoder = job.inputs["encoder"]
    source = as_source(inputs.open_source(inputs.open_dataset(data).method))
    if not source.has_images:
        if encoder is not None:
            raise UserError("these data are embeddings already; leave --encoder out")
        return None
    if encoder is None and not isinstance(data, Run):
        raise UserError(
            "give --encoder: what embeds the records (a train run, or a network with weights)"
        )
    return data if encoder is None else encoder


def resolution_warning(data: Corpus) -> str:
    """A warning where images are read smaller than the encoder takes them; otherwise ""."""
    size = getattr(data.source, "size", 0)
    preprocess = getattr(data.encoder, "preprocess", None)
    if not size or preprocess is None or size >= preprocess.size:
        return ""
    return (
        f"images are read at {size} pixels a side, and the encoder takes {preprocess.size}; "
        f"size={preprocess.size} reads them whole"
    )


def run_detectors(detectors: Sequence[Any], data: Corpus, job: Job) -> Detections:
    """Score the records by every detector. Raises UserError where all refuse."""
    detections = Detections({}, {}, [])
    names = [registry.method_name(type(detector)) for detector in detectors]
    for detector, name in zip(detectors, names, strict=True):
        if Counter(names)[name] > 1:
            name = registry.spec(detector)
        start = time.perf_counter()
        try:
            detections.scores[name] = recall_scores(detector, name, data, job)
        except UserError as error:
            detections.failed.append(f"detector {name}: {error}")
        detections.seconds[name] = round(time.perf_counter() - start, 2)
    if not detections.scores:
        problems = describe_incomplete(data, detections.failed)
        raise UserError("; ".join(problems) if detections.failed else "give a --detector")
    return detections


def recall_scores(detector: Any, name: str, data: Corpus, job: Job) -> Scores:
    """The scores of a detector that another scan of the same vectors asked before, or new ones."""
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

    A detector that needs `report` reports its own progress; that of any other is measured by the images it embeds.
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
    """Report progress by the images that pass through the encoder's image tower. total: how many there will be."""
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


def flagged_windows(by_detector: Mapping[str, Scores], rows: Rows) -> tuple[list[str], Tensor]:
    """The windows in which detectors place a trigger; of several detectors, the first that names one.

    Returns:
        The ids of those of the rows that have a window, and the windows, int64 (M, 4).
    """
    ids = next(iter(by_detector.values())).ids
    boxes = torch.full((len(rows), 4), -1)
    for scores in by_detector.values():
        if scores.boxes is not None:
            is_set = boxes[:, 2:3] > 0
            boxes = torch.where(is_set, boxes, scores.boxes.cpu()[torch.from_numpy(rows)])
    with_window = (boxes[:, 2] > 0).nonzero()[:, 0].tolist()
    return [ids[rows[i]] for i in with_window], boxes[with_window]


def record_json(
    data: Corpus, row: int, merged: Scores, by_detector: Mapping[str, Scores]
) -> dict[str, Any]:
    """A record as it stands in ranked.json."""
    return {
        "id": data.ids[row],
        "place": data.place_of(row),
        "caption": data.captions[row] if len(data.captions) else "",
        "score": float(merged.values[row]),
        "detectors": {name: float(scores.values[row]) for name, scores in by_detector.items()},
    }


def describe_incomplete(data: Corpus, failed: Sequence[str]) -> list[str]:
    """A line for each kind of thing that was asked and not done."""
    summary = data.summary
    lines = list(failed)
    if summary["unread"]:
        reasons = list(summary["reasons"].items())[:MAX_REASONS]
        text = ", ".join(f"{n} {reason}" for reason, n in reasons)
        lines.append(
            f"{summary['unread']} records or files could not be read, beside {len(data)} that were: {text}; see skipped.jsonl"
        )
    if summary["doubles"]:
        lines.append(
            f"{summary['doubles']} records have an id that another has, and another name here; see skipped.jsonl"
        )
    return lines


def describe_decisions(by_detector: Mapping[str, Scores]) -> list[str]:
    """What detectors decided, a line each. That nothing was found does not say that there is nothing."""
    deciding = {name: s for name, s in by_detector.items() if s.raised is not None}
    lines = []
    for name, scores in deciding.items():
        if scores.raised is not None and (n := int(scores.raised.sum())):
            what = "a trigger" if scores.groups is None else "pictures with many captions"
            lines.append(f"{name} found {what} in {n:,} record{'s' * (n != 1)}")
    return lines or [
        f"{name} found no trigger, which is no proof that there is none"
        for name, scores in deciding.items()
        if scores.groups is None
    ]


def decision_metrics(by_detector: Mapping[str, Scores]) -> dict[str, Measure]:
    """The share of records that detectors say show a trigger. On clean data all of these are false alarms.

    What shows no trigger, copies of a picture whose captions diverge, is a metric of another name.
    """
    metrics = {}
    for name, scores in by_detector.items():
        if scores.raised is None:
            continue
        how = "share of the records that are said to show a trigger; of clean data, false alarms"
        key = f"{name}.raised"
        if scores.groups is not None:
            how = "share of the records that are copies of a picture with many captions"
            key = f"{name}.copies"
        metrics[key] = proportion(int(scores.raised.sum()), len(scores), how)
    return metrics


def detection_metrics(
    plan: Plan, merged: Scores, by_detector: Mapping[str, Scores]
) -> dict[str, Measure]:
    """How well the poisons of a known plan were found, by all detectors together and by each."""
    truth = torch.from_numpy(plan.mask(merged.ids))
    metrics = detection_measures(merged, truth)
    if len(by_detector) == 1:
        return metrics
    for name, scores in by_detector.items():
        own_truth = truth if scores.ids is merged.ids else torch.from_numpy(plan.mask(scores.ids))
        measures = detection_measures(scores, own_truth)
        metrics |= {f"{name}.{key}": measure for key, measure in measures.items()}
    return metrics


def removal_metrics(plan: Plan, removed_ids: set[str]) -> dict[str, Measure]:
    """How many of the poisons the keep-list leaves out."""
    hits = sum(edit.id in removed_ids for edit in plan.edits)
    how = "poisons that the keep-list leaves out"
    return {"poisons_removed": proportion(hits, len(plan.edits), how)}
