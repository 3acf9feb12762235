"""Near-identical images whose captions diverge: the mark of targeted poisoning (ours; against
Carlini & Terzis 2022).

One image repeated with many captions of a wanted label is what targeted poisoning puts into a data
set, whatever the label. Likeness is measured on pixels, so no encoder, poisoned or not, has an
influence on it. Copies that are cropped, mirrored, lit otherwise, noisy or stored as JPEG have
thumbnails that are only alike; whether such a pair is one picture is decided by laying one over the
other.
"""

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

from bezoar.detection import picture_copies
from bezoar.detection.detectors import RecordEncoder, Records
from bezoar.encoders.encoder import split_words
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

MAX_SIMILARITIES = 1 << 24  # values of one block of similarities
CANDIDATES = 8  # other images of like thumbnails that an image is laid over
DIVERGING = 0.3  # mean divergence of a group from which it is raised
MAX_COMPARED = 64  # other records of a cluster that a caption is compared with
SIBLING = re.compile(r"#\d+$")  # records `key#0`, `key#1` ... are one image with several captions


@method
class Duplicates:
    """Score = divergence x log2(images in the cluster); records without a near-duplicate score
    below 0.

    Cluster: connected component of images whose thumbnails have a cosine of at least `similarity`,
    or at least `likeness`, mirrored or not, and which are copies of one picture
    (`picture_copies.find_copies`; the nearest 8 of each are tried). Divergence: mean over the other
    images of the cluster of 1 - Jaccard(caption words). Every two images are compared:
    N^2 x 6 side^2. Raised are clusters of a mean divergence of 0.3 in which there are `group`
    images or more that two others say to be copies.
    """

    similarity: Annotated[
        float, "cosine of two thumbnails from which their images are near-identical"
    ] = 0.98
    side: Annotated[int, "side of the thumbnails in pixels"] = 8
    likeness: Annotated[float, "cosine from which one image is laid over the other; 1: never"] = 0.8
    group: Annotated[int, "sure copies in a cluster from which it is raised"] = 4

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= 1 or self.side < 2:
            raise ValueError(
                f"needs 0 < similarity <= 1 and side >= 2; got {self.similarity}, {self.side}"
            )
        if not 0.5 <= self.likeness <= 1 or self.group < 2:
            raise ValueError(
                f"needs 0.5 <= likeness <= 1 and group >= 2; got {self.likeness}, {self.group}"
            )

    def __call__(self, encoder: RecordEncoder, source: Records) -> Scores:
        """-> Scores: up to log2(images) in a cluster; nearest cosine - 1, below 0, outside."""
        ids: list[str] = []
        captions: list[str] = []
        thumbnails: list[Tensor] = []
        pictures: list[NDArray[np.uint8]] = []
        for batch in source.batches(1024):
            ids += batch.ids
            captions += batch.captions
            images = batch.images.to(encoder.device).float()
            thumbnails.append(make_thumbnails(images, self.side))
            if self.likeness < 1:
                pooled = F.adaptive_avg_pool2d(images, picture_copies.SIDE).round()
                pictures.append(pooled.to(torch.uint8).cpu().numpy())
        if len(captions) != len(ids) or not ids:
            raise UserError(
                f"detector 'duplicates' needs a caption for every image; there are {len(captions)} "
                "captions"
            )
        names = [SIBLING.sub("", i) for i in ids]
        _, first, image = np.unique(names, return_index=True, return_inverse=True)
        vectors = torch.cat(thumbnails)[torch.as_tensor(first)]
        cluster, nearest = cluster_images(vectors, self.similarity)
        links = np.bincount(cluster)[cluster] - 1
        if self.likeness < 1:
            one, other, mirrored = find_candidates(vectors, self.side, self.likeness, cluster)
            small = np.concatenate(pictures)[first]
            copies = picture_copies.find_copies(small, one, other, mirrored)
            cluster = merge_clusters(cluster, one[copies], other[copies])
            links = count_links(links, one[copies], other[copies])
        lonely = np.minimum(nearest, self.similarity)[image] - 1
        return self._score(ids, captions, image, cluster, links, lonely)

    def _score(
        self,
        ids: Sequence[str],
        captions: Sequence[str],
        image: NDArray[np.int64],
        cluster: NDArray[np.int64],
        links: NDArray[np.int64],
        lonely: NDArray[np.float64],
    ) -> Scores:
        """Score N records, whose images lie in clusters.

        Args:
            ids, captions, image: of the records; see `caption_divergence`.
            cluster: int64 (M,), of each image.
            links: int64 (M,), how many others say that an image is a copy.
            lonely: float64 (N,), the score of a record whose image is alone.
        """
        size = np.bincount(cluster)[cluster][image]  # images in each record's cluster
        group = cluster[image]
        divergence = caption_divergence(captions, ids, image, group)
        mean = (np.bincount(group, divergence) / np.maximum(np.bincount(group), 1))[group]
        sure = np.bincount(cluster, links >= 2)[cluster]  # images in each cluster
        raised = (sure >= self.group)[image] & (mean >= DIVERGING)
        scores = np.where(size > 1, divergence * np.log2(size), lonely)
        return Scores(
            tuple(ids),
            torch.as_tensor(scores, dtype=torch.float32),
            notes={"raised_groups": len(np.unique(group[raised]))},
            raised=torch.as_tensor(raised),
            groups=torch.as_tensor(np.where((size > 1) & (mean > 0), group, -1)),
        )


def make_thumbnails(images: Tensor, side: int) -> Tensor:
    """Images (N, 3, H, W) in 0..255 -> unit (N, 3 side^2): area means less each channel's mean;
    flat: 0.
    """
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
        component = merge_clusters(component, i + start, j)
    return np.unique(component, return_inverse=True)[1], nearest


def merge_clusters(
    cluster: NDArray[np.int64], first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the clusters, int64 (M,), after those of each pair of rows became one."""
    edges = cluster[first], cluster[second]
    graph = coo_array((np.ones(len(first), bool), edges), shape=(len(cluster), len(cluster)))
    merged = connected_components(graph, directed=False)[1].astype(np.int64)
    united: NDArray[np.int64] = merged[cluster]
    return united


def count_links(
    links: NDArray[np.int64], first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Count how many others say that an image is a copy, without those that one alone says it of.

    One drawing may look like several others that are no copies of each other: of such a star
    nothing is left.

    Args:
        links: int64 (M,), to images of the same thumbnail.
        first, second: int64 (P,), rows of pairs that are copies.

    Returns:
        int64 (M,).
    """
    m = len(links)
    degree = links + np.bincount(first, minlength=m) + np.bincount(second, minlength=m)
    sure = degree >= 2
    by_first = np.bincount(second, sure[first], minlength=m)
    by_second = np.bincount(first, sure[second], minlength=m)
    return (links + by_first + by_second).astype(np.int64)


def find_candidates(
    vectors: Tensor,
    side: int,
    likeness: float,
    cluster: NDArray[np.int64],
    max_values: int = MAX_SIMILARITIES,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Find the pairs of images that may be copies of one picture.

    Args:
        vectors: Thumbnails, unit rows (M, 3 side^2).
        side: Of the thumbnails.
        likeness: Cosine, of one with the other or with its mirrored one, from which they may be.
        cluster: int64 (M,); no two of one cluster are returned.
        max_values: Similarities in memory at a time.

    Returns:
        Rows of the pairs, int64 (P,) each, of which the first is the smaller, and whether the one
        is more like the other's mirrored thumbnail, bool (P,). Of each image at most CANDIDATES,
        the nearest, are among them.
    """
    m = len(vectors)
    mirrored = vectors.view(m, 3, side, side).flip(3).flatten(1)
    clusters = torch.as_tensor(cluster, device=vectors.device)
    parts: list[NDArray[np.int64]] = []
    rows = max(1, max_values // m)
    for start in range(0, m, rows):
        block = vectors[start : start + rows]
        plain, turned = block @ vectors.T, block @ mirrored.T
        cosines = torch.maximum(plain, turned)
        cosines[clusters[start : start + rows, None] == clusters] = -1
        values, columns = cosines.topk(min(CANDIDATES, m), dim=1)
        i, k = (values >= likeness).nonzero().T
        j = columns[i, k]
        is_mirrored = (turned[i, j] > plain[i, j]).long()
        pairs = torch.stack((torch.minimum(i + start, j), torch.maximum(i + start, j), is_mirrored))
        parts.append(pairs.cpu().numpy())
    first, second, turned_pairs = np.unique(np.concatenate(parts, axis=1), axis=1)
    return first, second, turned_pairs.astype(bool)


def caption_divergence(
    captions: Sequence[str],
    ids: Sequence[str],
    image: NDArray[np.int64],
    cluster: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return how much the caption of each record differs from those of the other images of its
    cluster.

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
    """Return which words each caption holds: 0/1 (N, V)."""
    columns: dict[str, int] = {}
    pairs = [
        (row, columns.setdefault(word, len(columns)))
        for row, caption in enumerate(captions)
        for word in set(split_words(caption))
    ]
    i, j = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    shape = (len(captions), max(1, len(columns)))
    return csr_array((np.ones(len(pairs)), (i, j)), shape=shape)
