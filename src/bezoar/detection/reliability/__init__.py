"""Trust: what a scan's ranking is worth.

False discoveries for every ranking; where the truth is known, side channels that tell it, and the filters that poisons pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bezoar.data.files.paths import TEXT_BYTES, existing_file
from bezoar.detection.corpus.corpus import Corpus
from bezoar.detection.reliability import false_discoveries, side_channels, usual_filters
from bezoar.detection.reliability.false_discoveries import Expected
from bezoar.encoders.encoder import EmbeddedRecords
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, Scores
from bezoar.runs.inputs import Dataset

WINDOWS = "windows.safetensors"


def discoveries(
    merged: Scores, detectors: Mapping[str, Scores], trusted: str = "", more: Sequence[int] = ()
) -> tuple[dict[str, Measure], dict[str, Any]]:
    """How many of the worst n are expected to be ordinary (clean, by a reference): metrics, and what to say of them.

    trusted: a file with the ids, one a line, of records known to be clean, drawn at random; "" without one.
    """
    found = (
        by_file(merged, trusted, more)
        if trusted
        else false_discoveries.expected(merged, detectors, more)
    )
    key = "expected_clean" if trusted else "expected_ordinary"
    told = {"how": found.how, "why": found.why, "assumption": found.assumption}
    return {f"{key}@{n}": m for n, m in zip(found.n, found.counts, strict=True)}, {
        "discovery": told
    }


def by_file(merged: Scores, trusted: str, more: Sequence[int]) -> Expected:
    """By the records that a file names. Raises UserError when it names none of those that were scanned."""
    with existing_file(trusted, "list of clean records").open("rb") as file:
        known = {
            line.strip().decode("utf-8", "replace")
            for line in iter(lambda: file.readline(TEXT_BYTES), b"")
        }
    mask = np.fromiter((k in known for k in merged.ids), bool, len(merged))
    if not mask.any():
        raise UserError(f"{trusted} names none of the {len(merged)} records that were scanned")
    values = merged.values.double().cpu().numpy()
    return false_discoveries.by_reference(
        values, mask, false_discoveries.depths(int((~mask).sum()), more)
    )


def measure_side_channels(
    given: Any,
    parts: Dataset,
    ids: Sequence[str],
    captions: Sequence[str],
    truth: np.ndarray,
    what: str,
) -> tuple[dict[str, Measure], dict[str, Any], np.ndarray | None]:
    """AUROC of every side channel; what to say; and the stored sizes (N, 2) where files say them. what: `truth` in words."""
    channels = side_channels.audit(given, parts, ids, captions)
    found = side_channels.measured(channels, truth, what)
    return (
        side_channels.metrics(found),
        {"leaks": side_channels.notes(channels, found) | {"of": what}},
        channels.sides,
    )


def filters(
    source: Any,
    embedded: EmbeddedRecords | None,
    truth: np.ndarray,
    sides: np.ndarray | None = None,
) -> tuple[dict[str, Measure], dict[str, Any]]:
    """Which poisons pass the filters that people use."""
    pixels = getattr(getattr(source, "source", None), "has_images", True)
    found = usual_filters.filters(source, embedded, sides, pixels)
    return usual_filters.measured(found, truth), {"filters": usual_filters.notes(found)}


def write_windows(folder: Path, ids: Sequence[str], boxes: Tensor) -> None:
    """windows.safetensors: the window of an image that carries its caption, for the page to draw.

    boxes: int (M, 4): top, left, height, width in pixels of the images as they are scanned, of these records.
    """
    told = torch.from_numpy(np.frombuffer(json.dumps(list(ids)).encode(), np.uint8).copy())
    save_file({"ids": told, "boxes": boxes.to(torch.int32).cpu().contiguous()}, folder / WINDOWS)


def read_windows(folder: Path) -> dict[str, tuple[int, int, int, int]]:
    """What `write_windows` wrote; nothing where it wrote nothing. Raises UserError for another file of that name."""
    path = folder / WINDOWS
    if not path.exists():
        return {}
    try:
        held = load_file(path)
        ids, boxes = json.loads(bytes(held["ids"].numpy())), held["boxes"]
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} holds no windows: {error}") from error
    if (
        not isinstance(ids, list)
        or boxes.shape != (len(ids), 4)
        or not all(isinstance(k, str) for k in ids)
    ):
        raise UserError(
            f"{path} holds no list of ids with a box each; boxes are of shape {tuple(boxes.shape)}"
        )
    return {
        k: (int(b[0]), int(b[1]), int(b[2]), int(b[3]))
        for k, b in zip(ids, boxes.tolist(), strict=True)
    }


def measure_ranking(
    given: Any,
    parts: Dataset,
    corpus: Corpus,
    merged: Scores,
    detectors: Mapping[str, Scores],
    removed: np.ndarray,
    sides: bool,
    trusted: str,
) -> tuple[dict[str, Measure], dict[str, Any]]:
    """Everything here of a finished ranking: metrics and notes. given: the scanned run or method. removed: its worst rows.

    sides: whether side channels are looked at; without a plan, for what they tell of the records that are removed.
    """
    out, told = discoveries(merged, detectors, trusted, [len(removed)])
    truth, what = parts.plan.mask(corpus.ids), "poisons"
    if not parts.plan.edits:
        truth[removed], what = True, "removed records"
    known = None
    if sides:
        found, notes, known = measure_side_channels(
            given, parts, corpus.ids, corpus.captions, truth, what
        )
        out, told = out | found, told | notes
    if parts.plan.edits:
        found, notes = filters(corpus, corpus.embedded, truth, known)
        out, told = out | found, told | notes
    return out, told
