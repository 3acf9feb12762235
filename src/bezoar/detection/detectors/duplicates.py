"""Near-identical images whose captions diverge: the mark of targeted poisoning (ours; against Carlini & Terzis 2022).

One image repeated with many captions of a wanted label is what targeted poisoning puts into a data
set, whatever the label. Likeness is measured on pixels, so no encoder, poisoned or not, has an
influence on it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from bezoar.detection.detectors import RecordEncoder, Records
from bezoar.encoders.encoder import split_words
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

MAX_SIMILARITIES = 1 << 24  # values of one block of similarities
MAX_COMPARED = 64  # other records of a cluster that a caption is compared with
SIBLING = re.compile(r"#\d+$")  # records `key#0`, `key#1` ... are one image with several captions


@method
class Duplicates:
    """Score = divergence x log2(images in the cluster); records without a near-duplicate score
    below 0.

    Cluster: connected component of images whose thumbnails have a cosine of at least `similarity`.
    Divergence: mean over the other images of the cluster of 1 - Jaccard(caption words). Every two
    images are compared: N^2 x 3 side^2.
    """

    similarity: Annotated[
        float, "cosine of two thumbnails from which their images are near-identical"
    ] = 0.98
    side: Annotated[int, "side of the thumbnails in pixels"] = 8

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= 1 or self.side < 2:
            raise ValueError(
                f"needs 0 < similarity <= 1 and side >= 2; got {self.similarity}, {self.side}"
            )

    def __call__(self, encoder: RecordEncoder, source: Records) -> Scores:
        """-> Scores: up to log2(images) in a cluster; nearest cosine - 1, below 0, outside."""
        ids: list[str] = []
        captions: list[str] = []
        thumbnails: list[Tensor] = []
        for batch in source.batches(1024):
            ids += batch.ids
            captions += batch.captions
            thumbnails.append(make_thumbnails(batch.images.to(encoder.device), self.side))
        if len(captions) != len(ids) or not ids:
            raise UserError(
                f"detector 'duplicates' needs a caption for every image; there are {len(captions)} captions"
            )
        names = [SIBLING.sub("", i) for i in ids]
        _, first, image = np.unique(names, return_index=True, return_inverse=True)
        vectors = torch.cat(thumbnails)[torch.as_tensor(first)]
        cluster, nearest = cluster_images(vectors, self.similarity)
        size = np.bincount(cluster)[cluster][image]  # images in each record's cluster
        divergence = caption_divergence(captions, ids, image, cluster[image])
        lonely = np.minimum(nearest, self.similarity)[image] - 1
        scores = np.where(size > 1, divergence * np.log2(size), lonely)
        return Scores(tuple(ids), torch.as_tensor(scores, dtype=torch.float32))


def make_thumbnails(images: Tensor, side: int) -> Tensor:
    """uint8 (N, 3, H, W) -> unit (N, 3 side^2): area means less each channel's mean; flat: 0."""
    small = F.adaptive_avg_pool2d(images.float(), side)
    return F.normalize((small - small.mean((2, 3), keepdim=True)).flatten(1), dim=1, eps=1e-3)


def cluster_images(
    vectors: Tensor, similarity: float, max_values: int = MAX_SIMILARITIES
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Connected components of the graph of near-identical images.

    Blocks of rows are merged into the components as they come, so memory does not grow with the
    number of edges.

    Args:
        vectors: Unit rows (M, D).
        similarity: Cosine from which two of them are connected.
        max_values: Similarities in memory at a time.

    Returns:
        The component of each row, int64 (M,), and its cosine to the nearest other row, float64
        (M,).
    """
    m = len(vectors)
    component, nearest = np.arange(m), np.full(m, -1.0)
    rows = max(1, max_values // m)
    for start in range(0, m, rows):
        cosines = vectors[start : start + rows] @ vectors.T
        diagonal = torch.arange(len(cosines), device=cosines.device)
        cosines[diagonal, diagonal + start] = -1
        nearest[start : start + rows] = cosines.amax(1).double().cpu().numpy()
        i, j = (cosines >= similarity).nonzero().cpu().numpy().T
        edges = component[i + start], component[j]
        graph = coo_array((np.ones(len(i), bool), edges), shape=(m, m))
        merged = connected_components(graph, directed=False)[1]
        component = merged.astype(np.int64)[component]
    return np.unique(component, return_inverse=True)[1], nearest


def caption_divergence(
    captions: Sequence[str],
    ids: Sequence[str],
    image: NDArray[np.int64],
    cluster: NDArray[np.int64],
) -> NDArray[np.float64]:
    """How much the caption of each record differs from those of the other images of its cluster.

    The members of a cluster stand in a ring in the order of their ids and are compared with the
    next MAX_COMPARED of it: with all others up to that many.

    Args:
        captions: N captions.
        ids: N keys.
        image: int64 (N,), which image each record has.
        cluster: int64 (N,), which cluster it is in.

    Returns:
        The mean of 1 - Jaccard(words), float64 (N,), 0 where there is nothing to compare with.
    """
    order = np.lexsort((np.asarray(ids), cluster))
    _, starts, inverse, counts = np.unique(
        cluster[order], return_index=True, return_inverse=True, return_counts=True
    )
    start, size = starts[inverse], counts[inverse]
    place = np.arange(len(order)) - start
    bags = _bags_of_words([captions[i] for i in order])
    lengths, images = np.asarray(bags.sum(1)), image[order]
    total, compared = np.zeros(len(order)), np.zeros(len(order))
    for shift in range(1, min(MAX_COMPARED, int(size.max()) - 1) + 1):
        i = np.flatnonzero(size > shift)
        j = start[i] + (place[i] + shift) % size[i]
        different = images[i] != images[j]
        i, j = i[different], j[different]
        shared = np.asarray(bags[i].multiply(bags[j]).sum(1))
        total[i] += 1 - shared / np.maximum(lengths[i] + lengths[j] - shared, 1)
        compared[i] += 1
    divergence = np.zeros(len(order))
    divergence[order] = total / np.maximum(compared, 1)
    return divergence


def _bags_of_words(captions: Sequence[str]) -> csr_array:
    """Which words each caption holds: 0/1 (N, V)."""
    columns: dict[str, int] = {}
    pairs = [
        (row, columns.setdefault(word, len(columns)))
        for row, caption in enumerate(captions)
        for word in set(split_words(caption))
    ]
    i, j = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    shape = (len(captions), max(1, len(columns)))
    return csr_array((np.ones(len(pairs)), (i, j)), shape=shape)
