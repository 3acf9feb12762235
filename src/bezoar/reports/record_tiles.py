"""Galleries of a scan's records: with captions and scores, or beside their neighbours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bezoar.detection.corpus.corpus import Corpus, ScanScores
from bezoar.reports import pictures
from bezoar.reports.page_parts import Gallery, Line, Tile
from bezoar.reports.similar_records import find_nearest

FRAME_COLOUR = (255, 214, 0)
FULL_SCALE = 104  # CSS pixels of a picture under which scores and places are written
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class RankedRecord:
    """A record's row among those scanned, and its rank, from 1 for the most suspicious."""

    rank: int
    row: int


def draw_frame(image: Tensor, box: Box | None) -> Tensor:
    """Return a copy of an image with a window framed; the image itself without a window.

    Args:
        image: uint8 (3, H, W).
        box: Top, left, height and width of the window in pixels; parts outside the image are cut
            off.
    """
    if box is None:
        return image
    height, width = image.shape[-2:]
    thickness = max(1, round(max(height, width) / 64))
    top, left = min(max(0, box[0]), height), min(max(0, box[1]), width)
    bottom, right = min(max(top, box[0] + box[2]), height), min(max(left, box[1] + box[3]), width)
    inside = (
        slice(None),
        slice(top + thickness, bottom - thickness),
        slice(left + thickness, right - thickness),
    )
    framed = image.clone()
    framed[:, top:bottom, left:right] = torch.tensor(FRAME_COLOUR, dtype=torch.uint8)[:, None, None]
    framed[inside] = image[inside]
    return framed


def record_gallery(
    corpus: Corpus,
    scores: ScanScores,
    ranked: Sequence[RankedRecord],
    poisons: frozenset[str] | None,
    windows: Mapping[str, Box],
    scale: int = FULL_SCALE,
    title: str = "",
    copies: Mapping[int, int] | None = None,
) -> Gallery:
    """Show records of a scan as pictures, each with its key.

    Args:
        corpus: The records with their images.
        scores: Their scores, captions and places.
        poisons: Ids of the poisons; None if they are unknown.
        windows: For some ids, the window of the image to frame.
        scale: Side of a picture in CSS pixels. Below FULL_SCALE the tile has no scores and no
            place.
        copies: For some rows, that of another record of the same picture, which is shown beside it.
    """
    rows = [r.row for r in ranked]
    pairs = {row: copy for row, copy in (copies or {}).items() if row in rows}
    rows += sorted(set(pairs.values()) - set(rows))
    records = corpus.take(rows)
    images = [
        draw_frame(image, windows.get(key))
        for image, key in zip(records.images.cpu(), records.ids, strict=True)
    ]
    tiles = []
    for index, record in enumerate(ranked):
        lines, look = [Line(scores.ids[record.row], "key")], ""
        cell_indices = [index]
        if poisons is not None:
            is_poison = scores.ids[record.row] in poisons
            look = "bad" if is_poison else ""
            lines.append(Line("poison", "bad") if is_poison else Line("clean", "good"))
        lines.append(Line(pictures.shorten(caption_or_id(scores, record.row))))
        if scale >= FULL_SCALE:
            lines += score_lines(scores, record.row)
        if (copy := pairs.get(record.row)) is not None:
            cell_indices.append(rows.index(copy))
            lines.append(Line(f"beside {scores.ids[copy]}", "key"))
            lines.append(Line(pictures.shorten(caption_or_id(scores, copy)), "muted"))
        tiles.append(Tile(cell_indices, lines, look, f"{record.rank}"))
    return pictures.contact_sheet(torch.stack(images), tiles, scale, title)


def score_lines(scores: ScanScores, row: int) -> list[Line]:
    """Return a record's merged score, the score of each detector, and its place."""
    values = {"score": scores.merged}
    if len(scores.detectors) > 1:
        values |= {pictures.shorten(name, 16): s for name, s in scores.detectors.items()}
    lines = [Line(f"{name} {float(s.values[row]):.2f}", "muted") for name, s in values.items()]
    place = scores.places[row]  # a file's own name is the key, which stands first
    return (
        [*lines, Line(pictures.shorten(place, 60), "muted")]
        if scores.ids[row] not in place
        else lines
    )


def caption_or_id(scores: ScanScores, row: int) -> str:
    """Return the caption of a record, or its id if it has none."""
    return scores.captions[row] or scores.ids[row]


def neighbour_gallery(
    corpus: Corpus, scores: ScanScores, ranked: Sequence[RankedRecord]
) -> Gallery | None:
    """Show each record beside its nearest neighbours; None if there are no others."""
    rows = [r.row for r in ranked]
    neighbours, cosines = find_nearest(corpus.embedded, rows)  # (M, K) each
    if not neighbours.size:
        return None
    shown_rows = sorted({*rows, *neighbours.flatten().tolist()})
    picture_of = {row: i for i, row in enumerate(shown_rows)}
    tiles = []
    for record, near, similarities in zip(
        ranked, neighbours.tolist(), cosines.tolist(), strict=True
    ):
        lines = [
            Line(scores.ids[record.row], "key"),
            Line(pictures.shorten(caption_or_id(scores, record.row), 90), "mark"),
        ]
        for row, cosine in zip(near, similarities, strict=True):
            caption = pictures.shorten(caption_or_id(scores, row), 80)
            lines.append(Line(f"{cosine:.2f} {caption}", "muted"))
        cell_indices = [picture_of[row] for row in (record.row, *near)]
        tiles.append(Tile(cell_indices, lines, badge=f"{record.rank}"))
    return pictures.contact_sheet(corpus.take(shown_rows).images, tiles, 64)
