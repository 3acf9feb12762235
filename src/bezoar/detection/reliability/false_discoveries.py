"""Discovery: of the worst n records of a ranking without known truth, how many are expected to be ordinary ones?

With a sample of records that are known to be clean, drawn from the same source, the answer needs no model: what share of it
scores as high (`by_reference`, Clopper-Pearson). Without one it is an extrapolation (`by_tail`), in the manner of Efron's
empirical null (2004) by Lindsey's method, a Poisson regression of the log density, but of the upper shoulder alone: between
quantiles that lie below any likely share of poisons, the density is that of ordinary records. Beyond it their tail is taken
to fall at least as fast as an exponential one (a log-concave density does). That gives the upper end; a log density of the
second or third degree, whichever leaves fewest, gives the lower one. The range is that of the models and of chance together.

What neither can know: a group of odd but harmless records (wrong captions, a rare subject) stands out of the bulk as poisons
do. By the tail it counts as not ordinary; only a reference that holds its like, or a look, tells it from poisons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bezoar.evaluation.scores import Measure, Scores

Floats = NDArray[np.float64]
SHARES = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05)  # of the records, that are reported
WINDOWS = ((0.5, 0.9), (0.6, 0.92), (0.7, 0.95))  # quantiles between which the shoulder is fitted
NARROW = (
    0.82,
    0.95,
)  # where none of these is smooth, as of a cascade that looks closer at the worst fifth
WIDE = (0.1, 0.92)  # where the third degree is fitted
LEAST = 1000  # records, and a twentieth of them in a window
BINS, DRAWS = 30, 60
MISFIT = (
    0.01  # mean squared relative error of a fit beyond chance, from which its window is not used
)
HEAVY = 3.0  # standard errors by which the log density may bend upwards, no further: else its tail is heavier than exponential
TIED = (
    0.02  # share of all records with one score above the median, from which scores are too coarse
)
ASSUMPTION = (
    "Assumes that beyond the bulk the ordinary records' tail falls at least exponentially, and that fewer than 5 % of all "
    "records are poisons. Odd but harmless records are not counted as ordinary."
)
REFERENCED = "Assumes that the reference is a random sample of records like the clean ones here."


@dataclass(frozen=True)
class Expected:
    """Of the worst n[i] records, counts[i] are expected to be ordinary, or clean where there is a reference.

    how: "tail" or "reference". why: when nothing can be said, the reason; n and counts are empty then. mute: detectors, each
    with the reason, by which nothing can be said; what they find worst counts as ordinary.
    """

    how: str
    n: tuple[int, ...] = ()
    counts: tuple[Measure, ...] = ()
    why: str = ""
    mute: tuple[str, ...] = ()

    @property
    def assumption(self) -> str:
        """On what it rests, in a sentence or three."""
        if self.how == "reference":
            return REFERENCED
        parts = [m.partition(": ") for m in self.mute]
        return ASSUMPTION + "".join(
            f" What {name} finds worst counts as ordinary: {why}." for name, _, why in parts
        )


def depths(total: int, more: Sequence[int] = ()) -> tuple[int, ...]:
    """The n that are reported for so many records, ascending."""
    return tuple(
        sorted(
            {max(1, round(share * total)) for share in SHARES}
            | {n for n in more if 0 < n <= 0.05 * total}
        )
    )


def expected(merged: Scores, detectors: Mapping[str, Scores], more: Sequence[int] = ()) -> Expected:
    """Without a reference. Several detectors merged: each record counts for the one that finds it worst.

    A record of the worst n that ranks r-th by its own detector is one of that detector's worst r, of which so and so many
    are ordinary; the sum over the detectors is the answer. A merged score itself may hold nothing but ranks. Where a
    detector's own tail allows no answer, between none and all of what it finds worst are ordinary.
    """
    from scipy.stats import rankdata

    ns = depths(len(merged), more)
    parts = list(detectors.values()) or [merged]
    if len(parts) == 1:
        return by_tail(merged.values.double().cpu().numpy(), ns)
    order = merged.ranking()
    rank = np.empty((len(parts), len(merged)), np.int64)
    for row, scores in zip(rank, parts, strict=True):
        row[:] = rankdata(-scores.values_of(merged.ids).cpu().numpy(), method="max")
    best = rank.argmin(0)
    total, mute, heard = np.zeros((len(ns), 3)), [], False
    for d, scores in enumerate(parts):
        mine = [order[:n][best[order[:n]] == d] for n in ns]
        deep = tuple(int(rank[d, rows].max()) if len(rows) else 0 for rows in mine)
        at = tuple(r for r in sorted(set(deep)) if r)
        if not at:
            continue
        found = by_tail(scores.values_of(merged.ids).double().cpu().numpy(), at)
        if found.why:
            mute.append(f"{list(detectors)[d]}: {found.why}")
            total += [(len(rows), 0, len(rows)) for rows in mine]
            continue
        heard, known = True, dict(zip(found.n, found.counts, strict=True))
        for i, (rows, r) in enumerate(zip(mine, deep, strict=True)):
            if r:
                m, gap = known[r], r - len(rows)
                total[i] += min(m.value, len(rows)), max(0.0, m.low - gap), min(m.high, len(rows))
    if mute and not heard:
        return Expected("tail", why="; ".join(mute))
    counts = tuple(_count(v, low, high, n) for (v, low, high), n in zip(total, ns, strict=True))
    return Expected("tail", ns, counts, mute=tuple(mute))


def by_reference(
    values: Floats, known: NDArray[np.bool_], ns: Sequence[int], level: float = 0.95
) -> Expected:
    """values: float (N,), higher = worse. known: bool (N,), a random sample of clean records among them.

    Of the worst n of the others, at most (others) x (share of clean records as bad), taking every record for clean that is
    not known to be anything: an upper bound, as a false-discovery rate by conformal p-values is.
    """
    from scipy.stats import beta

    reference, rest = np.sort(values[known]), values[~known]
    m, total = len(reference), len(rest)
    if m < 20:
        return Expected(
            "reference",
            why=f"{m} records of the reference are among those scanned; at least 20 are needed",
        )
    cuts = np.sort(rest)[::-1][np.asarray(ns, np.int64) - 1]
    above = m - np.searchsorted(reference, cuts, "left")
    low = np.where(above > 0, beta.ppf((1 - level) / 2, np.maximum(above, 1), m - above + 1), 0.0)
    high = np.where(above < m, beta.ppf((1 + level) / 2, above + 1, np.maximum(m - above, 1)), 1.0)
    point = (above + 1) / (m + 1)
    counts = tuple(
        _count(p * total, lo * total, hi * total, n)
        for p, lo, hi, n in zip(point, low, high, ns, strict=True)
    )
    return Expected("reference", tuple(ns), counts)


def by_tail(values: Floats, ns: Sequence[int]) -> Expected:
    """values: float (N,), higher = worse. Says why when the scores do not allow an answer."""
    if why := unfit(values):
        return Expected("tail", why=why)
    cuts = np.sort(values)[::-1][np.asarray(ns, np.int64) - 1]
    points: list[Floats] = []
    lows: list[Floats] = []
    highs: list[Floats] = []
    heavy = False
    for window in (*WINDOWS, NARROW):
        shoulder = Shoulder.of(values, window)
        if shoulder is None or shoulder.misfit > MISFIT or (window == NARROW and points):
            continue
        heavy = heavy or shoulder.bend > HEAVY
        at = (cuts - shoulder.start) / shoulder.width
        steep = shoulder.beyond(2, at)
        points.append(steep[0])
        lows.append(_quantile(steep[1:], 0.025))
        highs.append(_quantile(shoulder.beyond(1, at)[1:], 0.975))
    if heavy:
        return Expected(
            "tail",
            why="the bulk's tail is heavier than exponential: it cannot be told from what stands out",
        )
    if not points:
        return Expected("tail", why="the scores above the median are not spread smoothly")
    wide = Shoulder.of(values, WIDE)
    if wide is not None and wide.misfit <= MISFIT:
        lows.append(_quantile(wide.beyond(3, (cuts - wide.start) / wide.width)[1:], 0.025))
    point, low, high = np.median(points, 0), np.min(lows, 0), np.max(highs, 0)
    # beside what is expected, chance decides how many there are
    low, high = low - 2 * np.sqrt(low), high + 2 * np.sqrt(high)
    return Expected(
        "tail", tuple(ns), tuple(_count(*row) for row in zip(point, low, high, ns, strict=True))
    )


def unfit(values: Floats) -> str:
    """Why no tail can be fitted to these scores, or nothing."""
    if len(values) < LEAST:
        return f"{len(values)} records; a tail needs {LEAST}"
    upper = values[values >= np.median(values)]
    most = np.unique(upper, return_counts=True)[1].max()
    if most > TIED * len(values):
        return f"{most} of {len(values)} records have one and the same score"
    return ""


@dataclass(frozen=True)
class Shoulder:
    """Counts of scores between two quantiles, in bins over 0..1, and of resampled ones: (1 + DRAWS, BINS)."""

    start: float
    width: float
    counts: Floats

    @staticmethod
    def of(values: Floats, window: tuple[float, float]) -> Shoulder | None:
        """None where there is too little in it."""
        start, end = np.quantile(values, window)
        inside = values[(values >= start) & (values <= end)]
        if end <= start or len(inside) < LEAST // 20:
            return None
        counts = np.histogram((inside - start) / (end - start), BINS, (0, 1))[0].astype(np.float64)
        drawn = np.random.default_rng(0).multinomial(
            int(counts.sum()), counts / counts.sum(), DRAWS
        )
        return Shoulder(float(start), float(end - start), np.concatenate([counts[None], drawn]))

    @property
    def middles(self) -> Floats:
        """Of the bins."""
        return (np.arange(BINS) + 0.5) / BINS

    @property
    def misfit(self) -> float:
        """Mean squared relative error of the second degree's fit, less what chance explains."""
        mean = np.exp(powers(self.middles, 2) @ fitted(self.counts[:1], self.middles, 2)[0][0])
        c = self.counts[0]
        deviance = 2 * float(
            (np.where(c > 0, c * np.log(np.maximum(c, 1) / mean), 0) - (c - mean)).sum()
        )
        freedom = BINS - 3
        return max(0.0, deviance - freedom - 3 * math.sqrt(2 * freedom)) / float(c.sum())

    @property
    def bend(self) -> float:
        """Second degree of the log density over its standard error; above 0 it bends upwards."""
        beta, variance = fitted(self.counts[:1], self.middles, 2)
        return float(beta[0, 2] / math.sqrt(variance[0, 2, 2]))

    def beyond(self, degree: int, at: Floats) -> Floats:
        """Records expected beyond each place `at` (T,) by a log density of that degree: (1 + DRAWS, T).

        Of the first degree, the upper half of the window alone is fitted: the tangent there. inf where it does not fall.
        """
        part = slice(BINS // 2, None) if degree == 1 else slice(None)
        beta = fitted(self.counts[:, part], self.middles[part], degree)[0]
        end = max(2.0, float(at.max()) + 1e-9)
        grid = np.linspace(min(0.0, float(at.min())), end, 400)
        density = np.exp(np.minimum(beta @ powers(grid, degree).T, 50)) * BINS
        slope = beta[:, 1:] @ (np.arange(1, degree + 1) * (grid[-1] - 0.5) ** np.arange(degree))
        rest = np.where(slope < 0, density[:, -1] / np.maximum(-slope, 1e-12), np.inf)
        steps = (density[:, 1:] + density[:, :-1]) / 2 * np.diff(grid)
        mass = (
            np.concatenate([np.cumsum(steps[:, ::-1], 1)[:, ::-1], np.zeros((len(beta), 1))], 1)
            + rest[:, None]
        )
        return np.stack([np.interp(at, grid, row) for row in mass])


def powers(x: Floats, degree: int) -> Floats:
    """(K,) -> (K, degree + 1), about the window's middle."""
    return (x[:, None] - 0.5) ** np.arange(degree + 1)


def fitted(counts: Floats, x: Floats, degree: int, rounds: int = 15) -> tuple[Floats, Floats]:
    """Poisson regression of counts (B, K) on powers of x (K,): coefficients (B, degree + 1) and their covariances."""
    design = powers(x, degree)
    beta = np.zeros((len(counts), degree + 1))
    beta[:, 0] = np.log(counts.mean(1))
    for _ in range(rounds):
        mean = np.exp(np.clip(beta @ design.T, -30, 30))
        information = np.einsum("bk,ki,kj->bij", mean, design, design) + 1e-9 * np.eye(degree + 1)
        beta = beta + np.linalg.solve(information, ((counts - mean) @ design)[..., None])[..., 0]
    return beta, np.linalg.inv(information)


def _quantile(values: Floats, share: float) -> Floats:
    """(B, T) -> (T,), one of the values, which may be inf."""
    return np.sort(values, 0)[min(len(values) - 1, max(0, round(share * (len(values) - 1))))]


def _count(value: float, low: float, high: float, n: int) -> Measure:
    """An expected number of the worst n."""
    value, low, high = (float(min(n, max(0.0, v))) for v in (value, low, high))
    return Measure(
        min(max(value, low), high),
        n,
        low,
        high,
        f"of the worst {n} records, how many are expected to be ordinary",
    )
