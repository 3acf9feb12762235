"""Ranking measures against plain loops, scikit-learn and closed forms; intervals by their
coverage.
"""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from bezoar.errors import UserError
from bezoar.evaluation import stats
from bezoar.evaluation.scores import Measure, Scores, average, detection_measures, proportion


def ranking(seed: int = 0, n: int = 300, poisons: int = 40, shift: float = 1.0, ties: bool = True):
    rng = np.random.default_rng(seed)
    truth = np.zeros(n, bool)
    truth[rng.choice(n, poisons, replace=False)] = True
    scores = rng.normal(size=n) + shift * truth
    return (scores.round(1) if ties else scores), truth


@pytest.mark.parametrize(
    "ends", [(0.5, 0.1, 0.9), (1.0, -math.inf, math.inf), (math.inf, 3.0, math.inf), (7, 7, 7)]
)
def test_a_measure_is_strict_json_and_comes_back(ends):
    value, low, high = ends
    m = Measure(value, 3, low, high, "how")
    assert Measure(**json.loads(json.dumps(m.json(), allow_nan=False))) == m


@pytest.mark.parametrize("ties", [True, False])
def test_auroc_counts_pairs(ties):
    scores, truth = ranking(ties=ties)
    wins = [(a > b) + 0.5 * (a == b) for a in scores[truth] for b in scores[~truth]]
    assert stats.auroc(scores, truth) == pytest.approx(np.mean(wins), abs=1e-12)


@pytest.mark.parametrize("ties", [True, False])
def test_average_precision_and_fpr_sweep_thresholds(ties):
    scores, truth = ranking(1, ties=ties)
    area, recall, fpr = 0.0, 0.0, None
    for cut in sorted(set(scores), reverse=True):
        flagged = scores >= cut
        now = truth[flagged].sum() / truth.sum()
        area += (now - recall) * truth[flagged].mean()
        recall = now
        if fpr is None and recall >= 0.95:
            fpr = (flagged & ~truth).sum() / (~truth).sum()
    assert stats.average_precision(scores, truth) == pytest.approx(area, abs=1e-12)
    assert stats.fpr_at_tpr(scores, truth) == fpr


def test_recall_and_precision_break_ties_at_random():
    scores, truth = ranking(2, n=60, poisons=9)
    rng = np.random.default_rng(0)
    orders = [np.lexsort((rng.random(60), -scores)) for _ in range(20_000)]
    for share in (0.001, 0.1, 0.5, 1.0):
        top = stats.budget(share, 60)
        expected = np.mean([truth[o[:top]].sum() / 9 for o in orders])
        assert stats.expected_hits(scores, truth, top) / 9 == pytest.approx(expected, abs=0.01)
    assert stats.expected_hits(scores, truth, 9) / 9 == pytest.approx(
        np.mean([truth[o[:9]].mean() for o in orders]), abs=0.01
    )
    assert (
        stats.budget(0.1, 60) == 6 and stats.budget(0.001, 60) == 1 and stats.budget(0.07, 100) == 7
    )


def test_measures_do_not_depend_on_order():
    scores, truth = ranking(3)
    order = np.random.default_rng(5).permutation(len(scores))
    for measure in (
        stats.auroc,
        stats.average_precision,
        stats.fpr_at_tpr,
        stats.auroc_interval,
        stats.average_precision_interval,
        stats.fpr_interval,
    ):
        assert measure(scores, truth) == pytest.approx(
            measure(scores[order], truth[order]), abs=1e-12
        )


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (199, 200), (1, 1)])
def test_wilson_is_scipys(successes, n):
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert stats.wilson_interval(successes, n) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_mean_interval_of_a_textbook_sample():
    low, high = stats.mean_interval(
        [1.0, 2.0, 3.0, 4.0, 5.0]
    )  # t(4, .975) = 2.776445, s = sqrt(2.5)
    assert (low, high) == pytest.approx(
        (3 - 2.776445 * math.sqrt(0.5), 3 + 2.776445 * math.sqrt(0.5)), abs=1e-5
    )
    assert stats.mean_interval([2.0]) == (-math.inf, math.inf)


def test_delong_variance_is_the_plain_one():
    scores, truth = ranking(4, n=80, poisons=20)
    wins = np.array([[(a > b) + 0.5 * (a == b) for b in scores[~truth]] for a in scores[truth]])
    plain = wins.mean(1).var(ddof=1) / 20 + wins.mean(0).var(ddof=1) / 60
    assert stats.delong_variance(scores, truth) == pytest.approx(plain, rel=1e-12)


def test_auroc_interval_covers():
    true = 0.7602  # normal scores, one standard deviation apart: Phi(1 / sqrt 2)
    inside = 0
    for seed in range(300):
        low, high = stats.auroc_interval(*ranking(seed, n=200, poisons=25, ties=False))
        inside += low <= true <= high
    assert 0.91 <= inside / 300 <= 0.99


def test_auroc_interval_of_perfect_scores_is_not_a_point():
    truth = np.arange(100) >= 90
    low, high = stats.auroc_interval(truth.astype(float), truth)
    assert 0.6 < low < 0.99 and high == 1
    assert stats.auroc_interval(-truth.astype(float), truth) == pytest.approx(
        (0, 1 - low), abs=1e-9
    )
    lows = [
        stats.auroc_interval((np.arange(m) >= m // 2).astype(float), np.arange(m) >= m // 2)[0]
        for m in (20, 200)
    ]
    assert lows[0] < lows[1]


@pytest.mark.parametrize("name", ["average_precision", "fpr"])
def test_bootstrap_is_the_plain_one(name):
    scores, truth = ranking(6, n=200, poisons=30)
    measure = {"average_precision": stats.average_precision, "fpr": stats.fpr_at_tpr}[name]
    interval = {"average_precision": stats.average_precision_interval, "fpr": stats.fpr_interval}[
        name
    ]
    rng, pos, neg = np.random.default_rng(1), np.flatnonzero(truth), np.flatnonzero(~truth)
    values = []
    for _ in range(1500):
        rows = np.r_[rng.choice(pos, len(pos)), rng.choice(neg, len(neg))]
        values.append(measure(scores[rows], truth[rows]))
    low, high = np.quantile(values, [0.025, 0.975])
    if name == "average_precision":
        least = stats.wilson_interval(measure(scores, truth) * 30, 30)
        low, high = min(low, least[0]), max(high, least[1])
    assert interval(scores, truth) == pytest.approx((low, high), abs=0.03)
    assert interval(scores, truth) == interval(scores, truth)


@pytest.mark.parametrize("poisons", [1, 2, 5, 199])
def test_intervals_cover_with_a_handful_of_poisons(poisons):
    drawn = [ranking(seed, 200, poisons, ties=False) for seed in range(150)]
    intervals = [stats.auroc_interval(*one) for one in drawn]
    assert np.mean([low <= 0.7602 <= high for low, high in intervals]) >= 0.9
    mean = np.mean(
        [stats.average_precision(*ranking(seed, 200, poisons, ties=False)) for seed in range(600)]
    )
    intervals = [stats.average_precision_interval(*one, draws=100) for one in drawn[:60]]
    assert np.mean([low <= mean <= high for low, high in intervals]) >= 0.9


def test_differences_of_shares_of_the_same_trials():
    assert stats.discordance_interval(0, 0, 200) == pytest.approx(
        (-stats.wilson_interval(0, 200)[1], stats.wilson_interval(0, 200)[1])
    )
    low, high = stats.discordance_interval(30, 10, 200)
    v = np.r_[np.ones(30), -np.ones(10), np.zeros(160)]
    assert (
        low <= stats.mean_interval(v)[0] and high >= stats.mean_interval(v)[1] and high - low < 0.15
    )
    assert stats.discordance_interval(10, 30, 200) == pytest.approx((-high, -low))
    assert stats.discordance_interval(1, 0, 1) == (-1.0, 1.0)
    rng = np.random.default_rng(0)
    for lost, won in ((0.002, 0.0), (0.05, 0.01), (0.2, 0.2)):
        counts = rng.multinomial(300, [lost, won, 1 - lost - won], 1000)
        intervals = [stats.discordance_interval(int(a), int(b), 300) for a, b, _ in counts]
        assert np.mean([low <= lost - won <= high for low, high in intervals]) >= 0.94


@pytest.mark.parametrize("ids", ["a test image+poison{}", "z{}"])
def test_a_detector_that_says_nothing_finds_nothing_by_the_names_of_the_records(ids):
    names = [f"m{i}" for i in range(2000)] + [ids.format(i) for i in range(100)]
    scores = Scores(tuple(names), torch.zeros(2100))
    order = scores.ranking()
    assert sorted(order.tolist()) == list(range(2100))
    assert (order[:210] >= 2000).sum() < 25  # 10 by chance
    turned = np.random.default_rng(0).permutation(2100)
    again = Scores(tuple(names[i] for i in turned), torch.zeros(2100)).ranking()
    assert [names[turned[i]] for i in again] == [names[i] for i in order]


def test_a_ranking_is_a_plain_sort_with_drawn_ties(monkeypatch):
    from bezoar.data.randomness import draws
    from bezoar.evaluation import scores as module

    monkeypatch.setattr(module, "DRAWN", 7)
    values = np.random.default_rng(0).integers(-3, 4, 60).astype(np.float32)
    ids = tuple(f"r{i}" for i in range(60))
    drawn = draws(0, ids, 1, "ties")[:, 0]
    plain = sorted(range(60), key=lambda i: (-values[i], drawn[i]))
    assert Scores(ids, torch.from_numpy(values)).ranking().tolist() == plain
    assert Scores((), torch.zeros(0)).ranking().tolist() == []


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="need poisons and clean"):
        stats.auroc([1.0, 2.0], [False, False])
    with pytest.raises(ValueError, match="bool"):
        stats.auroc([1.0, 2.0], [0, 1])
    with pytest.raises(ValueError, match="finite"):
        stats.auroc([1.0, math.nan], [False, True])
    with pytest.raises(ValueError, match="alike"):
        stats.auroc([1.0], [False, True])


def test_detection_names_and_intervals():
    values, truth = ranking(7, n=2000, poisons=50)
    scores = Scores(tuple(map(str, range(2000))), torch.tensor(values, dtype=torch.float32))
    measures = detection_measures(scores, truth)
    assert list(measures) == [
        "auroc",
        "average_precision",
        "fpr_at_95_tpr",
        "recall_at_0.001",
        "recall_at_0.01",
        "recall_at_0.1",
        "recall_at_1.5n",
        "precision_at_n",
    ]
    for name, m in measures.items():
        assert 0 <= m.low <= m.value <= m.high <= 1, name
        assert m.low < m.high and m.n in (50, 1950, 2000) and m.how
    assert measures == detection_measures(scores, torch.tensor(truth))
    assert (
        measures["recall_at_1.5n"].value
        == stats.expected_hits(values.astype(np.float32), truth, 75) / 50
    )
    with pytest.raises(UserError, match="there are 0 of 2000"):
        detection_measures(scores, np.zeros(2000, bool))


def test_measures_of_shares_and_means():
    m = proportion(3, 10, "hits")
    assert (m.value, m.n, (m.low, m.high), m.how) == (0.3, 10, stats.wilson_interval(3, 10), "hits")
    m = average(torch.tensor([1.0, 2.0, 3.0]), "z")
    assert (m.value, m.n, (m.low, m.high)) == (2.0, 3, stats.mean_interval([1.0, 2.0, 3.0]))
    same = average([1.0, 1.0], "rank")  # two that agree do not show how far they vary
    assert (same.value, same.low, same.high) == (1.0, -math.inf, math.inf) and average(
        [2.0] * 5, "rank"
    ).low == 2
    with pytest.raises(UserError, match="at least one"):
        proportion(0, 0, "hits")
