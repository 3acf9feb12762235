"""How success grows with the dose, and whether two groups of readings differ: laws, contrasts, what could be detected.

A reading: one trigger, or one group of victims, in one training. Intervals are about other readings, not only test images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from bezoar.errors import UserError
from bezoar.evaluation import stats
from bezoar.evaluation.scores import Measure, encode_nonfinite
from bezoar.evaluation.stats import Floats

RAYS = 360  # directions in which the edge of a law's 95 % region is sought
FAR = 2.0**40  # standard errors at which a direction counts as open
FLAT, STEP = (
    1e-6,
    1e6,
)  # a rise over all doses, in logits, that counts as none; a slope that counts as a step
ClaimVerdict = Literal["confirmed", "contradicted", "undecided"]


def pool_readings(measures: Sequence[Measure], how: str, rate: bool = True) -> Measure:
    """One point of a curve from several readings, each with the same weight. rate: a share of trials, inside 0..1.

    Student's t over readings; for rates on neither side short of Wilson's interval over all trials, because readings
    that all reach 1.000 do not show how far they vary. One reading keeps the interval that it has.
    """
    if not measures:
        raise UserError(f"{how}: a mean over readings needs at least one")
    if len(measures) == 1:
        return dataclasses.replace(measures[0], how=f"{how}; one reading, {measures[0].how}")
    values, n = np.array([m.value for m in measures]), sum(m.n for m in measures)
    low, high = stats.mean_interval(values)
    kind = "Student's t over readings"
    if rate:
        _check_rates(values)
        trials = stats.wilson_interval(min(n, float(sum(m.value * m.n for m in measures))), n)
        low, high = max(0.0, min(low, trials[0])), min(1.0, max(high, trials[1]))
        kind += f", at least Wilson over {n} trials"
    return Measure(
        float(values.mean()), n, low, high, f"{how}; mean of {len(values)} readings, {kind}"
    )


@dataclass(frozen=True)
class DoseResponse:
    """Success by dose: p(x) = floor + (1 - floor) logistic(slope (ln x - ln x50)), slope >= 0, with what the data allow.

    fit: float64 (2,), logit at the dose exp(centre) and slope, of the highest penalised likelihood. edge: (R, 2), the same
    along the border of the region whose deviance is at most `phi F(1, df)` above the lowest: the range of any function
    over it is that function's 95 % profile interval. No penalty in there: where the data fit a step, a penalty would by
    itself bound the slope and place x50 within the step. units: readings x doses. doses: the least and the most above 0.
    """

    fit: Floats = field(repr=False, compare=False)
    edge: Floats = field(repr=False, compare=False)
    centre: float
    floor: float
    phi: float
    df: float
    units: int
    trials: int
    doses: tuple[float, float]

    @property
    def x50(self) -> Measure:
        """Poisons needed for 50 % success."""
        return self.dose(0.5)

    @property
    def slope(self) -> Measure:
        """Growth of the logit of success when the dose grows e-fold; up to inf where the data fit a step."""
        low, high = float(self.edge[:, 1].min()), float(self.edge[:, 1].max())
        how = f"growth of the logit of success when the dose grows e-fold; {self._how()}"
        return Measure(float(self.fit[1]), self.trials, low, high if high < STEP else math.inf, how)

    def dose(self, success: float) -> Measure:
        """The dose with a success, counted from the floor (0) to every time (1). 0 and inf: not bounded by the data."""
        if not 0 < success < 1:
            raise ValueError(f"success must be inside (0, 1); got {success}")
        aim = math.log(success / (1 - success))

        def at(points: Floats) -> Floats:
            level, slope = points[..., 0], points[..., 1]
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                rising = np.exp(self.centre + (aim - level) / slope)
            return np.where(slope > 0, rising, np.where(level < aim, np.inf, 0.0))

        edge = at(self.edge)
        how = f"dose with {success:.0%} success; {self._how()}"
        return Measure(float(at(self.fit)), self.trials, float(edge.min()), float(edge.max()), how)

    def predict(self, x: ArrayLike) -> tuple[Floats, Floats, Floats]:
        """Success at doses >= 0 (N,): fitted, and the ends of its pointwise 95 % interval."""
        doses = np.asarray(x, np.float64)
        away = np.log(np.where(doses > 0, doses, 1)) - self.centre

        def at(points: Floats) -> Floats:
            eta = points[..., :1] + points[..., 1:] * away
            return np.where(
                doses > 0,
                self.floor + (1 - self.floor) * np.exp(-np.logaddexp(0, -eta)),
                self.floor,
            )

        edge = at(self.edge)
        return at(self.fit), edge.min(0), edge.max(0)

    def describe(self, unit: str = "poisons") -> str:
        """One sentence: where 50 % success is reached, and how sure that is."""
        found, slope, (least, most) = self.x50, self.slope, self.doses
        where, after = f"with fewer than {_number(least)} {unit}", ""
        if found.low <= 0 and math.isinf(found.high):
            return f"50 % success cannot be placed by {self.units} readings with {_number(least)} to {_number(most)} {unit}"
        if least <= found.value <= most:
            steep = (
                f"at least {slope.low:.2g}"
                if slope.low and math.isinf(slope.high)
                else f"{slope.value:.2g}"
            )
            where, after = f"at {_number(found.value)} {unit}", f", slope {steep}"
        elif found.value > most:
            where = f"not reached up to {_number(most)} {unit}"
        after += f"; counted from the {100 * self.floor:.2g} % without poison" if self.floor else ""
        return f"50 % success {where} ({_number(found.low)} .. {_number(found.high)}){after}"

    def _how(self) -> str:
        return (
            f"logistic law in ln dose, floor {self.floor:.3g}, Firth's estimate, profile likelihood interval, "
            f"{self.units} readings x doses, overdispersion {self.phi:.3g}"
        )


def fit_dose_response(
    doses: ArrayLike, rates: ArrayLike, trials: ArrayLike, floor: float | None = None
) -> DoseResponse:
    """Fit a law to units: each a reading with its dose (N,), its success rate (N,) and how many trials that is of (N,).

    floor: success without poison (Abbott 1925), taken as known; None: the success measured at dose 0, or 0 without one.
    Firth's (1993) penalty keeps every estimate finite where the doses that fail and those that succeed do not overlap.
    It is weighed by the overdispersion phi (quasi-binomial), as bias reduction with a dispersion asks (Kosmidis et al. 2020).
    """
    from scipy.stats import t

    x, p, n = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (doses, rates, trials)))
    if x.ndim != 1 or not (np.isfinite(x).all() and (x >= 0).all() and (n >= 1).all()):
        raise ValueError("doses must be (N,), finite and >= 0, with at least one trial each")
    _check_rates(p)
    none = x == 0
    if floor is None:
        floor = float((p * n)[none].sum() / n[none].sum()) if none.any() else 0.0
    if not 0 <= floor < 1:
        raise UserError(
            f"success without poison must be below 1 for a dose-response law; it is {floor:g}"
        )
    x, p, n = x[~none], p[~none], n[~none]
    units = len(x)
    if units < 3 or len(np.unique(x)) < 2:
        raise UserError(
            f"a dose-response law needs 3 readings at 2 doses above 0; there are {units} at {len(np.unique(x))}"
        )
    likelihood = _Likelihood.of(x, p, n, floor)
    fit = likelihood.best()
    phi, df = likelihood.dispersion(fit, x, p, n)
    if phi > 1:
        likelihood = dataclasses.replace(likelihood, penalty=phi)
        fit = likelihood.best(fit)
    likelihood, fit, errors = likelihood.centred(fit, phi)
    allowed, most = phi * t.ppf(0.975, df) ** 2, n.max() * t.ppf(0.975, math.inf) ** 2
    if (
        allowed > most
    ):  # readings that each fail or succeed as a whole vary most, and by how much is known
        allowed, df = most, math.inf
    edge = likelihood.edge(fit, errors, float(allowed) / 2)
    return DoseResponse(
        fit,
        edge,
        likelihood.centre,
        floor,
        phi,
        df,
        units,
        int(n.sum()),
        (float(x.min()), float(x.max())),
    )


@dataclass(frozen=True)
class _Likelihood:
    """Penalised log-likelihood of (logit at the centre, slope). u: ln of the D distinct doses; hits, trials: (D,) sums."""

    u: Floats
    hits: Floats
    trials: Floats
    floor: float
    centre: float
    penalty: float = 1.0

    @classmethod
    def of(cls, x: Floats, p: Floats, n: Floats, floor: float) -> _Likelihood:
        u, place = np.unique(np.log(x), return_inverse=True)
        hits, trials = np.bincount(place, p * n), np.bincount(place, n).astype(np.float64)
        near = (hits + 0.5) / (
            trials + 1
        )  # the centre is where the data tell most: level and slope part there
        return cls(
            u,
            np.minimum(hits, trials),
            trials,
            floor,
            float(np.average(u, weights=trials * near * (1 - near))),
        )

    def parts(self, at: Floats) -> tuple[Floats, Floats, Floats]:
        """Points (..., 2) -> log of success, log of failure, log of Fisher's information on the logit, each (..., D)."""
        eta = at[..., :1] + at[..., 1:] * (self.u - self.centre)
        rest = math.log1p(-self.floor)
        up, down = -np.logaddexp(0, -eta), -np.logaddexp(0, eta)
        hit, miss = (
            np.logaddexp(math.log(self.floor) if self.floor else -np.inf, rest + up),
            rest + down,
        )
        return hit, miss, np.log(self.trials) + 2 * (rest + up + down) - hit - miss

    def __call__(self, at: Floats) -> Floats:
        """Points (..., 2) -> (...): binomial log-likelihood + penalty / 2 log det of the information (Jeffreys' prior)."""
        hit, miss, weight = self.parts(at)
        value = np.asarray((self.hits * hit + (self.trials - self.hits) * miss).sum(-1))
        if not self.penalty:
            return value
        top = weight.max(-1, keepdims=True)
        share = np.exp(weight - top)
        # seen from the dose that weighs most, the determinant does not cancel however little the others weigh
        v = self.u - self.u[weight.argmax(-1)][..., None]
        v = v - (share * v).sum(-1, keepdims=True) / share.sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            det = 2 * top[..., 0] + np.log(share.sum(-1)) + np.log((share * v**2).sum(-1))
        return np.asarray(value + self.penalty / 2 * det)

    def best(self, start: Floats | None = None) -> Floats:
        """The point of the highest value: the best of a grid over all scales, polished by the simplex method."""
        from scipy.optimize import minimize

        span = self.u[-1] - self.u[0]
        if start is None:
            level, slope = np.meshgrid(
                np.sinh(np.linspace(-5, 5, 41)), np.sinh(np.linspace(0, 6, 31)) / span
            )
            grid = np.stack([level.ravel(), slope.ravel()], 1)
            start = grid[self(grid).argmax()]
        corners = start + np.array([[0, 0], [0.3, 0], [0, 0.3 / span]])
        options = {"initial_simplex": corners, "xatol": 1e-6, "fatol": 1e-8, "maxfev": 4000}
        found = minimize(
            lambda p: -float(self(np.array([p[0], abs(p[1])]))),
            start,
            method="Nelder-Mead",
            options=options,
        )
        level, rise = found.x[0], abs(found.x[1])
        return np.array([level, rise if rise * span > FLAT else 0.0])

    def dispersion(self, at: Floats, x: Floats, p: Floats, n: Floats) -> tuple[float, float]:
        """Overdispersion (at least 1) of the units, and its degrees of freedom.

        Pearson's chi-squared with the weights 4 q (1 - q): readings that always or never succeed cannot vary, and would
        thin out what the others show. Degrees of freedom as Satterthwaite counts them. q stays half a trial off 0 and 1:
        one chance hit where the law says never is no surprise.
        """
        away = np.log(x) - self.centre
        fitted = self.floor + (1 - self.floor) * np.exp(-np.logaddexp(0, -(at[0] + at[1] * away)))
        q = (n * fitted + 0.5) / (n + 1)
        surprise, info, w = n * (p - fitted) ** 2 / (q * (1 - q)), n * q * (1 - q), 4 * q * (1 - q)
        away = away - np.average(away, weights=info)
        free = 1 - info / info.sum() - info * away**2 / (info * away**2).sum()  # 1 - leverage
        phi, df = (
            (w * surprise).sum() / (w * free).sum(),
            (w * free).sum() ** 2 / (w**2 * free).sum(),
        )
        return float(np.clip(phi, 1, n.max())), float(np.clip(df, 1, len(x) - 2))

    def centred(self, at: Floats, phi: float) -> tuple[_Likelihood, Floats, Floats]:
        """Itself with the centre where level and slope are uncorrelated, the point seen from there, standard errors (2,)."""
        weight = np.exp(self.parts(at)[2])
        centre = float(np.average(self.u, weights=weight))
        errors = np.sqrt(phi / np.array([weight.sum(), (weight * (self.u - centre) ** 2).sum()]))
        moved = np.array([at[0] + at[1] * (centre - self.centre), at[1]])
        return dataclasses.replace(self, centre=centre), moved, errors

    def edge(self, fit: Floats, scale: Floats, drop: float) -> Floats:
        """(R, 2): how far one may go from the fit until the likelihood is `drop` below its highest, or the slope is 0.

        Straight ways in all directions, and those that keep the success at one dose while the slope grows: along these
        the region is open where the data fit a step, up to FAR standard errors.
        """
        free = dataclasses.replace(self, penalty=0.0)
        least = max(free(fit), free(free.best(fit))) - drop
        angle = np.arange(RAYS) * 2 * np.pi / RAYS
        way = np.stack([np.cos(angle), np.sin(angle)], 1) * scale
        way = np.concatenate(
            [way, np.stack([self.centre - self.u, np.ones_like(self.u)], 1) * scale[1]]
        )
        falls = way[:, 1] < 0
        wall = np.where(falls, fit[1] / -np.where(falls, way[:, 1], -1), FAR)
        whole = free(fit + wall[:, None] * way) >= least
        inner, outer = np.minimum(1 / FAR, wall), wall
        for _ in range(40):
            middle = np.sqrt(inner * outer)
            held = free(fit + middle[:, None] * way) >= least
            inner, outer = np.where(held, middle, inner), np.where(held, outer, middle)
        points = fit + np.where(whole, wall, inner)[:, None] * way
        return np.stack([points[:, 0], np.where(falls & whole, 0.0, points[:, 1])], 1)


@dataclass(frozen=True)
class Contrast:
    """A difference with its 95 % interval. n: readings. detectable: the least effect found 4 times in 5 at 5 %."""

    value: float
    low: float
    high: float
    n: int
    detectable: float
    how: str

    def json(self) -> dict:
        """As it stands in a manifest."""
        return encode_nonfinite(asdict(self))


def difference(
    a: Sequence[float], b: Sequence[float], paired: bool, trials: int | None = None
) -> Contrast:
    """Mean of a less mean of b over readings: Student's t of the pairs, or Welch's t of two independent groups.

    trials: how many trials each value is a rate of; the interval is then at least that of their binomial error. Without it,
    values that do not vary at all leave the interval open.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not len(x) or not len(y) or (paired and len(x) != len(y)):
        raise UserError(
            f"a difference needs readings on either side, as many if paired; there are {len(x)} and {len(y)}"
        )
    if paired:
        df, error = len(x) - 1.0, _variance(x - y) ** 0.5
        how = f"mean difference of {len(x)} pairs of readings, Student's t"
    else:
        u, v = _variance(x), _variance(y)
        df, error = min(len(x), len(y)) - 1.0, (u + v) ** 0.5
        if df and error:
            df = (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1))
        how = f"difference of the means of {len(x)} and {len(y)} readings, Welch's t"
    least = None if trials is None else math.hypot(_binomial(x, trials), _binomial(y, trials))
    found = _contrast(
        float(x.mean() - y.mean()), error, df, len(x) if paired else len(x) + len(y), how, least
    )
    if trials is None:
        return found
    return dataclasses.replace(found, low=max(-1.0, found.low), high=min(1.0, found.high))


def trend(x: Sequence[float], y: Sequence[float], trials: int | None = None) -> Contrast:
    """Slope of y per doubling of x > 0 over readings, by least squares, with Student's t. trials: as in `difference`."""
    from scipy.stats import kendalltau

    u, v = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if u.shape != v.shape or u.ndim != 1 or not (u > 0).all():
        raise ValueError("x and y must be (N,) alike, x > 0")
    if len(u) < 3 or len(np.unique(u)) < 2:
        raise UserError(
            f"a trend needs at least 3 readings at 2 places; there are {len(u)} at {len(np.unique(u))}"
        )
    away = np.log2(u) - np.log2(u).mean()
    spread = float((away**2).sum())
    slope = float((away * v).sum()) / spread
    rest = v - v.mean() - slope * away
    error = math.sqrt(_variance(rest) * len(u) * (len(u) - 1) / (len(u) - 2) / spread)
    least = None
    if trials is not None:
        least = (
            math.sqrt(
                sum((w * _binomial(r, trials)) ** 2 for w, r in zip(away, v[:, None], strict=True))
            )
            / spread
        )
    tau = 0.0 if len(np.unique(v)) < 2 else float(kendalltau(u, v).statistic)
    how = f"slope per doubling over {len(u)} readings, Student's t; Kendall's tau {tau:.2f}"
    return _contrast(slope, error, len(u) - 2.0, len(u), how, least)


def judge(
    contrast: Contrast, expected: Literal["+", "-", "same"], margin: float = 0.0
) -> ClaimVerdict:
    """Whether an interval bears a claim out: '+' above 0, '-' below 0, 'same' within +-margin; contradicted: beyond."""
    low, high = contrast.low, contrast.high
    above, below, inside = low > 0, high < 0, -margin <= low and high <= margin
    claims = {
        "+": (above, below),
        "-": (below, above),
        "same": (inside, low > margin or high < -margin),
    }
    if expected not in claims:
        raise ValueError(f"expected must be '+', '-' or 'same'; got {expected!r}")
    if expected == "same" and not margin > 0:
        raise ValueError(f"to call two things the same needs a margin above 0; got {margin}")
    borne, against = claims[expected]
    return "confirmed" if borne else "contradicted" if against else "undecided"


def _contrast(
    value: float, error: float, df: float, n: int, how: str, least: float | None
) -> Contrast:
    """By Student's t of the readings, on neither side short of what the trials' binomial error allows, as in `pooled`.

    Readings that happen to agree do not show how far they vary, and how far the trials vary is known. Open where one reading,
    or no spread and no trials, leave the error unknown.
    """
    from scipy.stats import norm, t

    floor = least or 0.0
    if df < 1 or max(error, floor) == 0:
        return Contrast(
            value, -math.inf, math.inf, n, math.inf, how + "; no spread to judge by, interval open"
        )
    (sure, found), (known, seen) = (law.ppf([0.975, 0.8]) for law in (t(df), norm))
    if known * floor > sure * error:
        how += "; the binomial error of the trials, which allows for more than the readings' spread"
    wide, least_found = (
        max(sure * error, known * floor),
        max((sure + found) * error, (known + seen) * floor),
    )
    return Contrast(value, float(value - wide), float(value + wide), n, float(least_found), how)


def _variance(values: Floats) -> float:
    """Of the mean; 0 where a single value shows none. Spread that is rounding (0.1 + 0.2 - 0.3) is none."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return spread**2 / len(values) if spread > 1e-12 * (1 + float(np.abs(values).max())) else 0.0


def _binomial(rates: Floats, trials: int) -> float:
    """Standard error of the mean of rates of `trials` each, by Wilson's interval: not 0 at rates of 0 and 1."""
    _check_rates(rates)
    n = len(rates) * trials
    low, high = stats.wilson_interval(min(n, float(rates.sum()) * trials), n)
    return (high - low) / (2 * 1.959964)


def _check_rates(rates: Floats) -> None:
    if not ((rates >= 0) & (rates <= 1)).all():  # refuses NaN too
        raise ValueError(f"rates must be inside 0..1; got {rates.min():g}..{rates.max():g}")


def _number(x: float) -> str:
    if x >= 1e7:
        return "∞" if math.isinf(x) else "over 10 million"
    return f"{x:,.0f}" if x >= 100 else f"{x:.2g}"
