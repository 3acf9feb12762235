"""Which records resemble the worst ones, and which of these resemble one another: by vectors, and by words of captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bezoar.data.strings import Strings
from bezoar.encoders.encoder import EmbeddedRecords, split_words

BLOCK_ROWS = 1 << 16  # vectors of a block
NEAR = 3
SAMPLE = 5000  # captions by which a word is usual
COMMON = 0.2  # share of the captions from which it tells nothing
APART = 0.55  # mean distance at which groups are no longer joined, 0..1


@torch.inference_mode()
def find_nearest(
    embedded: EmbeddedRecords, rows: Sequence[int], count: int = NEAR
) -> tuple[np.ndarray, np.ndarray]:
    """The records most like the given ones, not they themselves: rows int64 (M, K) and cosines (M, K), K <= count."""
    z, own = embedded.images, torch.as_tensor(rows)
    wanted = z[own].float()
    count = max(0, min(count, len(z) - 1))
    best, near = (
        torch.full((len(own), count), -torch.inf),
        torch.zeros(len(own), count, dtype=torch.long),
    )
    for start in range(0, len(z), BLOCK_ROWS):
        block = z[start : start + BLOCK_ROWS].float()
        here = torch.arange(start, start + len(block))
        cosine = (wanted @ block.T).masked_fill(own[:, None] == here, -torch.inf)
        every, index = torch.cat([best, cosine], 1), torch.cat([near, here.expand(len(own), -1)], 1)
        best, order = every.topk(count, dim=1)
        near = index.gather(1, order)
    return near.numpy(), best.clamp(-1, 1).numpy()


@dataclass(frozen=True)
class Group:
    """Rows of the list that was grouped, and the words that at least half of their captions share."""

    members: list[int]
    words: list[str]


def group_records(
    vectors: Tensor, captions: Sequence[str], usual: Mapping[str, float], least: int = 3
) -> list[Group]:
    """Records that are alike, the largest group first; smaller ones than `least` are left out.

    vectors: (M, D) unit rows. usual: the share of all captions that hold a word. Distance: the mean of (1 - cosine) / 2, of
    vectors less their mean, and 1 - the share of two captions' words that both have, a word weighing -log of how usual it
    is; joined by average linkage.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(vectors) < least:
        return []
    v = torch.nn.functional.normalize(vectors.float() - vectors.float().mean(0), dim=1)
    cosine = (v @ v.T).double().numpy()
    rare = [{w for w in split_words(c) if usual.get(w, 0) < COMMON} for c in captions]
    every = sorted(set().union(*rare)) if rare else []
    column = {w: i for i, w in enumerate(every)}
    held = np.zeros((len(rare), max(1, len(every))))
    for row, mine in enumerate(rare):
        held[row, [column[w] for w in mine]] = 1
    weight = -np.log([max(usual.get(w, 0), 1 / SAMPLE) for w in every] or [1.0])
    both, size = held @ (weight[:, None] * held.T), held @ weight
    shared = both / np.maximum(size[:, None] + size - both, 1e-9)
    distance = ((1 - cosine) / 2 + 1 - shared) / 2 if every else (1 - cosine) / 2
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(np.clip((distance + distance.T) / 2, 0, 1), checks=False), "average")
    label = fcluster(tree, APART if every else APART / 2, "distance")
    out = []
    for k in np.unique(label):
        members = np.flatnonzero(label == k).tolist()
        if len(members) >= least:
            seen = Counter(w for i in members for w in rare[i])
            out.append(Group(members, [w for w, n in seen.most_common(6) if 2 * n >= len(members)]))
    return sorted(out, key=lambda g: (-len(g.members), g.members))


def word_shares(captions: Strings) -> dict[str, float]:
    """Word -> the share of the captions that hold it, of some spread over all of them."""
    if not len(captions):
        return {}
    rows = np.unique(np.linspace(0, len(captions) - 1, min(SAMPLE, len(captions))).astype(np.int64))
    seen = Counter(w for c in captions.take(rows) for w in set(split_words(c)))
    return {w: n / len(rows) for w, n in seen.items()}
