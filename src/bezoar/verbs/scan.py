"""Rank the records of a data set by how suspicious they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from bezoar import registry
from bezoar.data.files.paths import existing_file
from bezoar.data.files.writing import write_json
from bezoar.data.source import as_source
from bezoar.detection import (
    merging,
    reference_reading,
    reliability,
    scan_findings,
    scan_measures,
    scan_sarif,
    scoring,
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
from bezoar.detection.ranking import Ranking, raising_detectors, rank_records
from bezoar.detection.reliability import integrity
from bezoar.detection.source_table import SourceTable
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, Scores
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


@dataclass(frozen=True)
class Scan:
    """Rank a data set's records, most suspicious first, and write a keep-list. Several detectors
    are merged by rank.

    Without an encoder, a small model is trained on the data first: a trigger shows only in a model
    that has learnt it. Shards, tables, folders and ready embeddings of any size are embedded piece
    by piece; a scan that was cut off goes on with the piece it was in. What cannot be read is named
    and left out, and the exit status is then 4 in place of 0.
    """

    sweeps: ClassVar[bool] = True
    fail_on: ClassVar[dict[str, str]] = {"trigger": "a detector finds a trigger"}
    run_fields: ClassVar[dict[str, str]] = {"reference": "encoder"}
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
        "a folder, tars, a table, a `datasets` folder, embeddings, a spec, or a run; of a train "
        "run, its data with its encoder",
    ]
    encoder: Annotated[
        Input,
        Takes("encoder"),
        "what embeds the records; without it the train run's own, or a small model trained on the "
        "data",
    ] = None
    detector: Annotated[tuple[Input, ...], Takes("detector"), "see `bezoar list detector`"] = (
        DEFAULT_DETECTORS
    )
    remove: Annotated[
        float,
        "share of the records, the worst first, that the keep-list leaves out; it leaves out all "
        "that are raised",
    ] = 0.03
    dedup: Annotated[
        int,
        "records that the keep-list keeps of one picture with diverging captions, as `duplicates` "
        "finds them; 0: any number",
    ] = 0
    write: Annotated[
        Literal["keep-list", "shards"], "lists alone, or cleaned shards too (of files: their bytes)"
    ] = "keep-list"
    leaks: Annotated[
        bool,
        "measure whether file sizes, headers, order, paths or caption templates alone separate "
        "poisons",
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
        "encoder that never saw the data (a file of weights, a run, a spec), for the detectors "
        "that take one: common_cause reads photographs by it",
    ] = ""
    sources: Annotated[
        str,
        "what records come from, to pool them: auto, metadata, domain, folder, shard, none, or a "
        "table of id, source",
    ] = "auto"

    def files(self) -> list[Path]:
        """The files that plain fields name, part of the question. Raises UserError without one."""
        trusted = [existing_file(self.trusted, "list of clean records")] if self.trusted else []
        reference = reference_reading.reference_files(self.reference)
        return [*trusted, *reference, *record_sources.check_wanted(self.sources)]

    def work(self, job: Job) -> dict[str, Measure]:
        """Rank the records, write the lists, and measure the ranking where the poisons are known.

        Writes scores.parquet and scores.csv (all scores), ranked.json (the worst 500), keep.txt,
        keep.parquet, removed.csv, skipped.jsonl and scan.sarif. The plan of a poisoned set is read
        only after the ranking is written.
        """
        self._check_fields(job)
        encoder, untrained = self._choose_encoder(job)
        data = corpus.embed_corpus(
            job.inputs["data"], encoder, job.folder, job.settings, job.progress
        )
        if self._trains(job):
            untrained = scan_findings.partly_trained_warning(encoder, data)
        if warning := scan_findings.resolution_warning(data):
            warn(f"scan: {warning}")
        detections = scoring.run_detectors(job.inputs["detector"], data, job)
        ranking, sources = self._rank(job.folder, data, detections.scores)
        self._write_lists(job.folder, data, ranking)
        decisions = scan_findings.describe_decisions(ranking.by_detector)
        left_out = scan_findings.describe_keep_list(ranking, bool(self.dedup))
        source_sentences, source_notes, source_metrics = source_pooling.describe_table(sources)
        verdict = [*decisions, left_out, "ranked.json names them", *source_sentences]
        job.notes = data.reading_notes() | {
            "records": len(data),
            "size": data.source.size,
            "removed": len(ranking.removed),
            "deduplicated": len(ranking.surplus),
            "leaving": raising_detectors(ranking.by_detector, self.dedup),
            "decided": decisions,
            "verdict": "; ".join(verdict),
            "detectors": [registry.spec(detector) for detector in job.inputs["detector"]],
            "detector_notes": {
                name: scores.notes for name, scores in ranking.by_detector.items() if scores.notes
            },
            "seconds": detections.seconds,
            "untrained": untrained,
            "incomplete": scan_findings.describe_incomplete(data, detections.failed),
            **source_notes,
        }
        self._write_sarif(job, data, ranking)
        if self.write == "shards":
            job.notes |= keep_lists.write_clean_copy(
                job.folder / "shards", data, ranking.kept, job.progress
            )
        return source_metrics | self._measure(job, data, ranking)

    def _rank(
        self, folder: Path, data: Corpus, by_detector: dict[str, Scores]
    ) -> tuple[Ranking, SourceTable | None]:
        """Merge the detectors' scores, pool them by source, and choose the records that leave."""
        merged = merging.merge(list(by_detector.values()))
        sources = source_pooling.pool_sources(data, merged, by_detector, self.sources)
        if sources is not None:
            merged = source_pooling.lift_records(merged, sources, by_detector)
            source_pooling.write_table(folder, data, sources)
        return rank_records(merged, by_detector, self.remove, self.dedup), sources

    def _write_lists(self, folder: Path, data: Corpus, ranking: Ranking) -> None:
        """Write scores, the worst records, what leaves and stays, windows, and exports."""
        corpus.write_scores(folder / corpus.SCORES, data, ranking.merged, ranking.by_detector)
        removal_lists.write_scores_csv(folder, corpus.SCORES)
        removal_lists.write_removed(folder, data, ranking)
        worst = ranking.order[:RANKED].tolist()
        records = [scan_findings.record_json(data, row, ranking) for row in worst]
        write_json(folder / "ranked.json", records)
        shown = ranking.order[: max(RANKED, len(ranking.removed))]
        if any(scores.boxes is not None for scores in ranking.by_detector.values()):
            reliability.write_windows(folder, *ranking.windows(shown))
        exports.export_rows(folder, data, shown, ranking, self.export)
        keep_lists.write_keep_lists(folder, data, ranking.kept)

    def _write_sarif(self, job: Job, data: Corpus, ranking: Ranking) -> None:
        """Write scan.sarif; what the scan could not do is among its notifications."""
        problems = [*job.notes["incomplete"], *filter(None, [job.notes["untrained"]])]
        scanned = input_name(job.inputs["data"])
        log = scan_sarif.build_log(
            data, ranking.by_detector, scanned, problems, job.notes["verdict"]
        )
        write_json(job.folder / scan_sarif.FILE, log)

    def _check_fields(self, job: Job) -> None:
        """Lend the reference to the detectors. Raises UserError for a share out of range, and for
        what no detector takes.
        """
        detectors = reference_reading.lend_reference(
            job.inputs["detector"], self.reference, job.inputs["data"]
        )
        job.inputs["detector"] = detectors
        if not 0 <= self.remove < 1:
            raise UserError(f"remove must be a share in 0..1; got {self.remove}")
        names = [registry.method_name(type(detector)) for detector in detectors]
        if self.dedup < 0 or (self.dedup and "duplicates" not in names):
            raise UserError("dedup must be at least 0, and needs --detector duplicates")

    def _measure(self, job: Job, data: Corpus, ranking: Ranking) -> dict[str, Measure]:
        """The metrics, now that the ranking is written and the plan may be read."""
        dataset = inputs.open_dataset(job.inputs["data"])
        # Goals of the encoder are no attack on these data.
        job.goals = [vars(goal) for goal in dataset.plan.goals]
        metrics = scan_measures.plan_metrics(dataset.plan, ranking)
        metrics |= scan_measures.decision_metrics(ranking.by_detector)
        reliability_metrics, notes = reliability.measure_ranking(
            job.inputs["data"],
            dataset,
            data,
            ranking.merged,
            ranking.removed,
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
        size = getattr(suspects, "size", None) or suspect_training.SIDE
        plan = suspect_training.plan_training(count, size, True)
        return [Trial(Train(suspects, plan.network, plan.objective), settings.seed)]

    def _trains(self, job: Job) -> bool:
        """Whether a model is trained on the data, because there is no encoder for them."""
        data = job.inputs["data"]
        return (
            job.inputs["encoder"] is None
            and not (isinstance(data, Run) and inputs.find_encoder(data))
            and as_source(inputs.open_source(inputs.open_dataset(data).method)).has_images
        )

    def _choose_encoder(self, job: Job) -> tuple[Any, str]:
        """What embeds the records, trained on them if need be; a warning if it never saw them."""
        if not self._trains(job):
            encoder = embedding_encoder(job)
            untrained = "" if encoder is None else scan_findings.untrained_warning(encoder, job)
            if untrained:
                warn(f"scan: {untrained}")
            return encoder, untrained
        data = job.inputs["data"]
        suspects = data if isinstance(data, Run) else suspect_training.limit_data(data)
        job.inputs["data"] = suspect_training.match_size(data, suspects)
        records = inputs.open_dataset(suspects).records
        captions = bool(len(records.captions))
        if self.detector == DEFAULT_DETECTORS and not captions:
            raise UserError(
                "these images have no captions, and the default detectors look for captions that "
                "do not fit; --detector dao looks at images alone"
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


def embedding_encoder(job: Job) -> Any:
    """A run or network that embeds; None for ready embeddings. Raises UserError if unknown."""
    data = job.inputs["data"]
    encoder = job.inputs["encoder"]
    source = as_source(inputs.open_source(inputs.open_dataset(data).method))
    if not source.has_images:
        if encoder is not None:
            raise UserError("these data are embeddings already; leave --encoder out")
        return None
    return data if encoder is None else encoder
