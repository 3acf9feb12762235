"""Pictures of a page: records by id, and contact sheets, which are one PNG for each gallery."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.data.stored_pairs import StoredPairs
from bezoar.reports.page_parts import Gallery, Tile
from bezoar.runs.inputs import Dataset

MAX_SIDE = 96  # pixels a side of a picture in a page
COLUMNS = 16
MAX_TEXT = 160  # characters of a caption or an id


def take_records(dataset: Dataset, ids: Sequence[str]) -> Pairs:
    """Return the records of `ids` as training reads them; unknown ids are left out."""
    id_set = set(ids)
    edits = tuple(e for e in dataset.plan.edits if e.id in id_set)
    sources = take_sources(dataset, [e.source for e in edits])
    poisons = replace(dataset.plan, edits=edits).poisons(sources) if edits else None
    unedited = id_set - set(poisons.ids if poisons else ())
    records = _take_ids(dataset.clean, unedited)
    if poisons:
        records = _concatenate([records, poisons])
    row_of = {k: i for i, k in enumerate(records.ids)}
    return records.take([row_of[k] for k in ids if k in row_of])


def take_sources(dataset: Dataset, ids: Iterable[str]) -> Pairs:
    """Return untouched records, of the data set or added by the plan, in no particular order."""
    id_set = set(ids)
    records = _take_ids(dataset.clean, id_set)
    if dataset.victims is None:
        return records
    return _concatenate([records, _take_ids(dataset.victims, id_set - set(records.ids))])


def take_victims(dataset: Dataset, goals: Iterable[Goal]) -> tuple[list[Goal], Pairs]:
    """Return the goals whose first victim is in the data, and that victim's record for each."""
    goals = [g for g in goals if g.victims]
    records = take_sources(dataset, [g.victims[0] for g in goals])
    row_of = {k: i for i, k in enumerate(records.ids)}
    goals = [g for g in goals if g.victims[0] in row_of]
    return goals, records.take([row_of[g.victims[0]] for g in goals])


def _take_ids(records: Pairs | StoredPairs, ids: set[str]) -> Pairs:
    return records.take(records.find_rows(ids))


def _concatenate(parts: Sequence[Pairs]) -> Pairs:
    """Join records; a read report is about a whole source and is dropped."""
    filled = [replace(p, report=None) for p in parts if len(p)]
    return Pairs.concat(filled) if filled else replace(parts[0], report=None)


def contact_sheet(
    images: Tensor, tiles: Sequence[Tile], scale: int = 80, title: str = "", note: str = ""
) -> Gallery:
    """Return a gallery of pictures.

    Args:
        images: uint8 (N, 3, H, W). Large ones are made smaller; margins make them square.
        tiles: What is shown, with indices of `images`.
        scale: Side of a shown picture in CSS pixels.
        note: A sentence below it.
    """
    cells = to_squares(images.cpu())  # (N, 3, S, S)
    n, _, side, _ = cells.shape
    columns = max(1, min(COLUMNS, n))
    rows = max(1, -(-n // columns))
    sheet = torch.full((rows * columns, 3, side, side), 255, dtype=torch.uint8)
    sheet[:n] = cells
    sheet = sheet.reshape(rows, columns, 3, side, side).permute(0, 3, 1, 4, 2)  # (R, S, C, S, 3)
    sheet = sheet.reshape(rows * side, columns * side, 3)
    return Gallery(png_address(sheet), columns, rows, tiles, scale, side >= scale, title, note)


def to_squares(images: Tensor) -> Tensor:
    """Fit uint8 images (N, 3, H, W) into squares of at most MAX_SIDE with white margins."""
    if not len(images):
        return torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    height, width = images.shape[-2:]
    shrink = MAX_SIDE / max(height, width)
    if shrink < 1:
        shape = [max(1, round(height * shrink)), max(1, round(width * shrink))]
        resized = F.interpolate(images.float(), shape, mode="bilinear", antialias=True)
        images = resized.round().clamp(0, 255).byte()
    height, width = images.shape[-2:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    return F.pad(images, (left, side - width - left, top, side - height - top), value=255)


def png_address(pixels: Tensor) -> str:
    """Return uint8 pixels (H, W, 3) as the data address of a PNG."""
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "PNG", compress_level=6)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def shorten(text: object, length: int = MAX_TEXT) -> str:
    """Return a caption or an id as text of at most `length` characters."""
    text = str(text)
    return text if len(text) <= length else text[: length - 1] + "…"
