"""Pictures of a report: records looked up by id, and contact sheets, one PNG a gallery."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from bezoar.data.pairs import Pairs
from bezoar.reports.page_parts import Gallery, Tile
from bezoar.runs.inputs import Dataset

MAX_SIDE = 96  # pixels of a picture's side as it is stored in a page
COLUMNS = 16
MOST_TEXT = 160


def take_records(parts: Dataset, ids: Sequence[str]) -> Pairs:
    """The records of these ids as training reads them, in that order; only their images are made. Unknown ids are left out."""
    wanted = set(ids)
    edits = tuple(e for e in parts.plan.edits if e.id in wanted)
    made = (
        replace(parts.plan, edits=edits).poisons(take_sources(parts, [e.source for e in edits]))
        if edits
        else None
    )
    poisoned = set(made.ids) if made else set()
    plain = parts.clean.take(
        [i for i, k in enumerate(parts.clean.ids) if k in wanted and k not in poisoned]
    )
    every = plain if made is None else _joined([plain, made])
    row = {k: i for i, k in enumerate(every.ids)}
    return every.take([row[k] for k in ids if k in row])


def take_sources(parts: Dataset, ids: Sequence[str]) -> Pairs:
    """Untouched records, of the data set and of the victims that a plan adds, each once."""
    wanted = set(ids)
    found = parts.clean.take([i for i, k in enumerate(parts.clean.ids) if k in wanted])
    if parts.victims is None:
        return found
    have = set(found.ids)
    added = [i for i, k in enumerate(parts.victims.ids) if k in wanted and k not in have]
    return _joined([found, parts.victims.take(added)])


def _joined(parts: Sequence[Pairs]) -> Pairs:
    """Several Pairs in one, whatever only some of them have left out; reports are about whole sources and go."""
    full = [replace(p, report=None) for p in parts if len(p)]
    return Pairs.concat(full) if full else replace(parts[0], report=None)


def contact_sheet(
    images: torch.Tensor, tiles: Sequence[Tile], scale: int = 80, title: str = "", note: str = ""
) -> Gallery:
    """A contact sheet of images, uint8 (N, 3, H, W); large ones are made smaller, sides are made equal by margins."""
    cells = to_squares(images.cpu())
    n, _, side, _ = cells.shape
    columns = max(1, min(COLUMNS, n))
    rows = max(1, -(-n // columns))
    grid = torch.full((rows * columns, 3, side, side), 255, dtype=torch.uint8)
    grid[:n] = cells
    grid = (
        grid.reshape(rows, columns, 3, side, side)
        .permute(0, 3, 1, 4, 2)
        .reshape(rows * side, columns * side, 3)
    )
    return Gallery(png(grid), columns, rows, tiles, scale, side >= scale, title, note)


def to_squares(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, S, S), S at most LARGEST."""
    if not len(images):
        return torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    height, width = images.shape[-2:]
    shrink = min(1.0, MAX_SIDE / max(height, width))
    if shrink < 1:
        shape = [max(1, round(height * shrink)), max(1, round(width * shrink))]
        images = (
            F.interpolate(images.float(), shape, mode="bilinear", antialias=True)
            .round()
            .clamp(0, 255)
            .byte()
        )
    height, width = images.shape[-2:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    return F.pad(images, (left, side - width - left, top, side - height - top), value=255)


def png(pixels: torch.Tensor) -> str:
    """uint8 (H, W, 3) -> a PNG as a data address."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "PNG", compress_level=6)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def shorten(text: Any, most: int = MOST_TEXT) -> str:
    """A caption or an id, cut where it would run on for ever."""
    text = str(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def class_name(pairs: Pairs, row: int) -> str:
    """The class of a record, or nothing."""
    if pairs.labels is None or not pairs.classes or int(pairs.labels[row]) < 0:
        return ""
    return pairs.classes[int(pairs.labels[row])]
