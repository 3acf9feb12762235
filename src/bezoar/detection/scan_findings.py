"""The findings and the omissions of a scan, in sentences and as metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bezoar.attacks.plan import Plan
from bezoar.detection.corpus import keep_lists
from bezoar.detection.corpus.corpus import Corpus
from bezoar.evaluation.scores import Measure, Scores, detection_measures, proportion

MAX_REASONS = 6  # reasons why records could not be read, in one line


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
    """Return what detectors decided, a line each. That nothing was found does not say that there is nothing."""
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
    """Return how well the poisons of a known plan were found, by all detectors together and by each."""
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
    """Return how many of the poisons the keep-list leaves out."""
    hits = sum(edit.id in removed_ids for edit in plan.edits)
    how = "poisons that the keep-list leaves out"
    return {"poisons_removed": proportion(hits, len(plan.edits), how)}


def record_json(
    data: Corpus, row: int, merged: Scores, by_detector: Mapping[str, Scores]
) -> dict[str, Any]:
    """A record as it stands in ranked.json. copy_of: another record of its picture, where a detector groups these."""
    copy = keep_lists.find_copy(row, data.captions, by_detector.values())
    return {
        "id": data.ids[row],
        "place": data.place_of(row),
        "caption": data.captions[row] if len(data.captions) else "",
        "score": float(merged.values[row]),
        "detectors": {name: float(scores.values[row]) for name, scores in by_detector.items()},
        "copy_of": "" if copy is None else data.ids[copy],
    }
