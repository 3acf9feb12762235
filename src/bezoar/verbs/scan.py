"""Rank the records of a data set by how suspicious they are."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from bezoar import registry
from bezoar.errors import UserError
from bezoar.runs.execute import Job
from bezoar.runs.run import Run
from bezoar.runs.verb import Input, Takes

if TYPE_CHECKING:
    from bezoar.detection.corpus.corpus import Corpus
    from bezoar.evaluation.scores import Scores

RANKED = 500  # records of ranked.json
DEFAULT = (
    "transplant",
    "duplicates",
    "clip_score",
)  # backdoors that took, targeted poisons, captions that do not fit


@dataclass(frozen=True)
class Scan:
    """Rank a data set's records, most suspicious first, and write a keep-list. Several detectors are merged by rank.

    Shards, tables, folders and ready embeddings of any size are embedded piece by piece; a scan that was cut off goes on with
    the piece it was in. What cannot be read is named and left out, and the exit status is then 4 in place of 0.
    """

    data: Annotated[
        Input,
        Takes("data", positional=True),
        "data set, poison run, or a train run: its data scanned with its encoder",
    ]
    encoder: Annotated[
        Input, Takes("encoder"), "what embeds the records; without it, the train run's own"
    ] = None
    detector: Annotated[tuple[Input, ...], Takes("detector"), "see `bezoar list detector`"] = (
        DEFAULT
    )
    remove: Annotated[
        float, "share of the records, the worst first, that the keep-list leaves out"
    ] = 0.03
    write: Annotated[
        Literal["keep-list", "shards"], "lists alone, or cleaned shards too (of files: their bytes)"
    ] = "keep-list"
    leaks: Annotated[
        bool,
        "can file sizes, headers, order, paths or caption templates alone tell poisons from the rest",
    ] = False
    trusted: Annotated[
        str,
        "file of ids of records known to be clean, a random sample: calibrates false discoveries",
    ] = ""

    def files(self) -> list[Path]:
        """The list of clean records, so that a changed one is another question. Raises UserError when it is not there."""
        from bezoar.data.files.paths import existing_file

        return [existing_file(self.trusted, "list of clean records")] if self.trusted else []

    def work(self, job: Job) -> dict[str, Any]:
        """-> scores.parquet (all scores), ranked.json (the worst 500), keep.txt, keep.parquet, skipped.jsonl, and figures.

        The plan of a poisoned set, where there is one, is read only after the ranking is written, to measure it.
        """
        from bezoar.detection import merging, reliability
        from bezoar.detection.corpus import corpus, keep_lists
        from bezoar.runs import inputs

        if not 0 <= self.remove < 1:
            raise UserError(f"remove must be a share in 0..1; got {self.remove}")
        data = corpus.embed_corpus(
            job.inputs["data"], self._by(job), job.folder, job.settings, job.progress
        )
        if small := coarse(data):
            print(f"scan: {small}", file=sys.stderr)
        found, failed, seconds = detected(job.inputs["detector"], data, job)
        merged = merging.merge(list(found.values()))
        order, removed = merged.ranking(), round(self.remove * len(data))
        corpus.write_scores(job.folder / corpus.SCORES, data, merged, found)
        kept = order[removed:].copy()
        kept.sort()
        keep_lists.write_keep_lists(job.folder, data, kept)
        worst = [row(data, i, merged, found) for i in order[:RANKED].tolist()]
        inputs.write_json(job.folder / "ranked.json", worst)
        if any(s.boxes is not None for s in found.values()):
            reliability.write_windows(
                job.folder, *flagged_windows(found, order[: max(RANKED, removed)])
            )
        job.notes = data.reading_notes() | {
            "records": len(data),
            "removed": removed,
            "decided": said(found),
            "verdict": "; ".join(
                [
                    *said(found),
                    f"keep.txt leaves out the {removed:,} most suspicious of {len(data):,} records",
                ]
            )
            + "; ranked.json names them",
            "detectors": [registry.spec(d) for d in job.inputs["detector"]],
            "told": {k: s.notes for k, s in found.items() if s.notes},
            "seconds": seconds,
            "incomplete": incomplete(data, failed),
        }
        if self.write == "shards":
            job.notes |= keep_lists.write_clean_copy(
                job.folder / "shards", data, kept, job.progress
            )
        parts = inputs.open_dataset(job.inputs["data"])
        job.goals = [
            vars(g) for g in parts.plan.goals
        ]  # the encoder's own are no attack on these data
        out = measured(parts.plan, merged, found, order[:removed]) if parts.plan.edits else {}
        more, told = reliability.measure_ranking(
            job.inputs["data"],
            parts,
            data,
            merged,
            found,
            order[:removed],
            self.leaks,
            self.trusted,
        )
        job.notes |= told
        return out | decided(found) | more

    def _by(self, job: Job) -> Any:
        """What embeds the records: a run or a method; None for ready embeddings. Raises UserError when it is not known."""
        from bezoar.data.source import as_source
        from bezoar.runs import inputs

        data, given = job.inputs["data"], job.inputs["encoder"]
        source = as_source(inputs.open_source(inputs.open_dataset(data).method))
        if not source.has_images:
            if given is not None:
                raise UserError("these data are embeddings already; leave --encoder out")
            return None
        if given is None and not isinstance(data, Run):
            raise UserError(
                "give --encoder: what embeds the records (a train run, or a network with weights)"
            )
        return data if given is None else given


def coarse(data: Corpus) -> str:
    """What to tell whoever has images made smaller than the encoder takes them; nothing of others."""
    size, wanted = getattr(data.source, "size", 0), getattr(data.encoder, "preprocess", None)
    if not size or wanted is None or size >= wanted.size:
        return ""
    return f"images are read at {size} pixels a side, and the encoder takes {wanted.size}; size={wanted.size} reads them whole"


def detected(
    detectors: Sequence[Any], data: Corpus, job: Job
) -> tuple[dict[str, Scores], list[str], dict[str, float]]:
    """Each detector's scores by its name, by its spec where a name is asked for twice; a line for each that refused; seconds.

    What several share (neighbours, a short training) is in the seconds of the first. Raises UserError when none is left.
    """
    found: dict[str, Scores] = {}
    failed: list[str] = []
    seconds: dict[str, float] = {}
    names = [registry.method_name(type(d)) for d in detectors]
    for detector, name in zip(detectors, names, strict=True):
        name = name if Counter(names)[name] == 1 else registry.spec(detector)
        start = time.perf_counter()
        try:
            found[name] = scores(detector, name, data, job)
        except UserError as error:
            failed.append(f"detector {name}: {error}")
        seconds[name] = round(time.perf_counter() - start, 2)
    if not found:
        raise UserError("; ".join(failed) or "give a --detector")
    return found, failed, seconds


def scores(detector: Any, name: str, data: Corpus, job: Job) -> Scores:
    """One detector's scores, its progress told by itself (`report`) or by the images that pass through the encoder."""

    def report(done: int, total: int, text: str = "") -> None:
        job.progress.step(done, total, f"{name}: {text}" if text else name)

    if "report" in getattr(detector, "needs", ()):
        return detector(data.encoder, data, report=report)
    with counted(data.encoder, expected(detector, len(data)), job.progress, name):
        return detector(data.encoder, data)


def flagged_windows(found: dict[str, Scores], rows: Any) -> tuple[list[str], Any]:
    """Ids and windows, int64 (M, 4), of those of the rows for which a detector says where; of several, the first that does."""
    import torch

    ids, boxes = next(iter(found.values())).ids, torch.full((len(rows), 4), -1)
    for one in found.values():
        if one.boxes is not None:
            boxes = torch.where(boxes[:, 2:3] > 0, boxes, one.boxes.cpu()[torch.from_numpy(rows)])
    known = (boxes[:, 2] > 0).nonzero()[:, 0].tolist()
    return [ids[rows[i]] for i in known], boxes[known]


def row(data: Corpus, i: int, merged: Scores, found: dict[str, Scores]) -> dict:
    """A record as it stands in ranked.json."""
    caption = data.captions[i] if len(data.captions) else ""
    each = {k: float(s.values[i]) for k, s in found.items()}
    return {
        "id": data.ids[i],
        "place": data.place_of(i),
        "caption": caption,
        "score": float(merged.values[i]),
        "detectors": each,
    }


def incomplete(data: Corpus, failed: Sequence[str]) -> list[str]:
    """A line for each kind of what was asked and not done; none: everything was."""
    told, lines = data.summary, list(failed)
    if told["unread"]:
        why = ", ".join(f"{n} {reason}" for reason, n in list(told["reasons"].items())[:6])
        lines.append(
            f"{told['unread']} records or files could not be read, beside {len(data)} that were: {why}; see skipped.jsonl"
        )
    if told["doubles"]:
        lines.append(
            f"{told['doubles']} records have an id that another has, and another name here; see skipped.jsonl"
        )
    return lines


def measured(plan: Any, merged: Scores, found: dict[str, Scores], removed: Any) -> dict[str, Any]:
    """How well the poisons of a known plan were found, by all detectors together and by each."""
    import torch

    from bezoar.evaluation.scores import detection_measures

    truth = torch.from_numpy(plan.mask(merged.ids))
    out = detection_measures(merged, truth)
    for name, one in found.items() if len(found) > 1 else ():
        known = truth if one.ids is merged.ids else torch.from_numpy(plan.mask(one.ids))
        out |= {f"{name}.{k}": m for k, m in detection_measures(one, known).items()}
    return out | removal(plan, {merged.ids[i] for i in removed})


def decided(found: dict[str, Scores]) -> dict[str, Any]:
    """Of detectors that say which records show an attack: their share. On clean data all of these are false."""
    from bezoar.evaluation.scores import proportion

    how = "share of the records that are said to show a trigger; of clean data, false alarms"
    return {
        f"{k}.raised": proportion(int(s.raised.sum()), len(s), how)
        for k, s in found.items()
        if s.raised is not None
    }


def said(found: dict[str, Scores]) -> list[str]:
    """What detectors decided, a line each; that nothing was found says nothing of what there is."""
    deciding = {k: int(s.raised.sum()) for k, s in found.items() if s.raised is not None}
    lines = [
        f"{k} found a trigger in {n:,} record{'s' * (n != 1)}" for k, n in deciding.items() if n
    ]
    return lines or [
        f"{k} found no trigger, which is no proof that there is none" for k in deciding
    ]


def expected(detector: Any, n: int) -> int:
    """Images that a detector will embed: what it says itself, or each record once."""
    return detector.passes(n) if hasattr(detector, "passes") else n


@contextmanager
def counted(encoder: Any, total: int, progress: Any, name: str) -> Iterator[None]:
    """Report progress by the images that pass through the encoder's image tower."""
    if not hasattr(encoder, "image"):  # vectors without an encoder
        yield
        return
    done = 0

    def count(_: Any, given: Any, __: Any) -> None:
        nonlocal done
        done += len(given[0])
        progress.step(min(done, total), total, name)

    progress.step(0, total, name)
    hook = encoder.image.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()


def removal(plan: Any, removed: set[str]) -> dict[str, Any]:
    """How many of the poisons the keep-list leaves out, over all and by goal."""
    from bezoar.evaluation.scores import proportion

    hit = sum(e.id in removed for e in plan.edits)
    return {
        "poisons_removed": proportion(hit, len(plan.edits), "poisons that the keep-list leaves out")
    }
