"""A scan's findings as SARIF: one rule a detector that decides, one result a record that it raised.

A record that is only ranked is no result. Where nothing is raised a rule has one result of the
level `note`, never `none` or a kind `pass`: no scan shows data clean.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bezoar.detection.corpus.corpus import Corpus
from bezoar.detection.corpus.exports import own_file
from bezoar.detection.scan_findings import describe_nothing
from bezoar.evaluation import sarif_log
from bezoar.evaluation.scores import Scores

FILE = "scan.sarif"
MOST_RESULTS = 1000  # of a rule; code-scanning tools take a few thousand in all
HELP = "The record carries a trigger that the detector found and tested; see the run's report.html."


def build_log(
    corpus: Corpus,
    by_detector: Mapping[str, Scores],
    data: str,
    undecided: Sequence[str],
    verdict: str,
) -> dict[str, Any]:
    """The log of a scan, as JSON.

    Args:
        by_detector: the scores of each detector.
        undecided: sentences that say what could not be told or done.
    """
    rules: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for name, scores in by_detector.items():
        if scores.raised is None:
            continue
        rule: dict[str, Any] = {
            "ruleId": f"detector/{name.partition(':')[0]}",
            "ruleIndex": len(rules),
        }
        rules.append(build_rule(rule["ruleId"]))
        rows = np.flatnonzero(scores.raised.cpu().numpy())
        what = "a trigger" if scores.groups is None else "a picture with many captions"
        results += [
            rule | raised_result(corpus, row, name, what) for row in rows[:MOST_RESULTS].tolist()
        ]
        if not len(rows) and scores.groups is None:
            text = f"{data}: {describe_nothing(name, scores)}"
            results.append(rule | note_result(text, data))
        elif len(rows) > MOST_RESULTS:
            text = (
                f"{data}: {name} raised {len(rows):,} records; the first {MOST_RESULTS:,} are "
                "listed, removed.csv has all"
            )
            results.append(rule | note_result(text, data))
    return sarif_log.build_log(rules, results, undecided, verdict)


def build_rule(rule: str) -> dict[str, Any]:
    """The rule of a detector."""
    return {
        "id": rule,
        "name": rule.rpartition("/")[2].title().replace("_", ""),
        "shortDescription": {"text": "A record that shows a trigger"},
        "help": {"text": HELP},
        "defaultConfiguration": {"level": "error"},
        "properties": {"tags": ["security", "backdoor"]},
    }


def raised_result(corpus: Corpus, row: int, detector: str, what: str) -> dict[str, Any]:
    """A record that a detector raised, and what it found in it."""
    path, key = own_file(corpus, row), corpus.ids[row]
    place = os.path.relpath(path) if path and path.is_relative_to(Path.cwd()) else str(path or "")
    place = place or corpus.place_of(row)
    return {
        "level": "error",
        "message": {"text": f"{place}: {detector} found {what} in record {key}"},
        "locations": [sarif_log.locate(place)],
        "partialFingerprints": {"bezoar/record/v1": key},
    }


def note_result(text: str, data: str) -> dict[str, Any]:
    """A result that is no finding."""
    return {
        "level": "note",
        "message": {"text": text},
        "locations": [sarif_log.locate(data)],
        "partialFingerprints": {"bezoar/data/v1": data},
    }
