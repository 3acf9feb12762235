"""Transplant: what carries its caption to foreign images, be it a window or a texture over
everything? (ours; cf. STRIP 2019)

A caption belongs to a whole scene. A trigger carries its caption alone, into whatever company it is
put. The search for one:

1. Alarm. Every image is cut into cells, and the cells of many images are put together as
   patchworks. A cell that moves all its patchworks in one direction is suspicious. `len(cells) *
   rounds` forward passes a record test all of its cells.
2. Locate. For the `cascade` share of the records with the largest alarm: the smallest window that
   does it, pasted on `k` foreign images.
3. Candidates. Windows that look alike on different pictures and move images alike may show a
   trigger. So may the texture that the images of like captions have in common: blended patterns,
   sinusoids, warps.
4. Tests. Each candidate is sought in all records, whether the cascade chose them or not. It is
   believed when it moves foreign images, and when those that show it stand out from the rest or
   lose their caption where it is covered (`trigger_candidates`).

The encoder must be the one that was trained on the suspect data. No neighbours are counted, so
neither the number of poisons nor the size of a sample inverts the scores. One image with many
captions (targeted poisoning) has no part to be found: see `duplicates`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.data.blocks import blocks
from bezoar.data.pairs import load_pairs
from bezoar.data.randomness import sample_rows
from bezoar.detection import shared_patterns, trigger_candidates, window_transplants
from bezoar.detection.caption_groups import CaptionGroups, group_captions
from bezoar.detection.detectors import RecordEncoder, Records, name_clearest, require_texts
from bezoar.detection.shared_patterns import GroupTextures, WindowCluster
from bezoar.detection.trigger_candidates import (
    BLOCK,
    MIN_SUPPORT,
    SHOWN,
    TEXTURES,
    Hosts,
    SuspectData,
    Trigger,
    robust_deviations,
)
from bezoar.detection.window_transplants import HostImages
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

LOOKED_FOR = "among fixed pixels, overlays and fine textures"
PATCHWORK_BLOCK = 1024  # images whose cells are mixed with one another
MIN_LOCATED = 64  # records that are searched for a window at least
KEEP = 0.6  # a smaller window must do this share of what the larger one does
SMALLEST_WINDOW = 1 / 8  # its side, as a share of the image's
MAX_CLUSTERED = 1 << 12  # windows that are compared with one another
SAME_DIRECTION = 0.8  # cosine of the shifts of two windows of a cluster
SAME_PATTERN = 0.5  # correlation of their pixels
SAME_PICTURE = 0.95  # cosine of thumbnails from which one picture is taken for a copy of another


@dataclass(frozen=True)
class Alarm:
    """Result of the first pass over N records."""

    values: Tensor  # (N,), robust deviations of the strongest cell
    boxes: Tensor  # int64 (N, 4), half of the image around that cell
    # those of the caption groups, one for each of TEXTURES; none without groups
    textures: list[GroupTextures]


@dataclass(frozen=True)
class LocatedWindows:
    """Result of the second pass: the window of each of M records that moves foreign images."""

    rows: Tensor  # int64 (M,), the records
    boxes: Tensor  # int64 (M, 4)
    gain: Tensor  # (M,), how far it moves them towards the record's caption
    agreement: Tensor  # (M,), how alike it moves them
    shifts: Tensor  # (M, D), how far on average
    windows: Tensor  # uint8 (M, 3, s, s), of the reduced image
    pictures: Tensor  # unit (M, 192), thumbnails of the whole images

    @staticmethod
    def join(parts: Sequence[LocatedWindows]) -> LocatedWindows:
        """All windows of several parts, on the CPU."""
        names = [f.name for f in fields(LocatedWindows)]
        return LocatedWindows(
            *(torch.cat([getattr(part, name).cpu() for part in parts]) for name in names)
        )

    def suspicion(self) -> Tensor:
        """(M,): robust deviations of the gain or of the agreement, whichever is larger."""
        return torch.maximum(robust_deviations(self.gain), robust_deviations(self.agreement))


@method
class Transplant:
    """Score = robust deviations of what a record's cell or window does; triggers lie above."""

    decides: ClassVar[bool] = True
    reads_training: ClassVar[bool] = True

    cells: Annotated[tuple[int, ...], "cells a side of the patchworks of the first pass"] = (2, 4)
    rounds: Annotated[int, "patchworks that each cell is part of, for each of `cells`"] = 3
    cascade: Annotated[float, "share of the pairs that are searched for a window"] = 0.1
    scouts: Annotated[int, "foreign images that each window of the search is pasted into"] = 3
    k: Annotated[int, "foreign images that the window of each pair is pasted into"] = 12
    groups: Annotated[
        int, "groups of like captions that are searched for a common texture; 0: none"
    ] = 64
    seed: Annotated[int, "seed of the patchworks, the groups and the foreign images"] = 0

    def __post_init__(self) -> None:
        if (
            not self.cells
            or not all(2 <= c <= 32 for c in self.cells)
            or not 2 <= self.rounds <= 100
        ):
            raise ValueError(
                f"needs cells in 2..32 and rounds in 2..100; got {self.cells}, {self.rounds}"
            )
        if (
            not 0 < self.cascade <= 1
            or not 2 <= self.scouts <= self.k <= 1000
            or not 0 <= self.groups <= 4096
        ):
            raise ValueError(
                "needs cascade in (0, 1], 2 <= scouts <= k <= 1000 and groups in 0..4096"
            )

    def passes(self, n: int) -> int:
        """About how many images a scan of n pairs puts through the encoder."""
        located = self.located(n) * (19 * self.scouts + self.k)
        return n * (1 + len(self.cells) * self.rounds) + located

    def located(self, n: int) -> int:
        """Return how many of n records are searched for a window."""
        return min(n, max(MIN_LOCATED, math.ceil(self.cascade * n)))

    @torch.inference_mode()
    def __call__(self, encoder: RecordEncoder, source: Records) -> Scores:
        """Score every record.

        Returns:
            Scores. values: the alarm, which the records of the cascade exchange among one another
            by what their windows do; a record that shows at least half of a trigger lies above all
            others. boxes: the windows, or the whole image for a texture. raised: the records that
            show a trigger. notes: `passes` through the encoder, records `kept` by the cascade,
            `raised`, `missed` (raised, but not kept by the cascade), `candidates`, and each of the
            `triggers` that raised at least MIN_SUPPORT records which no earlier one had raised.

        Raises:
            UserError: Without captions, or with too few records.
        """
        data = self.embed(encoder, source)
        order = sample_rows(data.ids, len(data), self.seed)
        groups = group_captions(data.texts, order, self.groups, self.seed, data.device)
        alarm = self.alarm_pass(data, order, groups)
        hosts = self.choose_hosts(data, order, alarm.values)
        rows = largest_rows(alarm.values, data.ids, self.located(len(data)))
        located = self.locate_pass(data, rows, alarm.boxes[rows], hosts.patchworks)
        clusters = cluster_located(data, located)
        likeness = trigger_candidates.measure_likeness(data, clusters, alarm.textures)
        windows = list(trigger_candidates.window_triggers(data, clusters, likeness, hosts))
        explained = torch.zeros(len(data), dtype=torch.bool)
        for trigger in windows:
            explained |= trigger.share >= SHOWN
        textures = trigger_candidates.texture_triggers(data, groups, likeness, hosts, explained)
        return self.combine(data, alarm, located, [*windows, *textures])

    def embed(self, encoder: RecordEncoder, source: Records) -> SuspectData:
        """The records with their captions' vectors. Raises UserError where they allow no scan."""
        source = source if hasattr(source, "take") else load_pairs(source)
        embedded = encoder.embed(source)
        texts = require_texts(embedded, "'transplant'")
        if len(embedded.ids) <= self.k:
            raise UserError(
                f"detector 'transplant' needs more than k={self.k} pairs; there are "
                f"{len(embedded.ids)}"
            )
        return SuspectData(encoder, source, embedded.ids, texts)

    def alarm_pass(self, data: SuspectData, order: np.ndarray, groups: CaptionGroups) -> Alarm:
        """First pass: test the cells of all images in patchworks, and sum up textures."""
        consistency = torch.empty(len(order), len(self.cells))
        boxes = torch.empty(len(order), len(self.cells), 4, dtype=torch.long)
        textures: list[GroupTextures] = []
        for part in np.array_split(order, math.ceil(len(order) / PATCHWORK_BLOCK)):
            rows, images = torch.as_tensor(part), data.images(part)
            shape = images.shape[-2:]
            half = math.ceil(shape[0] / 2), math.ceil(shape[1] / 2)
            for i, count in enumerate(self.cells):
                strongest, cell = window_transplants.measure_consistency(
                    data.encoder, images, count, self.rounds, self.seed + i
                )
                consistency[rows, i] = strongest.cpu()
                cell_boxes = window_transplants.grid_cells(shape, count)[cell.cpu()]
                boxes[rows, i] = window_transplants.resize_boxes(cell_boxes, half, shape)
            if len(groups):
                textures = textures or [
                    GroupTextures.empty(texture, len(groups), images)
                    for texture in TEXTURES.values()
                ]
                for texture in textures:
                    texture.add(images, groups.of_record[rows].to(images.device))
        deviations = torch.stack([robust_deviations(c) for c in consistency.T], 1)
        values, grid = deviations.max(1)
        return Alarm(values, boxes[torch.arange(len(order)), grid], textures)

    def choose_hosts(self, data: SuspectData, order: np.ndarray, alarm: Tensor) -> Hosts:
        """Foreign images of the calmer half: one that shows a trigger is not moved by it."""
        calm = order[(alarm <= alarm.median()).numpy()[order]]
        images = data.images(calm[: 16 * self.k])
        offsets = torch.arange(16) * len(images) // 16
        patchworks = window_transplants.make_patchworks(images, 4, offsets)[: self.k]
        natural = images[: self.k]
        return Hosts(
            HostImages(patchworks, data.encoder.encode_images(patchworks)),
            HostImages(natural, data.encoder.encode_images(natural)),
        )

    def locate_pass(
        self, data: SuspectData, rows: Tensor, boxes: Tensor, hosts: HostImages
    ) -> LocatedWindows:
        """Second pass: the smallest window in each box (M, 4) and what it does to the hosts."""
        return LocatedWindows.join(
            [
                self._locate_block(data, rows[block], boxes[block], hosts)
                for block in blocks(len(rows), BLOCK)
            ]
        )

    def _locate_block(
        self, data: SuspectData, rows: Tensor, boxes: Tensor, hosts: HostImages
    ) -> LocatedWindows:
        images = data.images(rows)
        smallest = max(1, round(SMALLEST_WINDOW * min(images.shape[-2:])))
        boxes = window_transplants.shrink_boxes(
            data.encoder, images, boxes.to(images.device), hosts.first(self.scouts), KEEP, smallest
        )
        shifts = window_transplants.measure_shifts(data.encoder, images, boxes[:, None], hosts)
        shifts = shifts[:, 0]  # (M, K, D)
        captions = data.texts[rows.to(data.texts.device)].to(shifts.device)
        small, size = trigger_candidates.reduce_images(images)
        factor = images.shape[-1] // small.shape[-1]
        compared = window_transplants.resize_boxes(boxes // factor, size, small.shape[-2:])
        return LocatedWindows(
            rows,
            boxes,
            gain=(shifts * captions[:, None]).sum(2).median(1).values,
            agreement=window_transplants.pairwise_agreement(shifts),
            shifts=shifts.mean(1),
            windows=window_transplants.crop_windows(small, compared),
            pictures=thumbnails(images),
        )

    def combine(
        self, data: SuspectData, alarm: Alarm, located: LocatedWindows, triggers: Sequence[Trigger]
    ) -> Scores:
        """The ranking of the two passes, with the records that show a trigger above all others."""
        n, rows = len(data), located.rows
        values = alarm.values.clone()
        # the largest alarms go to the most suspicious windows; `rows` are in the order of the alarm
        ranking = located.suspicion().argsort(descending=True, stable=True)
        values[rows[ranking]] = alarm.values[rows]
        boxes = torch.full((n, 4), -1)
        boxes[rows] = located.boxes
        top = values.max()
        raised = torch.zeros(n, dtype=torch.bool)
        not_located = torch.ones(n, dtype=torch.bool).index_fill(0, rows, False)
        notes: list[dict[str, Any]] = []
        for trigger in triggers:
            share = trigger.share
            shown = share >= SHOWN
            evidence = top * torch.where(shown, 1 + share, 2 * share)
            values = torch.where(share > 0, torch.maximum(values, evidence), values)
            new = shown & ~raised
            boxes[new] = trigger.boxes[new]
            raised |= shown
            counts = {"raised": shown, "new": new, "missed": shown & not_located}
            notes.append(
                trigger.note()
                | {name: int(mask.sum()) for name, mask in counts.items()}
                | {"clearest": name_clearest(data.ids, new.nonzero()[:, 0], share[new])}
            )
        note = {
            "looked_for": LOOKED_FOR,
            "passes": self.passes(n),
            "kept": len(rows),
            "raised": int(raised.sum()),
            "missed": int((raised & not_located).sum()),
            "candidates": len(notes),
            "triggers": [t for t in notes if t["new"] >= MIN_SUPPORT],
        }
        return Scores(data.ids, values.float(), boxes, note, raised)


def cluster_located(data: SuspectData, located: LocatedWindows) -> list[WindowCluster]:
    """Clusters among the most suspicious windows; their `rows` are those of the records."""
    top = located.suspicion().argsort(descending=True, stable=True)[:MAX_CLUSTERED]
    clusters = shared_patterns.cluster_windows(
        located.shifts[top].to(data.device),
        located.windows[top].to(data.device),
        located.pictures[top].to(data.device),
        min_shift_cosine=SAME_DIRECTION,
        min_correlation=SAME_PATTERN,
        max_picture_cosine=SAME_PICTURE,
        min_size=MIN_SUPPORT,
    )
    refined = []
    for cluster in clusters:
        rows = located.rows[top[cluster.rows.cpu()]]
        small, _ = trigger_candidates.reduce_images(data.images(rows[:BLOCK]))
        pattern = shared_patterns.refine_pattern(small, cluster.pattern)
        refined.append(WindowCluster(rows, cluster.direction, pattern))
    return refined


def thumbnails(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> unit (N, 192): area means, less their own mean."""
    x = F.adaptive_avg_pool2d(images.float(), 8).flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=1e-3)


def largest_rows(values: Tensor, ids: Sequence[str], count: int) -> Tensor:
    """Rows of the `count` largest values (N,), the largest first, ties in the order of the ids."""
    v = values.numpy()
    rows = np.flatnonzero(v >= np.partition(v, len(v) - count)[len(v) - count])
    names = np.asarray([ids[i] for i in rows.tolist()])
    return torch.as_tensor(rows[np.lexsort((names, -v[rows]))][:count])
