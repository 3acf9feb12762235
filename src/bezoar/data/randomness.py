"""data.randomness"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from bezoar.data.blocks import blocks

BLOCK = 1 << 16  # ids at a time


def draws(seed: int, ids: Sequence[str], count: int, use: str = "") -> np.ndarray:
    """Uniform numbers in [0, 1), float64 (len(ids), count), that belong to the records and not to the moment.

    A record's row is a function of (seed, id) alone: order, batch size, worker and shard do not matter. `use` (at most
    16 bytes) says what for: two uses of one seed are independent, so that, say, no poison prefers a wrong caption.
    Counter-based: SplitMix64 (Steele, Lea, Flood 2014) of a keyed BLAKE2b of the id.
    """
    key = seed.to_bytes(8, "little", signed=True)
    digests = b"".join(
        hashlib.blake2b(i.encode(), digest_size=8, key=key, person=use.encode()).digest()
        for i in ids
    )
    start = np.frombuffer(digests, dtype="<u8").reshape(-1, 1)
    with np.errstate(over="ignore"):
        x = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def generator(*key: int) -> torch.Generator:
    """A generator that belongs to its key and to nothing else."""
    mixed = 0
    for k in key:
        mixed = (mixed * 0x9E3779B97F4A7C15 + k + 1) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


def sample_rows(ids: Sequence[str], size: int, seed: int) -> np.ndarray:
    """Rows of a fixed sample of the records, int64 (min(size, N),), in an order that belongs to the records.

    The `size` records with the smallest draw: which they are depends on (seed, ids) and on nothing else.
    """
    drawn = np.concatenate(
        [draws(seed, ids[rows], 1, "pool")[:, 0] for rows in blocks(len(ids), BLOCK)]
        or [np.empty(0)]
    )
    last = np.partition(drawn, size - 1)[size - 1] if 0 < size < len(drawn) else np.inf
    rows = np.flatnonzero(drawn <= last)
    return rows[np.lexsort((np.asarray([ids[i] for i in rows.tolist()]), drawn[rows]))][:size]
