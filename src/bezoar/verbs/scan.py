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
from bezoar.data.files.paths import existing_file
from bezoar.data.files.writing import write_json
from bezoar.data.source import as_source
from bezoar.detection import (
    goal_measures,
    merging,
    reference_reading,
    reliability,
    scan_findings,
    scan_sarif,
    source_pooling,
    suspect_training,
)
from bezoar.detection.corpus import (
    corpus,
    exports,
    keep_lists,
    record_sources,
    removal_lists,
)
from bezoar.detection.corpus.corpus import Corpus
from bezoar.detection.reliability import integrity
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, Scores
from bezoar.progress import Progress
from bezoar.runs import inputs
from bezoar.runs.estimates import count_records
from bezoar.runs.execute import Job
from bezoar.runs.run import Run
from bezoar.runs.verb import Input, Settings, Takes, Trial, find_input, input_name
from bezoar.terminal import warn
from bezoar.verbs.train import Train

RANKED = 500  # records of ranked.json
BESIDE_TRAINING = ("repetition",)  # that is added to the default detectors where a model is trained
# Triggers with fixed pixels, triggers of any shape, targeted poisons, captions that do not fit.
DEFAULT_DETECTORS = ("transplant", "common_cause", "duplicates", "clip_score")
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Scan:
    """Rank a data set's records, most suspicious first, and write a keep-list. Several detectors are merged by rank.

    Without an encoder, a small model is trained on the data first: a trigger shows only in a model that has learnt it.
    Shards, tables, folders and ready embeddings of any size are embedded piece by piece; a scan that was cut off goes on
    with the piece it was in. What cannot be read is named and left out, and the exit status is then 4 in place of 0.
    """

    sweeps: ClassVar[bool] = True
    fail_on: ClassVar[dict[str, str]] = {"trigger": "a detector finds a trigger"}
    gate_needs: ClassVar[dict[str, tuple[str, str]]] = {"trigger": ("detector", "decides")}
    main_files: ClassVar[tuple[str, ...]] = (
        "keep.txt",
        "shards",
        "removed.csv",
        "scores.csv",
        "skipped.jsonl",
        "label-studio.json",
        "fiftyone",
        "scan.sarif",
    )

    data: Annotated[
        Input,
        Takes("data", positional=True, several=True),
        "a folder, tars, a table, a `datasets` folder, embeddings, a spec, or a run; of a train run, its data with its encoder",
    ]
    encoder: Annotated[
        Input,
        Takes("encoder"),
        "what embeds the records; without it the train run's own, or a small model trained on the data",
    ] = None
    detector: Annotated[tuple[Input, ...], Takes("detector"), "see `bezoar list detector`"] = (
        DEFAULT_DETECTORS
    )
    remove: Annotated[
        float,
        "share of the records, the worst first, that the keep-list leaves out; it leaves out all that are raised",
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
    export: Annotated[
        Literal["none", "label-studio", "fiftyone"],
        "write the worst records, and all that are left out, for this tool",
    ] = "none"
    trusted: Annotated[
        str,
        "file of ids of records known to be clean, a random sample: calibrates false discoveries",
    ] = ""
    reference: Annotated[
        str,
        "encoder that never saw the data (a file of weights, a run, a spec), for the detectors that take one: common_cause reads photographs by it",
    ] = ""
    sources: Annotated[
        str,
        "what records come from, to pool them: auto, metadata, domain, folder, shard, none, or a table of id, source",
    ] = "auto"

    def files(self) -> list[Path]:
        """The files that plain fields name, so that a changed one is another question. Raises UserError without one."""
        trusted = [existing_file(self.trusted, "list of clean records")] if self.trusted else []
        reference = reference_reading.reference_files(self.reference)
        return [*trusted, *reference, *record_sources.check_wanted(self.sources)]

    def work(self, job: Job) -> dict[str, Measure]:
        """Rank the records, write the lists, and measure the ranking where the poisons are known.

        Writes scores.parquet and scores.csv (all scores), ranked.json (the worst 500), keep.txt, keep.parquet, removed.csv,
        skipped.jsonl and scan.sarif. The plan of a poisoned set is read only after the ranking is written.
        """
        self._check_fields(job)
        encoder, untrained = self._choose_encoder(job)
        data = corpus.embed_corpus(
            job.inputs["data"], encoder, job.folder, job.settings, job.progress
        )
        untrained = untrained or partly_trained_warning(encoder, data, self._trains(job))
        if warning := resolution_warning(data):
            warn(f"scan: {warning}")
        detections = run_detectors(job.inputs["detector"], data, job)
        by_detector = detections.scores
        merged = merging.merge(list(by_detector.values()))
        pooled = source_pooling.pool_sources(data, merged, by_detector, self.sources)
        if pooled is not None:
            merged = source_pooling.lift_records(merged, pooled, by_detector)
            source_pooling.write_table(job.folder, data, pooled)
        # Of copies, with a number that may stay, the least suspicious stay.
        leaving = [n for n, s in by_detector.items() if s.groups is None or not self.dedup]
        raised = merging.raised_rows([by_detector[name] for name in leaving], len(data))
        order = merging.order_records(merged, raised)
        removed = order[: max(round(self.remove * len(data)), int(raised.sum()))]
        surplus = order[:0]
        if self.dedup:
            kept = order[len(removed) :][::-1]
            surplus = keep_lists.find_surplus(by_detector.values(), kept, self.dedup)
        kept_rows = np.setdiff1d(order[len(removed) :], surplus)
        self._write_records(job.folder, data, order, len(removed), surplus, merged, by_detector)
        keep_lists.write_keep_lists(job.folder, data, kept_rows)
        decisions = scan_findings.describe_decisions(by_detector)
        sentences, source_notes, source_metrics = source_pooling.describe_table(pooled)
        left_out = self._describe_keep_list(len(removed), len(surplus), len(data))
        job.notes = data.reading_notes() | {
            "records": len(data),
            "removed": len(removed),
            "deduplicated": len(surplus),
            "leaving": leaving,
            "decided": decisions,
            "verdict": "; ".join([*decisions, left_out, "ranked.json names them", *sentences]),
            "detectors": [registry.spec(detector) for detector in job.inputs["detector"]],
            "told": {name: s.notes for name, s in by_detector.items() if s.notes},
            "seconds": detections.seconds,
            "untrained": untrained,
            "incomplete": scan_findings.describe_incomplete(data, detections.failed),
            **source_notes,
        }
        problems = [*job.notes["incomplete"], *filter(None, [untrained])]
        scanned = input_name(job.inputs["data"])
        log = scan_sarif.build_log(data, by_detector, scanned, problems, job.notes["verdict"])
        write_json(job.folder / scan_sarif.FILE, log)
        if self.write == "shards":
            job.notes |= keep_lists.write_clean_copy(
                job.folder / "shards", data, kept_rows, job.progress
            )
        return source_metrics | self._measure(job, data, merged, by_detector, removed, surplus)

    def _describe_keep_list(self, removed: int, surplus: int, records: int) -> str:
        """What the keep-list leaves out, as a part of the verdict."""
        text = f"keep.txt leaves out the {removed:,} most suspicious of {records:,} records"
        if self.dedup:
            text += f" and {surplus:,} more copies of pictures with diverging captions"
        return text

    def _write_records(
        self,
        folder: Path,
        data: Corpus,
        order: Rows,
        removed: int,
        surplus: Rows,
        merged: Scores,
        by_detector: dict[str, Scores],
    ) -> None:
        """Write all scores, the worst records, those that leave, windows, and what is exported.

        order: all rows, the most suspicious first, of which the first `removed` leave; surplus: rows of copies that leave too.
        """
        corpus.write_scores(folder / corpus.SCORES, data, merged, by_detector)
        removal_lists.write_scores_csv(folder, corpus.SCORES)
        leaving = np.concatenate([order[:removed], surplus])
        removal_lists.write_removed(folder, data, leaving, removed, merged, by_detector)
        worst = [
            scan_findings.record_json(data, row, merged, by_detector)
            for row in order[:RANKED].tolist()
        ]
        write_json(folder / "ranked.json", worst)
        shown = order[: max(RANKED, removed)]
        if any(scores.boxes is not None for scores in by_detector.values()):
            ids, boxes = flagged_windows(by_detector, shown)
            reliability.write_windows(folder, ids, boxes)
        exports.export_rows(folder, data, shown, merged, by_detector, self.export)

    def _check_fields(self, job: Job) -> None:
        """Lend the reference to the detectors. Raises UserError for a share out of range, and for what no detector takes."""
        detectors = reference_reading.lend_reference(
            job.inputs["detector"], self.reference, job.inputs["data"]
        )
        job.inputs["detector"] = detectors
        if not 0 <= self.remove < 1:
            raise UserError(f"remove must be a share in 0..1; got {self.remove}")
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
            metrics |= scan_findings.detection_metrics(plan, merged, by_detector)
            metrics |= goal_measures.measure_goals(plan, merged, by_detector)
            metrics |= scan_findings.removal_metrics(
                plan, {merged.ids[row] for row in (*removed, *surplus)}
            )
        metrics |= scan_findings.decision_metrics(by_detector)
        reliability_metrics, notes = reliability.measure_ranking(
            job.inputs["data"],
            dataset,
            data,
            merged,
            removed,
            self.leaks or self._trains(job),
            self.trusted,
        )
        job.notes |= notes
        encoder = job.inputs["encoder"]
        is_independent = encoder is not None and not (
            isinstance(encoder, Run) and inputs.was_trained_on(encoder, job.inputs["data"])
        )
        integrity_metrics, notes = integrity.check_integrity(data, job.folder, is_independent)
        job.notes |= notes
        return metrics | reliability_metrics | integrity_metrics

    def planned_trials(self, settings: Settings) -> list[Trial]:
        """The training that a scan without an encoder runs, for an estimate."""
        data = self.data
        if isinstance(data, (str, Path)):
            found = find_input(str(data), "data", settings.runs)
            data = found if isinstance(found, Run) else registry.make(*found)
        is_plain = not isinstance(data, Run) and callable(data)
        if self.encoder is not None or (isinstance(data, Run) and inputs.find_encoder(data)):
            return []
        suspects = suspect_training.limit_data(data) if is_plain else data
        count = count_records(suspects, settings) or suspect_training.MAX_RECORDS
        plan = suspect_training.plan_training(count, suspect_training.SIDE, True)
        return [Trial(Train(suspects, plan.network, plan.objective), settings.seed)]

    def _trains(self, job: Job) -> bool:
        """Whether a model is trained on the data, because no encoder is given and the data bring none."""
        data = job.inputs["data"]
        return (
            job.inputs["encoder"] is None
            and not (isinstance(data, Run) and inputs.find_encoder(data))
            and as_source(inputs.open_source(inputs.open_dataset(data).method)).has_images
        )

    def _choose_encoder(self, job: Job) -> tuple[Any, str]:
        """What embeds the records, trained on them where it has to be; and a warning where it never saw them, or ""."""
        if not self._trains(job):
            encoder = embedding_encoder(job)
            untrained = "" if encoder is None else untrained_warning(encoder, job)
            if untrained:
                warn(f"scan: {untrained}")
            return encoder, untrained
        data = job.inputs["data"]
        suspects = data if isinstance(data, Run) else suspect_training.limit_data(data)
        records = inputs.open_dataset(suspects).records
        captions = bool(len(records.captions))
        if self.detector == DEFAULT_DETECTORS and not captions:
            raise UserError(
                "these images have no captions, and the default detectors look for captions that do not fit; "
                "--detector dao looks at images alone"
            )
        plan = suspect_training.plan_training(len(records), records.size, captions)
        if self.detector == DEFAULT_DETECTORS:
            more = [registry.make("detector", name) for name in BESIDE_TRAINING]
            job.inputs["detector"] = (*job.inputs["detector"], *more)
        names = [registry.method_name(type(detector)) for detector in job.inputs["detector"]]
        warn(f"scan: {plan.describe()}; then {', '.join(names)} and side channels")
        return job.run(Train(suspects, plan.network, plan.objective)), ""

    @staticmethod
    def fails(case: str, manifest: Mapping[str, Any]) -> bool:
        """Whether a detector that decides has found a trigger."""
        return any(_decisions(manifest))

    @staticmethod
    def undecided(manifest: Mapping[str, Any]) -> list[str]:
        """Why it could not be told whether there is a trigger; empty where it could."""
        reasons = [manifest["notes"].get("untrained") or ""]
        if not _decisions(manifest):
            reasons.append("no detector that decides could be run")
        return [reason for reason in reasons if reason]


def _decisions(manifest: Mapping[str, Any]) -> list[float]:
    """For each detector that decides, the share of the records that it raised."""
    metrics = manifest["metrics"].items()
    return [float(measure["value"]) for name, measure in metrics if name.endswith(".raised")]


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
    return data if encoder is None else encoder


def untrained_warning(encoder: Any, job: Job) -> str:
    """A warning where the encoder is not known to have been trained on the scanned data, if a detector needs that; else ""."""
    deciding = [d for d in job.inputs["detector"] if getattr(d, "decides", False)]
    if not deciding or not all(getattr(d, "reads_training", False) for d in deciding):
        return ""
    if isinstance(encoder, Run) and inputs.was_trained_on(encoder, job.inputs["data"]):
        return ""
    names = ", ".join(registry.method_name(type(d)) for d in deciding)
    return (
        f"this encoder is not known to have been trained on these data, and {names} sees a trigger only in one that was; "
        "without --encoder a small one is trained on them"
    )


def partly_trained_warning(encoder: Any, data: Corpus, trained_here: bool) -> str:
    """A warning where the model that the scan trained has seen a part of the records alone; otherwise ""."""
    if not trained_here:
        return ""
    seen = int(encoder.manifest["notes"].get("records", 0))
    if seen < suspect_training.MAX_RECORDS or len(data) <= seen:
        return ""
    return (
        f"the model was trained on the first {seen:,} of {len(data):,} records, and a trigger that is only in others does "
        "not show in it; --encoder names one that was trained on all"
    )


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
        problems = scan_findings.describe_incomplete(data, detections.failed)
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
