"""Similar records of a scan: nearest neighbours, and groups by vectors and captions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from bezoar.data.strings import Strings
from bezoar.encoders.encoder import EmbeddedRecords, split_words
from bezoar.evaluation.neighbors import nearest_neighbors

NEIGHBOURS = 3
SAMPLE = 5000  # captions that the shares of words are computed from
COMMON = 0.2  # a word in a larger share of captions says nothing about a record
MAX_DISTANCE = 0.55  # mean distance, 0..1, from which on groups are no longer joined


def find_nearest(
    embedded: EmbeddedRecords, rows: Sequence[int], count: int = NEIGHBOURS
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find the records most like some of them, these themselves left out.

    Args:
        embedded: All records, N unit vectors.
        rows: M of these records.
        count: Neighbours of each.

    Returns:
        Rows and cosines of the neighbours, (M, K) each with K = min(count, N - 1), nearest first.
    """
    vectors, queries = embedded.images, torch.as_tensor(rows)
    count = min(count, len(vectors) - 1)
    if not len(rows) or count < 1:
        return np.empty((len(rows), 0), np.int64), np.empty((len(rows), 0), np.float32)
    near = nearest_neighbors(vectors[queries].float(), vectors, count, exclude_self=queries)
    cosines = 1 - near.distance.square() / 2  # of unit vectors
    return near.index.numpy(), cosines.clamp(-1, 1).numpy()


@dataclass(frozen=True)
class Group:
    """Rows of the grouped list, and the words that at least half of their captions share."""

    members: list[int]
    words: list[str]


def group_records(
    vectors: Tensor, captions: Sequence[str], shares: Mapping[str, float], least: int = 3
) -> list[Group]:
    """Group records that are alike by average linkage.

    The distance of two records is the mean of (1 - cosine) / 2, of vectors minus their mean, and of
    1 - the share of their captions' words that both have; a word weighs -log of its share of all
    captions.

    Args:
        vectors: Unit rows (M, D).
        captions: M captions.
        shares: For each word the share of all captions that hold it; see `word_shares`.
        least: The smallest group that is returned.

    Returns:
        The groups, largest first.
    """
    if len(vectors) < least:
        return []
    centred = torch.nn.functional.normalize(vectors.float() - vectors.float().mean(0), dim=1)
    distance = (1 - (centred @ centred.T).double().numpy()) / 2  # (M, M)
    limit = MAX_DISTANCE / 2
    rare_words = [{w for w in split_words(c) if shares.get(w, 0) < COMMON} for c in captions]
    if any(rare_words):
        distance = (distance + _word_distance(rare_words, shares)) / 2
        limit = MAX_DISTANCE
    np.fill_diagonal(distance, 0)
    condensed = squareform(np.clip((distance + distance.T) / 2, 0, 1), checks=False)
    labels = fcluster(linkage(condensed, "average"), limit, "distance")
    groups = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label).tolist()
        if len(members) >= least:
            groups.append(Group(members, _common_words([rare_words[i] for i in members])))
    return sorted(groups, key=lambda g: (-len(g.members), g.members))


def _common_words(word_sets: Sequence[set[str]], most: int = 6) -> list[str]:
    """Return the words that at least half of the sets hold, the commonest first."""
    counts = Counter(w for words in word_sets for w in words)
    ranked = sorted(counts, key=lambda w: (-counts[w], w))
    return [w for w in ranked[:most] if 2 * counts[w] >= len(word_sets)]


def _word_distance(
    word_sets: Sequence[set[str]], shares: Mapping[str, float]
) -> NDArray[np.float64]:
    """Return 1 - the weighted share of words that two captions have in common, (M, M)."""
    vocabulary = sorted(set().union(*word_sets))
    column_of = {w: i for i, w in enumerate(vocabulary)}
    holds = np.zeros((len(word_sets), len(vocabulary)))
    for row, words in enumerate(word_sets):
        holds[row, [column_of[w] for w in words]] = 1
    weights = -np.log([max(shares.get(w, 0), 1 / SAMPLE) for w in vocabulary])
    both = holds @ (weights[:, None] * holds.T)
    total = holds @ weights
    either = total[:, None] + total - both
    return np.asarray(1 - both / np.maximum(either, 1e-9))


def word_shares(captions: Strings) -> dict[str, float]:
    """Return for each word the share of captions that hold it, by an evenly spread sample."""
    if not len(captions):
        return {}
    spread = np.linspace(0, len(captions) - 1, min(SAMPLE, len(captions)))
    rows = np.unique(spread.astype(np.int64))
    counts = Counter(w for c in captions.take(rows) for w in set(split_words(c)))
    return {w: n / len(rows) for w, n in counts.items()}
