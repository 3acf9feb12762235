"""Groups of similar records."""

import torch

from bezoar.reports.similar_records import group_records


def test_words_of_a_group_come_by_count_and_then_by_alphabet() -> None:
    captions = ["red star zebra", "star zebra apple", "apple zebra star", "moon"]
    vectors = torch.eye(4)[[0, 0, 0, 1]]
    (group,) = group_records(vectors, captions, {})
    assert group.members == [0, 1, 2] and group.words == ["star", "zebra", "apple"]
