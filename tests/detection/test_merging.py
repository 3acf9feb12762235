"""Merging of detectors, and what each contributes, against plain versions."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from bezoar.detection import merging
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores


def scored(values, ids=None) -> Scores:
    return Scores(
        ids or tuple(f"r{i:03d}" for i in range(len(values))),
        torch.as_tensor(np.asarray(values), dtype=torch.float32),
    )


def plain_surprise(values) -> list[float]:
    middle = float(np.median(values))
    spread = 1.4826 * float(np.median([abs(v - middle) for v in values]))
    shares = [sum(other >= v for other in values) / len(values) for v in values]
    return [
        -math.log10(p) * min(max((v - middle) / spread, 0), 20)
        for p, v in zip(shares, values, strict=True)
    ]


def test_surprise_is_the_plain_one_and_gives_ties_the_larger_share():
    values = np.random.default_rng(0).normal(size=40)
    values[:3] = 4.0, 4.0, 50.0
    assert merging.surprise(values) == pytest.approx(plain_surprise(values))
    surprises = merging.surprise(np.array([0.0] * 8 + [1.0, 2.0]))
    assert not surprises[:8].any() and 0 < surprises[8] < surprises[9]
    assert not merging.surprise(np.ones(5)).any()


def test_merge_is_the_plain_one():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 50))
    values[1] += values[0]
    correlation = np.corrcoef(values.argsort(1).argsort(1))
    expected = np.zeros(50)
    for i in range(3):
        expected += np.array(plain_surprise(values[i])) / sum(max(c, 0) for c in correlation[i])
    merged = merging.merge([scored(v) for v in values])
    assert merged.values.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_merge_has_no_order_and_gives_copies_one_vote():
    rng = np.random.default_rng(1)
    a, b = (scored(v) for v in rng.normal(size=(2, 80)))
    turned = rng.permutation(80)
    shuffled = Scores(tuple(b.ids[i] for i in turned), b.values[turned])
    assert torch.allclose(merging.merge([a, shuffled]).values, merging.merge([a, b]).values)
    assert merging.merge([a]) is a
    independent = scored(np.where(np.arange(80) % 2, 1.0, 0.0))
    once, twice = merging.merge([a, independent]).values, merging.merge([a, a, independent]).values
    assert torch.allclose(once, twice, atol=0.05)
    silent = scored(np.zeros(80))
    assert merging.merge([a, silent]).ranking()[:39].tolist() == a.ranking()[:39].tolist()
    with pytest.raises(UserError, match="different records"):
        merging.merge([a, scored(np.zeros(9))])
    with pytest.raises(UserError, match="different records"):
        merging.merge([a, scored(np.zeros(80), tuple(f"q{i}" for i in range(80)))])


def test_what_a_detector_decided_comes_before_all_that_is_only_ranked():
    rng = np.random.default_rng(3)
    many, odd = rng.normal(size=(2, 400))
    poisons = np.arange(400) < 80
    many[poisons] += 6  # a fifth of all: not rare
    odd[390:] = 40.0
    a, b = scored(many), scored(odd)
    assert not poisons[merging.merge([a, b]).ranking()[:10]].any()
    sure = Scores(a.ids, a.values, raised=torch.from_numpy(poisons))
    merged = merging.merge([sure, b])
    assert set(merged.ranking()[:80].tolist()) == set(range(80))
    turned = tuple(reversed(range(400)))
    other = sure.select([a.ids[i] for i in turned])
    assert other.raised[-80:].all() and other.raised.sum() == 80
    assert np.array_equal(merging.merge([other, b]).select(a.ids).values, merged.values)
    assert (
        merging.measure_contributions({"sure": sure, "odd": b}, 80)["odd"].unique
        == 0
        < merging.measure_contributions({"odd": b, "a": a}, 80)["odd"].unique
    )
    none = Scores(a.ids, a.values, raised=torch.zeros(400, dtype=torch.bool))
    assert np.array_equal(merging.merge([none, b]).values, merging.merge([a, b]).values)
    with pytest.raises(ValueError, match="raised must be bool"):
        Scores(a.ids, a.values, raised=torch.zeros(400))


def test_the_rest_is_ranked_among_the_rest():
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=(2, 60))
    raised = np.arange(60) < 20
    first[raised] += 9
    surprises = merging.surprise(first, raised)
    assert surprises[20:] == pytest.approx(plain_surprise(first[20:]))
    assert merging.surprise(first, ~np.zeros(60, bool)) == pytest.approx(merging.surprise(first))
    sure = Scores(
        scored(first).ids, torch.from_numpy(first).float(), raised=torch.from_numpy(raised)
    )
    correlation = max(spearmanr(first, second).statistic, 0)
    expected = merging.RAISING_WEIGHT * np.array(plain_surprise(first[20:])) / (1 + correlation)
    expected += merging.surprise(second, raised)[20:] / (1 + correlation)
    merged = merging.merge([sure, scored(second)]).values.numpy()
    assert merged[20:] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert merged[:20].min() > merged[20:].max()


def test_a_record_that_was_just_not_raised_comes_before_what_is_odd_elsewhere():
    """Twenty poisons of a hundred are not raised, and another detector is loud."""
    rng = np.random.default_rng(5)
    near, loud = rng.normal(size=2000), rng.standard_t(2, size=2000)
    near[:100] += 8
    raised = torch.arange(2000) < 80
    sure = Scores(scored(near).ids, torch.from_numpy(near).float(), raised=raised)
    worst = merging.merge([sure, scored(loud)]).ranking()[:150]
    assert set(range(100)) <= set(worst.tolist())


def test_adds_says_what_is_lost_without_each_detector():
    rng = np.random.default_rng(2)
    first, second, third = rng.normal(size=(3, 200))
    first[:8], second[8:14] = 9, 9
    scores = {"first": scored(first), "second": scored(second), "third": scored(third)}
    contributions = merging.measure_contributions(scores, 20)

    def top(names) -> set:
        return set(merging.merge([scores[n] for n in names]).ranking()[:20].tolist())

    for name in scores:
        rest = [n for n in scores if n != name]
        assert contributions[name].unique == len(top(scores) - top(rest))
        assert contributions[name].in_worst == len(
            top(scores) & set(scores[name].ranking()[:20].tolist())
        )
        assert set(contributions[name].correlation) == set(rest)
    for a, b in combinations(scores, 2):
        assert contributions[a].correlation[b] == pytest.approx(
            spearmanr(scores[a].values, scores[b].values).statistic
        )
        assert contributions[b].correlation[a] == contributions[a].correlation[b]
    alone = merging.measure_contributions({"first": scores["first"]}, 5)["first"]
    assert (alone.unique, alone.in_worst, alone.correlation) == (5, 5, {})
