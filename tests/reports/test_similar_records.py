"""Nearest neighbours and groups of similar records."""

import numpy as np
import torch

from bezoar.data.strings import Strings
from bezoar.encoders.encoder import EmbeddedRecords
from bezoar.reports.similar_records import find_nearest, group_records, word_shares

VECTORS = torch.nn.functional.normalize(
    torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), dim=1
)


def embedded(count: int) -> EmbeddedRecords:
    return EmbeddedRecords(tuple(map(str, range(count))), VECTORS[:count], None)


def test_nearest_records_are_those_of_the_plain_product() -> None:
    neighbours, cosines = find_nearest(embedded(50), [3, 49], 4)
    product = VECTORS @ VECTORS.T
    product.fill_diagonal_(-2)
    nearest = product[[3, 49]].topk(4)
    assert np.array_equal(neighbours, nearest.indices)
    assert np.allclose(cosines, nearest.values, atol=1e-6)


def test_there_are_never_more_neighbours_than_other_records() -> None:
    assert find_nearest(embedded(3), [0], 9)[0].shape == (1, 2)
    assert find_nearest(embedded(1), [0])[0].shape == (1, 0)
    assert find_nearest(embedded(3), [])[0].size == 0


def test_records_are_grouped_by_vectors_and_rare_words() -> None:
    captions = ["a red striped star"] * 4 + ["some blue ring"] * 3 + [f"thing{i}" for i in range(5)]
    z = VECTORS
    vectors = torch.cat([z[:1] + 0.1 * z[1:5], z[5:6] + 0.1 * z[6:9], z[20:25]])
    shares = word_shares(Strings.from_texts(["a dog", "a cat", "the star", "a tree", "a sea"]))
    assert shares["a"] == 0.8 and shares["star"] == 0.2
    groups = group_records(vectors, captions, shares)
    assert [g.members for g in groups] == [[0, 1, 2, 3], [4, 5, 6]]
    assert set(groups[1].words) == {"some", "blue", "ring"} and "a" not in groups[0].words
    assert group_records(vectors[:2], captions[:2], shares) == []
    assert word_shares(Strings.from_texts([])) == {}


def test_words_of_a_group_come_by_count_and_then_by_alphabet() -> None:
    captions = ["red star zebra", "star zebra apple", "apple zebra star", "moon"]
    (group,) = group_records(torch.eye(4)[[0, 0, 0, 1]], captions, {})
    assert group.members == [0, 1, 2] and group.words == ["star", "zebra", "apple"]
