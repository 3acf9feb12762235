"""The findings of a scan and what it could not do, in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from bezoar import registry
from bezoar.detection import suspect_training
from bezoar.detection.corpus import keep_lists
from bezoar.detection.corpus.corpus import Corpus
from bezoar.detection.ranking import Ranking
from bezoar.evaluation.scores import Scores
from bezoar.runs import inputs
from bezoar.runs.execute import Job
from bezoar.runs.run import Run

MAX_REASONS = 6  # reasons why records could not be read, in one line


def describe_incomplete(data: Corpus, failed: Sequence[str]) -> list[str]:
    """A line for each kind of thing that was asked and not done."""
    summary = data.summary
    lines = list(failed)
    if summary["unread"]:
        reasons = list(summary["reasons"].items())[:MAX_REASONS]
        text = ", ".join(f"{n} {reason}" for reason, n in reasons)
        lines.append(
            f"{summary['unread']} records or files could not be read, beside {len(data)} that "
            f"were: {text}; see skipped.jsonl"
        )
    if summary["doubles"]:
        lines.append(
            f"{summary['doubles']} records have an id that another has, and another name here; see "
            "skipped.jsonl"
        )
    return lines


def describe_decisions(by_detector: Mapping[str, Scores]) -> list[str]:
    """Return what detectors decided, a line each. Nothing found is no proof of absence."""
    deciding = {name: s for name, s in by_detector.items() if s.raised is not None}
    lines = []
    for name, scores in deciding.items():
        if scores.raised is not None and (n := int(scores.raised.sum())):
            what = "a trigger" if scores.groups is None else "pictures with many captions"
            lines.append(f"{name} found {what} in {n:,} record{'s' * (n != 1)}")
    return lines or [
        describe_nothing(name, scores) for name, scores in deciding.items() if scores.groups is None
    ]


def describe_nothing(name: str, scores: Scores) -> str:
    """Return what a detector that raised no record looked for. It never reads as a clean bill."""
    looked_for = (scores.notes or {}).get("looked_for", "")
    kinds = f" ({looked_for})" if looked_for else ""
    return f"{name} found no trigger{kinds}, which is no proof that there is none"


def describe_keep_list(ranking: Ranking, copies: bool) -> str:
    """Return what the keep-list leaves out. copies: whether further copies leave, too."""
    text = (
        f"keep.txt leaves out the {len(ranking.removed):,} most suspicious of "
        f"{len(ranking.order):,} records"
    )
    if copies:
        text += f" and {len(ranking.surplus):,} more copies of pictures with diverging captions"
    return text


def untrained_warning(encoder: Any, job: Job) -> str:
    """A warning where the encoder is not known to have been trained on the scanned data, if a
    detector needs that; else "".
    """
    deciding = [d for d in job.inputs["detector"] if getattr(d, "decides", False)]
    if not deciding or not all(getattr(d, "reads_training", False) for d in deciding):
        return ""
    if isinstance(encoder, Run) and inputs.was_trained_on(encoder, job.inputs["data"]):
        return ""
    names = ", ".join(registry.method_name(type(d)) for d in deciding)
    return (
        f"this encoder is not known to have been trained on these data, and {names} sees a trigger "
        "only in one that was; without --encoder a small one is trained on them"
    )


def partly_trained_warning(encoder: Run, data: Corpus) -> str:
    """A warning where the scan's own model has seen a part of the records alone; else ""."""
    seen = int(encoder.manifest["notes"].get("records", 0))
    if seen < suspect_training.MAX_RECORDS or len(data) <= seen:
        return ""
    return (
        f"the model was trained on the first {seen:,} of {len(data):,} records, and a trigger that "
        "is only in others does not show in it; --encoder names one that was trained on all"
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


def record_json(data: Corpus, row: int, ranking: Ranking) -> dict[str, Any]:
    """A record as in ranked.json. copy_of: another record of its picture, if known."""
    copy = keep_lists.find_copy(row, data.captions, ranking.by_detector.values())
    return {
        "id": data.ids[row],
        "place": data.place_of(row),
        "caption": data.captions[row] if len(data.captions) else "",
        "score": float(ranking.merged.values[row]),
        "detectors": {
            name: float(scores.values[row]) for name, scores in ranking.by_detector.items()
        },
        "copy_of": "" if copy is None else data.ids[copy],
    }
