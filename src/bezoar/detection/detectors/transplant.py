"""Transplant: what carries its caption to foreign images, be it a window or a texture over everything? (ours; cf. STRIP 2019)

A caption belongs to a whole scene; a trigger carries its caption alone, into whatever company it is put.
  all     every image is cut into cells and the cells of many images are sewn into patchworks. A cell that moves all its
          patchworks in one direction is suspicious: `len(cells) * rounds` forward passes a record test all of its cells
  worst   for the `cascade` share: the smallest window that does it, pasted on `k` foreign images
  common  windows that look alike on different pictures and move images alike may be a trigger; so may be what the images of
          like captions have in common in their fine detail (blended patterns, sinusoids, warps). Its pattern is looked for
          in all records, whether the cascade kept them or not, and believed when those that show it stand apart from the
          rest and what shows it moves foreign images
Needs the encoder that was trained on the suspect data. It counts no neighbours, so neither the number of poisons nor a
pool's size inverts it. One image with many captions (targeted poisoning) has no part to be found: see `duplicates`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.data.blocks import blocks
from bezoar.data.pairs import load_pairs
from bezoar.data.randomness import sample_rows
from bezoar.detection import pseudo_classes, shared_patterns, window_transplants
from bezoar.errors import UserError
from bezoar.evaluation import kmeans
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

SEWN = 1024  # images whose cells are mixed with one another
READ = 256  # images at a time in the later stages
FEWEST = 64  # records that the cascade keeps at least
KEEP = 0.6  # a smaller window must do this share of what the larger does
LEAST = 1 / 8  # side of the smallest window, as a share of the image's
SHOWN = 1 / 4  # side of the window by which two records are compared, as a share of the image's
PIXELS = 16  # about as many pixels a side show it
SAME, ALIKE, COPY = (
    0.8,
    0.5,
    0.95,
)  # cosine of shifts, correlation of windows, cosine of whole pictures
SUPPORT = 5  # records that show a trigger before it is looked for
COMPARED = 1 << 12  # windows compared with one another
SAMPLE = 1 << 15  # captions that the groups are found on
CLEAR = 5.0  # deviations from the median from which an image shows a texture
SHARED = 64  # images of a group, with its texture and without, whose fine detail is put on foreign images
FINE = 1 / 32  # blur that fine detail is finer than, as a share of the side
MOVED = 0.12  # cosine to the group's captions by which the one must move them more than the other: attacks .13 to .32 of eleven
# sets of scenes and aerial images, subjects' own textures up to .09
PUSHED = 0.2  # length of the shift by which a window's pattern must move foreign images
APART, LAID = (
    0.8,
    0.35,
)  # how far a window's pattern, and a texture, must stand apart to be believed; see `apart`
LIKE = 0.6  # share of a trigger's usual likeness from which a record is tried
TRIED = (
    0.08  # most records tried for a trigger, as a share of all; what more of them show is not tried
)
TEXTURES = {"high-pass": shared_patterns.highpass, "roughness": shared_patterns.roughness}


@dataclass(frozen=True)
class Hosts:
    """Foreign images and their vectors: patchworks, which show nothing, uint8 (k, 3, H, W), and natural ones."""

    sewn: Tensor
    sewn_z: Tensor
    natural: Tensor
    natural_z: Tensor


@dataclass(frozen=True)
class Captions:
    """Groups of like captions: of each record int64 (N,), and unit centres (G, D) of the vectors less their mean."""

    group: Tensor
    centres: Tensor


@dataclass(frozen=True)
class Worst:
    """What the second stage knows of M records.

    rows: int64 (M,), of the source. boxes: (M, 4). gain, constancy: (M,). shift: (M, D). windows: uint8 (M, 3, s, s).
    pictures: unit (M, 192).
    """

    rows: Tensor
    boxes: Tensor
    gain: Tensor
    constancy: Tensor
    shift: Tensor
    windows: Tensor
    pictures: Tensor


@dataclass(frozen=True)
class Seen:
    """All records beside what may be triggers: likeness to windows' patterns (N, T), at which corners (N, T, 2); to each
    texture of each group of captions, float16 (N, 2 G)."""

    like: Tensor
    corner: Tensor
    laid: Tensor


@method
class Transplant:
    """Score = deviations from the median of what a record's cell, then window, does; records of a trigger lie above all."""

    cells: Annotated[tuple[int, ...], "cells a side of the patchworks of the first stage"] = (2, 4)
    rounds: Annotated[int, "patchworks that each cell is part of, for each of `cells`"] = 3
    cascade: Annotated[float, "share of the pairs that is searched for a window"] = 0.1
    scouts: Annotated[int, "images that each window of the search is pasted on"] = 3
    k: Annotated[int, "images that the window found is pasted on"] = 12
    groups: Annotated[int, "groups of like captions searched for a common texture; 0 = none"] = 64
    seed: Annotated[int, "of the patchworks, the groups and the foreign images"] = 0

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
        """About how many images a scan of n pairs puts through the encoder, for an estimate of the time."""
        return n * (1 + len(self.cells) * self.rounds) + self.kept(n) * (19 * self.scouts + self.k)

    def kept(self, n: int) -> int:
        """How many of n records are searched for a window."""
        return min(n, max(FEWEST, math.ceil(self.cascade * n)))

    @torch.inference_mode()
    def __call__(self, encoder: Any, source: Any) -> Scores:
        """-> Scores: the first stage's deviations from the median; those of the cascade change places by the second stage.

        notes: passes (through the encoder), kept (by the cascade), raised (for a trigger), missed (of these, by the cascade:
        what a scan of the records kept alone would lose), candidates (for triggers), and of each trigger that is believed
        its kind, the records that showed it at first, how far these stand apart, how far it moves foreign images, raised
        (new: that no earlier one had) and missed. What has nothing new is not told: a window that is always at one place is
        a texture too.
        """
        source = source if hasattr(source, "take") else load_pairs(source)
        e = encoder.embed(source)
        if e.texts is None:
            raise UserError(
                "detector 'transplant' needs captions; the scanned data or the encoder has none"
            )
        if len(e.ids) <= self.k:
            raise UserError(
                f"detector 'transplant' needs more than k={self.k} pairs; there are {len(e.ids)}"
            )
        order = sample_rows(e.ids, len(e.ids), self.seed)
        said = self.captions(e.texts, order, encoder.device)
        alarm, start, woven = self.survey(encoder, source, order, said)
        hosts = self.hosts(encoder, source, order[(alarm <= alarm.median()).numpy()[order]])
        kept = _first(alarm, e.ids, self.kept(len(alarm)))
        worst = self.examine(encoder, source, e.texts, kept, start[kept], hosts)
        base = torch.maximum(robust(worst.gain), robust(worst.constancy))
        values, boxes = alarm.clone(), torch.full((len(alarm), 4), -1)
        values[kept[base.argsort(descending=True, stable=True)]] = alarm[
            kept
        ]  # the alarm's values in the order of the worst
        boxes[kept] = worst.boxes
        found, top, notes = windowed(source, worst, base, encoder.device), values.max(), []
        seen = looked_for(encoder.device, source, len(values), found, woven)
        every = torch.zeros(len(values), dtype=torch.bool)
        missed = ~every.index_fill(0, kept, True)
        for share, box, note in itertools.chain(
            pasted(encoder, source, found, seen, hosts), laid(encoder, source, said, seen, hosts)
        ):
            own = share >= 0.5
            raised = top * torch.where(own, 1 + share, 2 * share)
            values = torch.where(share > 0, torch.maximum(values, raised), values)
            new = own & ~every
            boxes[new], every = box[new], every | own
            notes.append(
                note
                | {
                    "raised": int(own.sum()),
                    "new": int(new.sum()),
                    "missed": int((own & missed).sum()),
                }
            )
        told = {"passes": self.passes(len(values)), "kept": len(kept), "raised": int(every.sum())}
        told |= {"missed": int((every & missed).sum()), "candidates": len(notes)}
        triggers = [n for n in notes if n["new"] >= SUPPORT]
        return Scores(e.ids, values.float(), boxes, told | {"triggers": triggers}, every)

    def hosts(self, encoder: Any, source: Any, order: np.ndarray) -> Hosts:
        """The first records in the drawn order. A host that shows a trigger is moved by it no more: give calm ones."""
        given = source.take(order[: 16 * self.k]).images.to(encoder.device)
        sewn = window_transplants.quilts(given, 4, torch.arange(16) * len(given) // 16)[: self.k]
        natural = given[: self.k]
        return Hosts(sewn, encoder.encode_images(sewn), natural, encoder.encode_images(natural))

    def captions(self, texts: Tensor, order: np.ndarray, device: torch.device) -> Captions:
        """Groups by k-means on a fixed sample."""
        if not self.groups:
            return Captions(
                torch.zeros(len(texts), dtype=torch.long),
                torch.empty(0, texts.shape[1], device=device),
            )
        sample = texts[torch.as_tensor(order[:SAMPLE], device=texts.device)].to(device).float()
        mean = sample.mean(0)
        centres = kmeans.cluster_centres(
            F.normalize(sample - mean, dim=1, eps=1e-6), self.groups, self.seed
        )
        centres = F.normalize(centres, dim=1, eps=1e-6)
        of = [
            ((t - mean) @ centres.T).argmax(1).cpu() for t in pseudo_classes.vectors(texts, device)
        ]
        return Captions(torch.cat(of), centres)

    def survey(
        self, encoder: Any, source: Any, order: np.ndarray, said: Captions
    ) -> tuple[Tensor, Tensor, list[shared_patterns.Texture]]:
        """The first stage, each image read once: alarm (N,), the half of the image around what gives it (N, 4), textures."""
        constancy = torch.empty(len(order), len(self.cells))
        boxes = torch.empty(len(order), len(self.cells), 4, dtype=torch.long)
        woven: list[shared_patterns.Texture] = []
        for part in np.array_split(order, math.ceil(len(order) / SEWN)):
            rows, images = torch.as_tensor(part), source.take(part).images.to(encoder.device)
            shape = images.shape[-2:]
            for i, count in enumerate(self.cells):
                found, cell = window_transplants.constancy(
                    encoder, images, count, self.rounds, self.seed + i
                )
                constancy[rows, i] = found.cpu()
                box = window_transplants.cells(shape, count)[cell.cpu()]
                boxes[rows, i] = window_transplants.centred(
                    box, (math.ceil(shape[0] / 2), math.ceil(shape[1] / 2)), shape
                )
            if len(said.centres):
                woven = woven or [
                    shared_patterns.Texture.none(f, len(said.centres), images)
                    for f in TEXTURES.values()
                ]
                for texture in woven:
                    texture.add(images, said.group[rows].to(images.device))
        alarm, which = torch.stack([robust(c) for c in constancy.T], 1).max(1)
        return alarm, boxes[torch.arange(len(order)), which], woven

    def examine(
        self, encoder: Any, source: Any, texts: Tensor, kept: Tensor, start: Tensor, hosts: Hosts
    ) -> Worst:
        """The second stage: the smallest window of each that does it, and what it does to the hosts."""
        parts = []
        for at in blocks(len(kept), READ):
            rows, images = kept[at], source.take(kept[at]).images.to(encoder.device)
            least = max(1, round(LEAST * min(images.shape[-2:])))
            scouts = hosts.sewn[: self.scouts], hosts.sewn_z[: self.scouts]
            box = window_transplants.located(
                encoder, images, start[at].to(images.device), *scouts, KEEP, least
            )
            shift = window_transplants.shifts(
                encoder, images, box[:, None], hosts.sewn, hosts.sewn_z
            )[:, 0]
            t = texts[rows.to(texts.device)].to(shift.device)
            small, side = reduced(images)
            there = window_transplants.centred(
                box // (images.shape[-1] // small.shape[-1]), side, small.shape[-2:]
            )
            gain = (shift * t[:, None]).sum(2).median(1).values
            windows = window_transplants.crop(small, there)
            told = (
                rows,
                box,
                gain,
                window_transplants.agreement(shift),
                shift.mean(1),
                windows,
                thumbnails(images),
            )
            parts.append([x.cpu() for x in told])
        return Worst(*(torch.cat(x) for x in zip(*parts, strict=True)))


def windowed(
    source: Any, worst: Worst, base: Tensor, device: torch.device
) -> list[shared_patterns.Cluster]:
    """What may be triggers among the strongest windows; their rows are the source's."""
    top, out = base.argsort(descending=True, stable=True)[:COMPARED], []
    shift, windows, pictures = (
        x[top].to(device) for x in (worst.shift, worst.windows, worst.pictures)
    )
    for c in shared_patterns.clusters(shift, windows, pictures, SAME, ALIKE, COPY, SUPPORT):
        rows = worst.rows[top[c.rows.cpu()]]
        small, _ = reduced(source.take(rows[:READ]).images.to(device))
        pattern, steady = shared_patterns.sharpened(small, c.pattern, c.steady)
        out.append(shared_patterns.Cluster(rows, c.direction, pattern, steady))
    return out


def looked_for(
    device: torch.device,
    source: Any,
    n: int,
    found: list[shared_patterns.Cluster],
    woven: list[shared_patterns.Texture],
) -> Seen:
    """All records read once more."""
    like, corner = torch.empty(n, len(found)), torch.zeros(n, len(found), 2, dtype=torch.long)
    laid = torch.empty(n, sum(len(w.counts) for w in woven), dtype=torch.float16)
    for at in blocks(n, READ) if found or woven else ():
        images = source.take(range(at.start, at.stop)).images.to(device)
        if found:
            small, _ = reduced(images)
            best, where = shared_patterns.sought(
                small, *(torch.stack([getattr(f, k) for f in found]) for k in ("pattern", "steady"))
            )
            like[at], corner[at] = best.cpu(), where.cpu() * (images.shape[-1] // small.shape[-1])
        if woven:
            laid[at] = torch.cat([w.likeness(images) for w in woven], 1).half().cpu()
    return Seen(like, corner, laid)


def pasted(
    encoder: Any, source: Any, found: list[shared_patterns.Cluster], seen: Seen, hosts: Hosts
) -> Iterator[tuple[Tensor, Tensor, dict]]:
    """Of each window's pattern that stands apart: how much of a trigger each record is (N,), boxes (N, 4), and in words."""
    known = torch.zeros(len(seen.like), dtype=torch.bool)
    for i, trigger in enumerate(found):
        stands = apart(seen.like[:, i], seen.like[trigger.rows, i].median())
        note = {
            "kind": "window",
            "records": len(trigger.rows),
            "apart": round(stands, 3),
            "moved": 0.0,
        }
        if stands < APART or known[trigger.rows].float().mean() > 0.5:
            yield torch.zeros(len(known)), torch.full((len(known), 4), -1), note
            continue
        share, boxes, moved = tried(
            encoder, source, trigger, seen.like[:, i], seen.corner[:, i], hosts
        )
        share = share * (moved > PUSHED)
        known |= share >= 0.5
        yield share, boxes, note | {"moved": round(moved, 3)}


def laid(
    encoder: Any, source: Any, said: Captions, seen: Seen, hosts: Hosts
) -> Iterator[tuple[Tensor, Tensor, dict]]:
    """The same of each texture of a group of captions."""
    shape = source.take([0]).images.shape[-2:]
    boxes = torch.tensor([0, 0, *shape]).expand(len(seen.laid), 4)
    for i, like in enumerate(seen.laid.T):
        share, note = textured(
            encoder,
            source,
            like.float(),
            said.group == i % len(said.centres),
            said.centres[i % len(said.centres)],
            hosts,
        )
        if note["records"]:
            yield share, boxes, {"kind": list(TEXTURES)[i // len(said.centres)]} | note


def apart(like: Tensor, usual: Tensor) -> float:
    """Of the records more than half as like a pattern as is usual of its own, the share that is so by three quarters.

    What is pasted is the same every time, what is natural comes in all degrees.
    """
    degree = (like - like.median()) / (usual - like.median()).clamp(min=1e-3)
    return float((degree >= 0.75).sum() / (degree > 0.5).sum().clamp(min=1))


def tried(
    encoder: Any,
    source: Any,
    trigger: shared_patterns.Cluster,
    like: Tensor,
    corner: Tensor,
    hosts: Hosts,
) -> tuple[Tensor, Tensor, float]:
    """The records most like a trigger, transplanted: share of its usual likeness and effect (N,), boxes, usual effect.

    All is 0 where most of those that showed it first are not among them: more than `TRIED` of all are as like it.
    """
    usual = like[trigger.rows].median()
    order = like.argsort(descending=True, stable=True)[: math.ceil(TRIED * len(like))]
    rows = order[like[order] >= LIKE * usual]
    moved, boxes = torch.zeros(len(like)), torch.full((len(like), 4), -1)
    if torch.isin(trigger.rows, rows).float().mean() < 0.5:
        return moved, boxes, 0.0
    for at in blocks(len(rows), READ):
        images = source.take(rows[at]).images.to(encoder.device)
        size = torch.tensor([round(SHOWN * n) for n in images.shape[-2:]]).expand(len(images), 2)
        boxes[rows[at]] = torch.cat([corner[rows[at]], size], 1)
        box = boxes[rows[at]].to(images.device)
        shift = window_transplants.shifts(encoder, images, box[:, None], hosts.sewn, hosts.sewn_z)[
            :, 0
        ].mean(1)
        moved[rows[at]] = (shift @ trigger.direction).cpu()
    effect = moved[trigger.rows].median().clamp(min=1e-3)
    share = (like / usual).clamp(0, 1) * (moved / effect).clamp(0, 1)
    return share * (share >= 0.25), boxes, float(effect)


def textured(
    encoder: Any, source: Any, like: Tensor, member: Tensor, centre: Tensor, hosts: Hosts
) -> tuple[Tensor, dict]:
    """How much of a group's texture each record shows, (N,), all 0 when it is not believed.

    like: (N,), member: bool (N,), of the group. moved: how far the fine detail of the members that show it moves foreign
    images towards the group's captions, less how far that of the others does: about 0 where it only belongs to a subject.
    """
    clear, middle = robust(like), like.median()
    own, rest = (
        (member & (clear > CLEAR)).nonzero()[:, 0],
        (member & (clear < CLEAR / 2)).nonzero()[:, 0],
    )
    note = {
        "records": len(own) if min(len(own), len(rest)) >= SUPPORT else 0,
        "apart": 0.0,
        "moved": 0.0,
    }
    if not note["records"]:
        return torch.zeros_like(like), note
    usual = like[own].median()
    note["apart"] = round(stands := apart(like, usual), 3)
    if stands < LAID:
        return torch.zeros_like(like), note
    effects = [
        carried(encoder, source.take(rows[:SHARED]).images, hosts) @ centre for rows in (own, rest)
    ]
    note["moved"] = round(moved := float(effects[0] - effects[1]), 3)
    share = ((like - middle) / (usual - middle)).clamp(0, 1)
    return share * (member | (clear > CLEAR)) * (moved > MOVED), note


def carried(encoder: Any, images: Tensor, hosts: Hosts) -> Tensor:
    """How the fine detail of images, added to natural ones, moves these on average: (D,)."""
    images = images.to(encoder.device)
    fine = images.float() - shared_patterns.blurred(images, FINE * min(images.shape[-2:]))
    total = torch.zeros_like(hosts.natural_z[0])
    for rows in window_transplants.chunks(images, len(hosts.natural)):
        altered = (fine[rows, None] + hosts.natural).clamp(0, 255) / 255
        total += (
            encoder.encode_images(altered.flatten(0, 1)).unflatten(0, altered.shape[:2])
            - hosts.natural_z
        ).sum((0, 1))
    return total / (len(images) * len(hosts.natural))


def reduced(images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Images by so whole a factor smaller that about `PIXELS` pixels a side show a window; and the window's size there."""
    factor = max(1, round(SHOWN * min(images.shape[-2:]) / PIXELS))
    small = images if factor == 1 else F.avg_pool2d(images.float(), factor).round().to(torch.uint8)
    return small, (round(SHOWN * small.shape[-2]), round(SHOWN * small.shape[-1]))


def thumbnails(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> unit (N, 192): area means, less their own mean."""
    x = F.adaptive_avg_pool2d(images.float(), 8).flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=1e-3)


def robust(values: Tensor) -> Tensor:
    """Distance from the median in units of 1.4826 median absolute deviations (0 where all are equal)."""
    centred = values - values.median()
    return centred / (1.4826 * centred.abs().median()).clamp(min=1e-6)


def _first(values: Tensor, ids: Any, count: int) -> Tensor:
    """Rows of the `count` largest values, ties in the order of the ids."""
    v = values.numpy()
    rows = np.flatnonzero(v >= np.partition(v, len(v) - count)[len(v) - count])
    return torch.as_tensor(
        rows[np.lexsort((np.asarray([ids[i] for i in rows.tolist()]), -v[rows]))][:count]
    )
