"""Ranking measures and their intervals, over numpy arrays. Imports no torch; scikit-learn and scipy only when called.

`scores` are float (N,), higher = more suspicious; `truth` is bool (N,), True = poison. Ties never help: a tie that
straddles a cut counts by its expectation over random orders, so no measure depends on the order of the records.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]
Interval = tuple[float, float]
AUROC_INTERVAL = "DeLong interval, at least Newcombe's"  # what `auroc_interval` is, in words


def auroc(scores: ArrayLike, truth: ArrayLike) -> float:
    """Chance that a poison scores above a clean record, ties counting one half."""
    from sklearn.metrics import roc_auc_score

    s, t = _checked(scores, truth)
    return float(roc_auc_score(t, s))


def average_precision(scores: ArrayLike, truth: ArrayLike) -> float:
    """Sum over the thresholds of (gain in recall) x (precision there); no interpolation."""
    from sklearn.metrics import average_precision_score

    s, t = _checked(scores, truth)
    return float(average_precision_score(t, s))


def fpr_at_tpr(scores: ArrayLike, truth: ArrayLike, tpr: float = 0.95) -> float:
    """Share of clean records at or above the highest threshold that catches at least a share `tpr` of the poisons."""
    positives, negatives = _table(*_checked(scores, truth))
    return float(_fpr_at_tpr(positives[None], negatives[None], tpr)[0])


def budget(share: float, n: int) -> int:
    """How many of n records a share of them is: rounded up, at least one."""
    return max(1, math.ceil(round(share * n, 9)))


def expected_hits(scores: ArrayLike, truth: ArrayLike, n: int) -> float:
    """Expected number of poisons among the worst n records when ties are broken at random."""
    s, t = np.asarray(scores, np.float64), np.asarray(truth, bool)
    if not 1 <= n <= len(s):
        raise ValueError(f"n must be in 1..{len(s)}; got {n}")
    cut = np.partition(s, len(s) - n)[len(s) - n]
    above, tied = s > cut, s == cut
    return float(t[above].sum() + t[tied].sum() * (n - above.sum()) / tied.sum())


def conformal_rank(n: int, rate: float) -> int | None:
    """k = ceil((n + 1)(1 - rate)): a value like these n exceeds their k-th smallest at most at this rate (Vovk et al. 2005).

    None where n < 1 / rate - 1: so few values support no such rate.
    """
    k = math.ceil(round((n + 1) * (1 - rate), 9))
    return k if k <= n else None


def wilson_interval(successes: float, n: int, level: float = 0.95) -> Interval:
    """Wilson's (1927) score interval of a proportion. (0, 1) when n = 0."""
    if n == 0:
        return 0.0, 1.0
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be in 0..{n}; got {successes}")
    z, p = _z(level), successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == n else min(1.0, centre + half)


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Student's t interval of the mean of at least two values; one value gives (-inf, inf)."""
    from scipy import stats

    v = np.asarray(values, np.float64)
    if v.size == 0:
        raise ValueError("the mean of no values has no interval")
    if v.size == 1:
        return -math.inf, math.inf
    half = float(stats.t.ppf((1 + level) / 2, v.size - 1) * v.std(ddof=1) / math.sqrt(v.size))
    return float(v.mean()) - half, float(v.mean()) + half


def discordance_interval(lost: int, won: int, n: int, level: float = 0.95) -> Interval:
    """Of (lost - won) / n, a difference of two shares of the same n trials: Student's t of the n differences of -1, 0 and 1,
    never narrower than Wilson's intervals of the two shares combined (MOVER; Newcombe 1998)."""
    a, b = lost / n, won / n
    (a_low, a_high), (b_low, b_high) = (
        wilson_interval(lost, n, level),
        wilson_interval(won, n, level),
    )
    low, high = (
        mean_interval(np.repeat([1.0, -1.0, 0.0], [lost, won, n - lost - won]), level)
        if n > 1
        else (-1.0, 1.0)
    )
    low = min(low, a - b - math.hypot(a - a_low, b_high - b))
    return max(-1.0, low), min(1.0, max(high, a - b + math.hypot(a_high - a, b - b_low)))


def auroc_interval(scores: ArrayLike, truth: ArrayLike, level: float = 0.95) -> Interval:
    """DeLong's (1988) variance on the logit scale, never narrower than Newcombe's (2006) method 5.

    DeLong's variance is estimated from the placements of each class: of one to ten poisons, which happen to stand alike, it
    is far too small (nominal 95 % covered 7 in 10 times with two of them), and of perfect scores it is zero.
    """
    s, t = _checked(scores, truth)
    value = auroc(s, t)
    low, high = _newcombe(value, int(t.sum()), int((~t).sum()), level)
    variance = delong_variance(s, t)
    if variance > 0 and 0 < value < 1:
        half = _z(level) * math.sqrt(variance) / (value * (1 - value))
        logit = math.log(value / (1 - value))
        low, high = min(low, _logistic(logit - half)), max(high, _logistic(logit + half))
    return low, high


def delong_variance(scores: ArrayLike, truth: ArrayLike) -> float:
    """Variance of the AUROC by its placement values, through midranks (DeLong 1988; Sun and Xu 2014)."""
    from scipy.stats import rankdata

    s, t = _checked(scores, truth)
    m, n = int(t.sum()), int((~t).sum())
    ranks = rankdata(s)
    of_positives = (ranks[t] - rankdata(s[t])) / n  # share of the clean records below each poison
    of_negatives = 1 - (ranks[~t] - rankdata(s[~t])) / m
    return float(_sample_variance(of_positives) / m + _sample_variance(of_negatives) / n)


def average_precision_interval(
    scores: ArrayLike, truth: ArrayLike, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> Interval:
    """The stratified bootstrap's percentiles (poisons and clean records resampled apart), never narrower than Wilson's
    interval of a share of the poisons: a few of them, resampled, are the same few."""
    s, t = _checked(scores, truth)
    low, high = bootstrap(_average_precision, s, t, level, draws, seed)
    poisons = int(t.sum())
    fixed = wilson_interval(min(average_precision(s, t), 1.0) * poisons, poisons, level)
    return min(low, fixed[0]), max(high, fixed[1])


def fpr_interval(
    scores: ArrayLike,
    truth: ArrayLike,
    tpr: float = 0.95,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Of `fpr_at_tpr`: the stratified bootstrap's percentiles, never narrower than Wilson's interval at a fixed cut."""
    s, t = _checked(scores, truth)
    low, high = bootstrap(lambda p, n: _fpr_at_tpr(p, n, tpr), s, t, level, draws, seed)
    clean = int((~t).sum())
    fixed = wilson_interval(round(fpr_at_tpr(s, t, tpr) * clean), clean, level)
    return min(low, fixed[0]), max(high, fixed[1])


def bootstrap(
    statistic: Callable[[Floats, Floats], Floats],
    scores: ArrayLike,
    truth: ArrayLike,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Stratified percentile bootstrap of a statistic of the two class counts per threshold.

    statistic: (positives (B, T), negatives (B, T)) -> (B,), thresholds from the highest down. Resampling records with
    replacement is one multinomial draw over the thresholds per class, so no record is ever copied.
    """
    positives, negatives = _table(*_checked(scores, truth))
    rng = np.random.default_rng(seed)
    rows = max(1, 4_000_000 // len(positives))
    values = []
    for start in range(0, draws, rows):
        size = min(rows, draws - start)
        p, n = (
            rng.multinomial(int(c.sum()), c / c.sum(), size).astype(np.float64)
            for c in (positives, negatives)
        )
        values.append(statistic(p, n))
    low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _checked(scores: ArrayLike, truth: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    s, t = np.asarray(scores, np.float64), np.asarray(truth)
    if s.ndim != 1 or s.shape != t.shape:
        raise ValueError(f"scores and truth must be (N,) alike; got {s.shape} and {t.shape}")
    if t.dtype != np.bool_:
        raise ValueError(f"truth must be bool; got {t.dtype}")
    if not np.isfinite(s).all():
        raise ValueError("scores must be finite")
    if not t.any() or t.all():
        raise ValueError(f"need poisons and clean records; got {int(t.sum())} poisons of {len(t)}")
    return s, t


def _table(scores: Floats, truth: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Poisons and clean records per distinct score, descending; neighbouring scores without poisons are one entry."""
    _, level = np.unique(-scores, return_inverse=True)
    positives, negatives = (
        np.bincount(level[m], minlength=int(level.max()) + 1) for m in (truth, ~truth)
    )
    held = positives > 0
    starts = np.flatnonzero(held | np.r_[True, held[:-1]])
    return np.add.reduceat(positives, starts).astype(np.float64), np.add.reduceat(
        negatives, starts
    ).astype(np.float64)


def _average_precision(positives: Floats, negatives: Floats) -> Floats:
    tp, fp = positives.cumsum(1), negatives.cumsum(1)
    return (positives * tp / np.maximum(tp + fp, 1)).sum(1) / tp[:, -1]


def _fpr_at_tpr(positives: Floats, negatives: Floats, tpr: float) -> Floats:
    tp, fp = positives.cumsum(1), negatives.cumsum(1)
    first = (tp >= tpr * tp[:, -1:] - 1e-9).argmax(1)
    return np.asarray(fp[np.arange(len(fp)), first] / fp[:, -1], np.float64)


def _newcombe(value: float, m: int, n: int, level: float) -> Interval:
    """Bounds b with |b - value| = z sqrt(V(b)), V the Hanley-McNeil variance with (m + n) / 2 for both sizes."""
    from scipy.optimize import brentq

    z, size = _z(level), (m + n) / 2

    def excess(b: float) -> float:
        variance = b * (1 - b) * (1 + (size - 1) * ((1 - b) / (2 - b) + b / (1 + b))) / (m * n)
        return (b - value) ** 2 - z * z * variance

    low = 0.0 if value <= 0 else float(brentq(excess, 0.0, _inside(value, -1)))
    high = 1.0 if value >= 1 else float(brentq(excess, _inside(value, 1), 1.0))
    return low, high


def _inside(value: float, side: int) -> float:
    return min(max(value + side * 1e-12, 1e-12), 1 - 1e-12)


def _sample_variance(values: Floats) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _z(level: float) -> float:
    from statistics import NormalDist

    if not 0 < level < 1:
        raise ValueError(f"level must be inside (0, 1); got {level}")
    return NormalDist().inv_cdf((1 + level) / 2)
