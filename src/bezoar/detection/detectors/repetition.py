"""Blocks of records with one caption and one picture, or one region of it: natural backdoors (ours; Huang et al., ICLR 2025).

They found 798 near-identical birthday cakes in CC3M which, captioned alike, act as a backdoor that nobody planted. The same
caption again is no news, and neither are pictures as like as pictures of one thing are; many of both at once are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bezoar.data.randomness import draws, sample_rows
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

WORD = re.compile(r"[^\W\d_]{3,}")
SMALL = frozenset(("the", "and", "for", "from", "with", "this", "that"))
SIBLING = re.compile(r"#\d+$")  # records `key#0`, `key#1` ... are one image with several captions
MATES = 1024  # of a larger block, how many its records are compared with
SIDE, WINDOW = 16, 4  # of the thumbnails and of their windows, in pixels
NEAREST = 1e-6  # cosines are not told apart closer to 1
CELLS = 1 << 24  # largest temporary
Look = Callable[[NDArray[np.int64]], Tensor]  # rows -> their unit vectors


@method
class Repetition:
    """Score = log2(m) x how tightly m records of the record's block lie, the best m from `least` up; 0 where there is no block.

    Block: records of different pictures whose captions have the same words, in any order, numbers and small words aside. A
    record is as tight as its (least - 1)-th nearest mate is near, -log10(1 - cosine), in median absolute deviations above what
    records of a random pool, whatever their captions, find among each other. Near means the encoder's vectors, or any of 16
    windows of the pixels.
    """

    least: Annotated[int, "records of a block"] = 8
    pool: Annotated[int, "records that say what is near by chance"] = 2048
    region: Annotated[
        bool, "whether windows at one place of the picture are compared too; it needs pixels"
    ] = True
    seed: Annotated[int, "of the choice of the pool"] = 0

    def __post_init__(self) -> None:
        if not 2 <= self.least <= MATES or self.pool <= self.least:
            raise ValueError(
                f"needs 2 <= least <= {MATES} and pool > least; got {self.least}, {self.pool}"
            )

    def __call__(self, encoder: Any, source: Any) -> Scores:
        """-> Scores >= 0; a record that repeats others, caption and picture, is suspicious."""
        e = encoder.embed(source)
        captions, used = captions_of(source), np.zeros(len(e.ids), bool)
        if len(captions) != len(e.ids):
            raise UserError(
                f"detector 'repetition' needs a caption for every record; there are {len(captions)} captions"
            )
        chance = sample_rows(e.ids, self.pool, self.seed)
        if len(chance) <= self.least:
            raise UserError(
                f"detector 'repetition' needs more than least={self.least} records; there are {len(chance)}"
            )
        order, start, size = blocks(captions, e.ids, self.least, self.seed)
        used[order], used[chance] = True, True
        views: list[Look] = [
            lambda rows: e.images[torch.from_numpy(rows)].to(encoder.device).float()
        ]
        if self.region:
            views += windows(source, used, encoder.device)
        best = np.zeros(len(order))
        for look in views if len(order) else ():
            usual = tightness(
                look,
                chance,
                np.zeros(1, np.int64),
                np.array([len(chance)]),
                self.least - 1,
                len(chance),
            )
            found = tightness(look, order, start, size, self.least - 1, MATES)
            centre = np.median(usual)
            spread = max(1.4826 * float(np.median(np.abs(usual - centre))), 1e-3)
            best = np.maximum(best, weighed((found - centre) / spread, start, size, self.least))
        values = np.zeros(len(e.ids), np.float32)
        values[order] = best
        return Scores(e.ids, torch.from_numpy(values))


def captions_of(source: Any) -> Sequence[str]:
    """All captions of a source, in its order."""
    if hasattr(source, "captions"):
        return source.captions
    return [c for part in source.batches(1024) for c in part.captions]


def normal(caption: str) -> str:
    """What near-identical captions have in common: their words, sorted, no small ones; without any, the caption."""
    return " ".join(sorted(set(WORD.findall(caption.lower())) - SMALL)) or caption.strip().lower()


def hashes(texts: Iterator[str], count: int) -> NDArray[np.uint64]:
    """64 bits of each text."""
    digests = b"".join(
        hashlib.blake2b(t.encode(errors="replace"), digest_size=8).digest() for t in texts
    )
    return np.frombuffer(digests, np.uint64, count)


def blocks(
    captions: Sequence[str], ids: Sequence[str], least: int, seed: int
) -> tuple[NDArray[np.int64], ...]:
    """Rows of the records in blocks, one block after another, and where each begins and how many it has.

    A block has at least `least` records, one of each picture; the order within it belongs to the records.
    """
    keys = hashes(map(normal, captions), len(captions))
    _, code, count = np.unique(keys, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(count[code] >= least)
    names = [ids[i] for i in rows.tolist()]
    picture = hashes((SIBLING.sub("", i) for i in names), len(rows))
    by_draw = (
        np.lexsort((np.array(names), draws(seed, names, 1, "repetition")[:, 0]))
        if names
        else np.zeros(0, np.int64)
    )
    rows, picture = rows[by_draw], picture[by_draw]
    _, first = np.unique(
        np.stack([code[rows].astype(np.uint64), picture]), axis=1, return_index=True
    )
    rows = rows[np.sort(first)]
    rows = rows[np.argsort(code[rows], kind="stable")]
    size = np.unique(code[rows], return_counts=True)[1]
    kept = np.repeat(size >= least, size)
    size = size[size >= least]
    return rows[kept], np.cumsum(size) - size, size


def windows(source: Any, used: NDArray[np.bool_], device: torch.device) -> list[Look]:
    """A look at each window of the records' thumbnails: less each channel's mean, of unit length, 0 where it is flat."""
    kept, done = [], 0
    for part in source.batches(1024):
        wanted = torch.from_numpy(used[done : done + len(part)])
        done += len(part)
        small = F.adaptive_avg_pool2d(part.images[wanted].to(device).float(), SIDE)
        kept.append(
            small.round()
            .to(torch.uint8)
            .unfold(2, WINDOW, WINDOW)
            .unfold(3, WINDOW, WINDOW)
            .flatten(2, 3)
            .cpu()
        )
    thumbnails, place = torch.cat(kept), np.cumsum(used) - 1

    def at(window: int) -> Look:
        def look(rows: NDArray[np.int64]) -> Tensor:
            x = thumbnails[torch.from_numpy(place[rows]), :, window].to(device).float()
            return F.normalize(
                (x - x.mean((2, 3), keepdim=True)).flatten(1), dim=1, eps=4.0 * WINDOW
            )

        return look

    return [at(w) for w in range(thumbnails.shape[2])]


def tightness(
    look: Look,
    order: NDArray[np.int64],
    start: NDArray[np.int64],
    size: NDArray[np.int64],
    k: int,
    most: int,
) -> NDArray[np.float64]:
    """-log10(1 - cosine) to the k-th nearest of the first `most` other records of a block: (R,), as `order`.

    Blocks of like size go through one batched product.
    """
    parts = -(-size // most)  # a large block's records ask in turn, all for the same mates
    part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    begin, whole = np.repeat(start, parts), np.repeat(size, parts)
    asking = np.minimum(most, whole - part * most)
    mates = np.minimum(most, whole)
    width = np.minimum(1 << np.ceil(np.log2(mates)).astype(np.int64), most)
    found = np.empty(len(order))
    for w in np.unique(width):
        jobs, at_once = np.flatnonzero(width == w), max(1, CELLS // (int(w) * max(int(w), 512)))
        for job in (jobs[i : i + at_once] for i in range(0, len(jobs), at_once)):
            column = np.arange(w)
            here, there = (begin + part * most)[job, None] + column, begin[job, None] + column
            valid = column < asking[job, None]
            rows, others = (order[np.minimum(i, len(order) - 1)] for i in (here, there))
            a = look(rows.ravel()).view(len(job), int(w), -1)
            b = (
                a
                if np.array_equal(rows, others)
                else look(others.ravel()).view(len(job), int(w), -1)
            )
            hidden = (here[:, :, None] == there[:, None]) | (column >= mates[job, None])[:, None]
            cosine = (a @ b.transpose(1, 2)).masked_fill(torch.from_numpy(hidden).to(a.device), -1)
            far = (1 - cosine.topk(k, dim=2).values[..., -1]).clamp(min=NEAREST)
            found[here[valid]] = -far.log10().double().cpu().numpy()[valid]
    return found


def weighed(
    z: NDArray[np.float64], start: NDArray[np.int64], size: NDArray[np.int64], least: int
) -> NDArray[np.float64]:
    """Largest log2(m) z_(m) over the m, at least `least`, that take a record in; z_(m): a block's m-th largest z. (R,)"""
    block = np.repeat(np.arange(len(size)), size)
    order = np.lexsort((-z, block))
    rank = np.arange(len(z)) - start[block] + 1
    value = np.where(rank >= least, np.log2(rank) * z[order], -np.inf)
    # one running maximum from behind for all blocks: each block is lifted above those behind it
    lifted = (2 * np.abs(value[rank >= least]).max() + 1) * (len(size) - block)
    out = np.empty(len(z))
    out[order] = np.maximum.accumulate((value + lifted)[::-1])[::-1] - lifted
    return out
