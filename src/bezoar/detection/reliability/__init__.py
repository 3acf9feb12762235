"""Reliability: what a scan's ranking is worth.

With a sample of clean records, how many false discoveries it holds; where the truth is known, which
side channels tell it and which poisons pass the filters that people use anyway. And where in an
image a detector saw something.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bezoar.data.files.artefacts import parse_json
from bezoar.data.files.tensors import read_tensors, write_tensors
from bezoar.detection.corpus.corpus import Corpus
from bezoar.detection.reliability import false_discoveries, side_channels, usual_filters
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, Scores
from bezoar.runs.inputs import Dataset

WINDOWS = "windows.safetensors"

Box = tuple[int, int, int, int]  # top, left, height, width


def measure_ranking(
    scanned: Any,
    dataset: Dataset,
    corpus: Corpus,
    merged: Scores,
    removed: NDArray[np.int64],
    look_at_side_channels: bool,
    trusted: str,
) -> tuple[dict[str, Measure], dict[str, Any]]:
    """Return what is said here of a finished ranking.

    Args:
        scanned: The run or data method that was scanned.
        dataset: What it opens as.
        merged: Their scores.
        removed: int64, the worst rows, which the keep-list leaves out.
        look_at_side_channels: Whether to; without a plan, for what they tell of the removed
            records.
        trusted: A file with the ids of a random sample of clean records, one a line; "" without
            one.

    Returns:
        Metrics, and notes for the manifest.
    """
    measures: dict[str, Measure] = {}
    notes: dict[str, Any] = {}
    if trusted:
        estimate = false_discoveries.estimate_from_file(merged, trusted, [len(removed)])
        measures |= {
            f"expected_clean@{n}": m for n, m in zip(estimate.n, estimate.counts, strict=True)
        }
        notes["discovery"] = {
            "how": "reference",
            "why": estimate.why,
            "assumption": false_discoveries.ASSUMPTION,
        }
    poisoned = bool(dataset.plan.edits)
    truth, what = dataset.plan.mask(corpus.ids), "poisons"
    if not poisoned:
        truth[removed], what = True, "removed records"
    sizes = None
    if look_at_side_channels:
        channels = side_channels.collect_channels(scanned, dataset, corpus.ids, corpus.captions)
        measured = side_channels.measure_channels(channels, truth, what)
        measures |= {f"leak.{channel.name}.auroc": channel.auroc for channel in measured}
        notes["leaks"] = {
            "separates": [channel.name for channel in measured if channel.separates],
            "not_applicable": _by_reason(channels.absent),
            "of": what,
        }
        sizes = channels.sizes
    if poisoned:
        has_images = corpus.source.has_images
        filters = usual_filters.apply_filters(corpus, corpus.embedded, sizes, has_images)
        measures |= usual_filters.measure_filters(filters, truth)
        notes["filters"] = {f.name: f.why for f in filters if f.passes is None}
    return measures, notes


def _by_reason(absent: dict[str, str]) -> dict[str, list[str]]:
    """name -> why it is absent, turned round: why -> names."""
    names: dict[str, list[str]] = {}
    for name, why in absent.items():
        names.setdefault(why, []).append(name)
    return names


def write_windows(folder: Path, ids: Sequence[str], boxes: Tensor) -> None:
    """Write windows.safetensors: the windows of images in which a detector saw something, for the
    page to draw.

    Args:
        ids: M keys.
        boxes: int (M, 4): top, left, height, width in pixels of the images as they are scanned.
    """
    text = torch.from_numpy(np.frombuffer(json.dumps(list(ids)).encode(), np.uint8).copy())
    write_tensors(folder / WINDOWS, {"ids": text, "boxes": boxes.to(torch.int32)})


def read_windows(folder: Path) -> dict[str, Box]:
    """Return what `write_windows` wrote, if anything. Raises UserError for another file."""
    path = folder / WINDOWS
    if not path.exists():
        return {}
    try:
        tensors = read_tensors(path)
        ids, boxes = parse_json(bytes(tensors["ids"].numpy()).decode(), path), tensors["boxes"]
    except (UserError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} holds no windows: {error}") from error
    valid = isinstance(ids, list) and all(isinstance(key, str) for key in ids)
    if not valid or boxes.shape != (len(ids), 4):
        raise UserError(
            f"{path} holds no list of ids with a box each; boxes are of shape {tuple(boxes.shape)}"
        )
    windows: dict[str, Box] = {}
    for key, (top, left, height, width) in zip(ids, boxes.tolist(), strict=True):
        windows[key] = int(top), int(left), int(height), int(width)
    return windows
