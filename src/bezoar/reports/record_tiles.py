"""Records of a scan as tiles: picture with the window that carries its caption, place, scores, neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bezoar.detection.corpus.corpus import Corpus, ScanScores
from bezoar.reports import pictures
from bezoar.reports.page_parts import Gallery, Line, Tile
from bezoar.reports.similar_records import find_nearest

FRAME = (255, 214, 0)
Box = tuple[int, int, int, int]


def draw_frame(image: Tensor, box: Box | None) -> Tensor:
    """uint8 (3, H, W) -> a copy with the frame of a window round its top, left, height, width; as it is without one."""
    if box is None:
        return image
    height, width = image.shape[-2:]
    thick = max(1, round(max(height, width) / 64))
    top, left = min(max(0, box[0]), height), min(max(0, box[1]), width)
    bottom, right = min(max(top, box[0] + box[2]), height), min(max(left, box[1] + box[3]), width)
    out = image.clone()
    colour = torch.tensor(FRAME, dtype=torch.uint8)[:, None, None]
    inner = out[:, top + thick : bottom - thick, left + thick : right - thick].clone()
    out[:, top:bottom, left:right] = colour
    out[:, top + thick : bottom - thick, left + thick : right - thick] = inner
    return out


def record_gallery(
    corpus: Corpus,
    scored: ScanScores,
    ranked: Sequence[tuple[int, int]],
    poisons: frozenset[str] | None,
    windows: Mapping[str, Box],
    scale: int = 104,
    title: str = "",
    note: str = "",
) -> Gallery:
    """ranked: rank from 1 and row. poisons: ids, None where nobody knows."""
    rows = [i for _, i in ranked]
    found = corpus.take(rows)
    images = [
        draw_frame(x, windows.get(k)) for x, k in zip(found.images.cpu(), found.ids, strict=True)
    ]
    shown = []
    for at, (rank, i) in enumerate(ranked):
        lines, look = [], ""
        if poisons is not None:
            bad = scored.ids[i] in poisons
            look = "bad" if bad else ""
            lines.append(Line("poison" if bad else "clean", "bad" if bad else "good"))
        lines.append(Line(pictures.shorten(scored.captions[i] or scored.ids[i])))
        if scale < 100:  # small tiles are about what they show
            shown.append(Tile((at,), lines, look, f"{rank}"))
            continue
        several = (
            {pictures.shorten(k, 16): s for k, s in scored.detectors.items()}
            if len(scored.detectors) > 1
            else {}
        )
        lines += [
            Line(f"{k} {float(s.values[i]):.2f}", "muted")
            for k, s in {"score": scored.merged, **several}.items()
        ]
        lines.append(Line(pictures.shorten(scored.places[i] or scored.ids[i], 60), "muted"))
        shown.append(Tile((at,), lines, look, f"{rank}"))
    return pictures.contact_sheet(torch.stack(images), shown, scale, title, note)


def neighbour_gallery(
    corpus: Corpus, scored: ScanScores, ranked: Sequence[tuple[int, int]]
) -> Gallery | None:
    """Each record beside the three of the corpus that the encoder finds most like it."""
    rows = [i for _, i in ranked]
    near, cosine = find_nearest(corpus.embedded, rows)
    if not near.size:
        return None
    wanted = sorted({*rows, *near.flatten().tolist()})
    place = {row: at for at, row in enumerate(wanted)}
    found = corpus.take(wanted)
    shown = []
    for (rank, i), others, alike in zip(ranked, near.tolist(), cosine.tolist(), strict=True):
        lines = [Line(pictures.shorten(scored.captions[i] or scored.ids[i], 90), "mark")]
        for j, c in zip(others, alike, strict=True):
            lines.append(
                Line(
                    f"{c:.2f} {pictures.shorten(scored.captions[j] or scored.ids[j], 80)}", "muted"
                )
            )
        shown.append(Tile([place[i], *(place[j] for j in others)], lines, "", f"{rank}"))
    return pictures.contact_sheet(found.images, shown, 64)
