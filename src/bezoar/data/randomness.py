"""Random numbers that depend only on the seed, the record and the step, so runs can be repeated."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from bezoar.data.blocks import blocks

BLOCK = 1 << 16  # ids at a time


def draws(seed: int, ids: Sequence[str], count: int, use: str = "") -> np.ndarray:
    """Draw uniform numbers for records.

    A record's numbers are a function of (seed, id, use) alone; order, batch size, worker and shard
    do not matter. The generator is counter-based: SplitMix64 (Steele, Lea, Flood 2014) of a keyed
    BLAKE2b of the id.

    Args:
        seed: any 64-bit integer.
        ids: ids of N records.
        count: numbers for each record.
        use: purpose of the numbers, at most 16 bytes. Different uses of one seed are independent,
            so that, for example, poisons do not prefer wrong captions.

    Returns:
        float64 (N, count) in [0, 1).
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
    uniform: np.ndarray = (x >> np.uint64(11)).astype(np.float64) / float(1 << 53)
    return uniform


def generator(*key: int) -> torch.Generator:
    """Make a generator whose numbers are a function of the key, for example (seed, step), alone."""
    mixed = 0
    for k in key:
        mixed = (mixed * 0x9E3779B97F4A7C15 + k + 1) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


def sample_rows(ids: Sequence[str], size: int, seed: int) -> np.ndarray:
    """Choose a fixed sample of records: the `size` records with the smallest draw.

    The sample and its order depend on (seed, ids) and on nothing else.

    Returns:
        int64 (min(size, N),): rows of `ids`.
    """
    parts = [draws(seed, ids[rows], 1, "pool")[:, 0] for rows in blocks(len(ids), BLOCK)]
    numbers = np.concatenate(parts or [np.empty(0)])
    last = np.partition(numbers, size - 1)[size - 1] if 0 < size < len(numbers) else np.inf
    rows = np.flatnonzero(numbers <= last)
    order = np.lexsort((np.asarray([ids[i] for i in rows.tolist()]), numbers[rows]))
    return rows[order][:size]
