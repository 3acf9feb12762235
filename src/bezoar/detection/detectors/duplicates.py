"""Near-identical images whose captions diverge: the mark of targeted poisoning (ours; against Carlini & Terzis 2022).

One image repeated with many captions of a wanted label is what targeted poisoning puts into a data set, whatever the
label. Likeness is measured on pixels, so no encoder, poisoned or not, has a say in it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from bezoar.encoders.encoder import split_words
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

CELLS = 1 << 24  # largest block of similarities
COMPARED = 64  # other records of a cluster that a caption is compared with
SIBLING = re.compile(r"#\d+$")  # records `key#0`, `key#1` ... are one image with several captions


@method
class Duplicates:
    """Score = divergence x log2(images in the cluster); records without a near-duplicate score below 0.

    Cluster: connected component of images whose thumbnails have a cosine of at least `similarity`. Divergence: mean
    over the other images of the cluster of 1 - Jaccard(caption words). Every two images are compared: N^2 x 3 side^2.
    """

    similarity: Annotated[
        float, "cosine of two thumbnails from which images are near-identical"
    ] = 0.98
    side: Annotated[int, "side of the thumbnails in pixels"] = 8

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= 1 or self.side < 2:
            raise ValueError(
                f"needs 0 < similarity <= 1 and side >= 2; got {self.similarity}, {self.side}"
            )

    def __call__(self, encoder: Any, source: Any) -> Scores:
        """-> Scores: (0, log2 of the number of images] in a cluster; nearest cosine - 1, in [-2, 0), outside."""
        ids, captions, parts = [], [], []
        for batch in source.batches(1024):
            ids += batch.ids
            captions += batch.captions
            parts.append(thumbnails(batch.images.to(encoder.device), self.side))
        if len(captions) != len(ids) or not ids:
            raise UserError(
                f"detector 'duplicates' needs a caption for every image; there are {len(captions)} captions"
            )
        first, image = np.unique(
            [SIBLING.sub("", i) for i in ids], return_index=True, return_inverse=True
        )[1:]
        cluster, closest = clusters(torch.cat(parts)[torch.as_tensor(first)], self.similarity)
        size = np.bincount(cluster)[cluster]
        found = divergence(captions, ids, image, cluster[image]) * np.log2(size)[image]
        score = np.where(size[image] > 1, found, np.minimum(closest, self.similarity)[image] - 1)
        return Scores(tuple(ids), torch.as_tensor(score, dtype=torch.float32))


def thumbnails(images: Tensor, side: int) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 (N, 3 side^2): area means less each channel's mean, unit length (flat: 0)."""
    small = F.adaptive_avg_pool2d(images.float(), side)
    return F.normalize((small - small.mean((2, 3), keepdim=True)).flatten(1), dim=1, eps=1e-3)


def clusters(
    vectors: Tensor, similarity: float, cells: int = CELLS
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Unit rows (M, D) -> component (M,) of the graph of cosines >= similarity, and cosine (M,) to the nearest other.

    Blocks of rows are merged into the components as they come, so memory does not grow with the number of edges.
    """
    m = len(vectors)
    label, closest = np.arange(m), np.full(m, -1.0)
    rows = max(1, cells // m)
    for start in range(0, m, rows):
        block = vectors[start : start + rows] @ vectors.T
        own = torch.arange(len(block), device=block.device)
        block[own, own + start] = -1
        closest[start : start + rows] = block.amax(1).double().cpu().numpy()
        i, j = (block >= similarity).nonzero().cpu().numpy().T
        graph = coo_array((np.ones(len(i), bool), (label[i + start], label[j])), shape=(m, m))
        label = connected_components(graph, directed=False)[1].astype(np.int64)[label]
    return np.unique(label, return_inverse=True)[1], closest


def divergence(
    captions: list[str], ids: list[str], image: NDArray, cluster: NDArray
) -> NDArray[np.float64]:
    """Mean of 1 - Jaccard(words) to the other images' captions of the same cluster, (N,); 0 where there are none.

    Members of a cluster stand in a ring in the order of their ids and are compared with the next `COMPARED` of it: with
    all others up to that many.
    """
    order = np.lexsort((np.asarray(ids), cluster))
    _, start, inverse, count = np.unique(
        cluster[order], return_index=True, return_inverse=True, return_counts=True
    )
    begin, size, place = start[inverse], count[inverse], np.arange(len(order)) - start[inverse]
    bags = _bags([captions[i] for i in order])
    lengths, pictures = np.asarray(bags.sum(1)), image[order]
    total, compared = np.zeros(len(order)), np.zeros(len(order))
    for shift in range(1, min(COMPARED, int(size.max()) - 1) + 1):
        i = np.flatnonzero(size > shift)
        j = begin[i] + (place[i] + shift) % size[i]
        i, j = i[pictures[i] != pictures[j]], j[pictures[i] != pictures[j]]
        shared = np.asarray(bags[i].multiply(bags[j]).sum(1))
        total[i] += 1 - shared / np.maximum(lengths[i] + lengths[j] - shared, 1)
        compared[i] += 1
    result = np.zeros(len(order))
    result[order] = total / np.maximum(compared, 1)
    return result


def _bags(captions: list[str]) -> csr_array:
    """Which words a caption has: 0/1 (N, V)."""
    rows: dict[str, int] = {}
    pairs = [
        (i, rows.setdefault(w, len(rows)))
        for i, c in enumerate(captions)
        for w in set(split_words(c))
    ]
    i, j = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return csr_array((np.ones(len(pairs)), (i, j)), shape=(len(captions), max(1, len(rows))))
