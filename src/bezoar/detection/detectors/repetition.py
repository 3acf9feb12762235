"""Blocks of records with one caption and one picture, or one region of it: natural backdoors (ours;
Huang et al., ICLR 2025).

They found 798 near-identical birthday cakes in CC3M which, captioned alike, act as a backdoor that
nobody planted. The same caption again is no news, and neither are pictures as like as pictures of
one thing are; many of both at once are.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bezoar.data.blocks import blocks
from bezoar.data.randomness import draws, sample_rows
from bezoar.detection.detectors import RecordEncoder, Records, read_captions
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

WORD = re.compile(r"[^\W\d_]{3,}")
SMALL_WORDS = frozenset(("the", "and", "for", "from", "with", "this", "that"))
SIBLING = re.compile(r"#\d+$")  # records `key#0`, `key#1` ... are one image with several captions
MAX_MATES = 1024  # of a larger block, how many its records are compared with
SIDE = 16  # of the thumbnails, in pixels
WINDOW = 4  # side of their windows, in pixels
MIN_DISTANCE = 1e-6  # cosines are not told apart closer to 1
MAX_VALUES = 1 << 24  # of the largest temporary

View = Callable[[NDArray[np.int64]], Tensor]  # rows -> their unit vectors


@dataclass(frozen=True)
class RecordBlocks:
    """B blocks."""

    rows: NDArray[np.int64]  # int64 (R,), one block after another
    start: NDArray[np.int64]  # int64 (B,), of each
    size: NDArray[np.int64]  # int64 (B,), of each


@method
class Repetition:
    """Score = log2(m) x how tightly m records of the record's block lie, the best m from `least`
    up; 0 where there is no block.

    Block: records of different pictures whose captions have the same words, in any order, numbers
    and small words aside. A record is as tight as its (least - 1)-th nearest mate is near, -log10(1
    - cosine), in median absolute deviations above what records of a random pool, whatever their
    captions, find among each other. Near means the encoder's vectors, or any of 16 windows of the
    pixels.
    """

    least: Annotated[int, "how many records make a block"] = 8
    pool: Annotated[int, "how many records say what is near by chance"] = 2048
    region: Annotated[
        bool, "whether windows at one place of the picture are compared too; it needs pixels"
    ] = True
    seed: Annotated[int, "seed of the pool and of the order within a block"] = 0

    def __post_init__(self) -> None:
        if not 2 <= self.least <= MAX_MATES or self.pool <= self.least:
            raise ValueError(
                f"needs 2 <= least <= {MAX_MATES} and pool > least; got {self.least}, {self.pool}"
            )

    def __call__(self, encoder: RecordEncoder, source: Records) -> Scores:
        """-> Scores >= 0; a record that repeats others, caption and picture, is suspicious."""
        embedded = encoder.embed(source)
        ids, captions = embedded.ids, read_captions(source)
        if len(captions) != len(ids):
            raise UserError(
                "detector 'repetition' needs a caption for every record; there are "
                f"{len(captions)} captions"
            )
        sample = sample_rows(ids, self.pool, self.seed)
        if len(sample) <= self.least:
            raise UserError(
                f"detector 'repetition' needs more than least={self.least} records; there are "
                f"{len(sample)}"
            )
        repeated = find_blocks(captions, ids, self.least, self.seed)
        scores = np.zeros(len(ids), np.float32)
        if len(repeated.rows):
            views: list[View] = [
                lambda rows: embedded.images[torch.from_numpy(rows)].to(encoder.device).float()
            ]
            if self.region:
                views += window_views(
                    source, np.union1d(repeated.rows, sample), len(ids), encoder.device
                )
            scores[repeated.rows] = np.max(
                [self.weigh_view(view, repeated, sample) for view in views], 0, initial=0.0
            )
        return Scores(ids, torch.from_numpy(scores))

    def weigh_view(
        self, view: View, repeated: RecordBlocks, sample: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """The scores of the blocks' records by one kind of vectors: float64 (R,)."""
        k = self.least - 1
        everyone = RecordBlocks(sample, np.zeros(1, np.int64), np.array([len(sample)]))
        by_chance = measure_tightness(view, everyone, k, len(sample))
        tightness = measure_tightness(view, repeated, k, MAX_MATES)
        centre = np.median(by_chance)
        spread = max(1.4826 * float(np.median(np.abs(by_chance - centre))), 1e-3)
        return weigh_records((tightness - centre) / spread, repeated, self.least)


def normalize_caption(caption: str) -> str:
    """A caption's words, sorted, without small ones; the caption itself where none is left."""
    words = set(WORD.findall(caption.lower())) - SMALL_WORDS
    return " ".join(sorted(words)) or caption.strip().lower()


def hash_texts(texts: Iterable[str]) -> NDArray[np.uint64]:
    """64 bits of each text."""
    digests = [hashlib.blake2b(t.encode(errors="replace"), digest_size=8).digest() for t in texts]
    return np.frombuffer(b"".join(digests), np.uint64)


def find_blocks(captions: Sequence[str], ids: Sequence[str], least: int, seed: int) -> RecordBlocks:
    """Blocks of at least `least` records with like captions, one of each picture; the order within
    is drawn by the ids.
    """
    keys = hash_texts(map(normalize_caption, captions))
    _, code, count = np.unique(keys, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(count[code] >= least)
    if not len(rows):
        return RecordBlocks(rows, rows, rows)
    names = [ids[i] for i in rows.tolist()]
    picture = hash_texts(SIBLING.sub("", name) for name in names)
    order = np.lexsort((np.array(names), draws(seed, names, 1, "repetition")[:, 0]))
    rows, picture = rows[order], picture[order]
    block_and_picture = np.stack([code[rows].astype(np.uint64), picture])
    _, first = np.unique(block_and_picture, axis=1, return_index=True)
    rows = rows[np.sort(first)]
    rows = rows[np.argsort(code[rows], kind="stable")]
    size = np.unique(code[rows], return_counts=True)[1]
    large = size >= least
    rows, size = rows[np.repeat(large, size)], size[large]
    return RecordBlocks(rows, np.cumsum(size) - size, size)


def window_views(
    source: Records, rows: NDArray[np.int64], count: int, device: torch.device
) -> list[View]:
    """A view for each window of the thumbnails: its pixels less each channel's mean, of unit
    length, 0 where it is flat.

    Args:
        rows: int64 (R,), ascending, the records that will be looked at.
        count: N records in all.
        device: Where the vectors are wanted.
    """
    needed = np.zeros(count, bool)
    needed[rows] = True
    parts, start = [], 0
    for batch in source.batches(1024):
        chosen = torch.from_numpy(needed[start : start + len(batch)])
        start += len(batch)
        small = F.adaptive_avg_pool2d(batch.images[chosen].to(device).float(), SIDE)
        cut = small.round().to(torch.uint8).unfold(2, WINDOW, WINDOW).unfold(3, WINDOW, WINDOW)
        parts.append(cut.flatten(2, 3).cpu())  # (B, 3, windows, WINDOW, WINDOW)
    windows = torch.cat(parts)

    def view_of(window: int) -> View:
        def view(wanted: NDArray[np.int64]) -> Tensor:
            place = torch.from_numpy(np.searchsorted(rows, wanted))
            x = windows[place, :, window].to(device).float()
            x = (x - x.mean((2, 3), keepdim=True)).flatten(1)
            return F.normalize(x, dim=1, eps=4.0 * WINDOW)

        return view

    return [view_of(w) for w in range(windows.shape[2])]


def measure_tightness(
    view: View, groups: RecordBlocks, k: int, max_mates: int
) -> NDArray[np.float64]:
    """-log10(1 - cosine) to the k-th nearest of the first `max_mates` other records of a block:
    float64 (R,).

    Parts of blocks of like width go through one batched product.
    """
    # a large block is cut into parts, which are all compared with the same mates
    parts = -(-groups.size // max_mates)
    offset = max_mates * (np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts))
    mates_start, block_size = np.repeat(groups.start, parts), np.repeat(groups.size, parts)
    start = mates_start + offset
    size = np.minimum(max_mates, block_size - offset)
    mates = np.minimum(max_mates, block_size)
    widths = np.minimum(1 << np.ceil(np.log2(mates)).astype(np.int64), max_mates)
    tightness = np.empty(len(groups.rows))
    for width in np.unique(widths).tolist():
        same_width = np.flatnonzero(widths == width)
        column = np.arange(width)
        for batch in blocks(len(same_width), max(1, MAX_VALUES // (width * max(width, 512)))):
            job = same_width[batch]
            places = start[job, None] + column  # (J, width), among the blocks' rows
            mate_places = mates_start[job, None] + column
            missing = column >= mates[job, None]
            nearest = _nearest_mates(view, groups.rows, places, mate_places, missing, k)
            valid = column < size[job, None]
            tightness[places[valid]] = nearest[valid]
    return tightness


def _nearest_mates(
    view: View,
    rows: NDArray[np.int64],
    places: NDArray[np.int64],
    mate_places: NDArray[np.int64],
    missing: NDArray[np.bool_],
    k: int,
) -> NDArray[np.float64]:
    """-log10(1 - cosine) from each of `places` (J, W) to the k-th nearest of `mate_places` (J, W)
    that are not `missing`: (J, W).
    """
    (jobs, width), last = places.shape, len(rows) - 1
    records, mates = rows[np.minimum(places, last)], rows[np.minimum(mate_places, last)]
    a = view(records.ravel()).view(jobs, width, -1)
    b = a if np.array_equal(records, mates) else view(mates.ravel()).view(jobs, width, -1)
    hidden = torch.from_numpy((places[:, :, None] == mate_places[:, None]) | missing[:, None])
    cosine = (a @ b.transpose(1, 2)).masked_fill(hidden.to(a.device), -1)
    distance = (1 - cosine.topk(k, dim=2).values[..., -1]).clamp(min=MIN_DISTANCE)
    return -distance.log10().double().cpu().numpy()


def weigh_records(z: NDArray[np.float64], groups: RecordBlocks, least: int) -> NDArray[np.float64]:
    """The largest log2(m) z_(m) over the m, at least `least`, that take a record in: float64 (R,).

    z: float64 (R,), how tight each record is. z_(m) is the m-th largest of a block.
    """
    weights = np.empty(len(z))
    for start, size in zip(groups.start.tolist(), groups.size.tolist(), strict=True):
        order = start + np.argsort(-z[start : start + size], kind="stable")
        m = np.arange(1, size + 1)
        weight = np.where(m >= least, np.log2(m) * z[order], -np.inf)
        weights[order] = np.maximum.accumulate(weight[::-1])[::-1]
    return weights
