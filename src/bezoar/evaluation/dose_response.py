"""Dose-response curves of attacks, and tests whether two groups of readings differ.

A reading is one trigger, or one group of victims, in one training. Intervals speak of other
readings, not only of other test images.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import kendalltau, norm, t

from bezoar.errors import UserError
from bezoar.evaluation import stats
from bezoar.evaluation.dose_likelihood import Likelihood, check_rates, read_doses
from bezoar.evaluation.scores import Measure, encode_nonfinite
from bezoar.evaluation.stats import Floats

STEP = 1e6  # a slope from which on a curve counts as a step
ROUNDING = 1e-12  # relative spread of values that differ by rounding alone
ClaimVerdict = Literal["confirmed", "contradicted", "undecided"]


def pool_readings(measures: Sequence[Measure], how: str, rate: bool = True) -> Measure:
    """Average several readings, each with the same weight, to one point of a curve.

    Args:
        measures: one of each reading. A single one keeps its interval.
        how: what is averaged, in words.
        rate: whether they are shares of trials, in 0..1. The interval, Student's t over readings,
            is then on neither side short of Wilson's over all trials: readings that all reach 1.000
            do not show how far they vary.

    Raises:
        UserError: if there is no reading.
    """
    if not measures:
        raise UserError(f"{how}: a mean over readings needs at least one")
    if len(measures) == 1:
        return dataclasses.replace(measures[0], how=f"{how}; one reading, {measures[0].how}")
    values = np.array([m.value for m in measures])
    n = sum(m.n for m in measures)
    low, high = stats.mean_interval(values)
    interval = "Student's t over readings"
    if rate:
        check_rates(values)
        hits = float(sum(m.value * m.n for m in measures))
        low, high = stats.mean_rate_interval(values, hits, n)
        interval += f", at least Wilson over {n} trials"
    how = f"{how}; mean of {len(values)} readings, {interval}"
    return Measure(float(values.mean()), n, low, high, how)


@dataclass(frozen=True)
class DoseResponse:
    """A fitted curve p(x) = floor + (1 - floor) logistic(level + slope (ln x - centre))."""

    # float64 (2,), level and slope >= 0 of the highest penalised likelihood
    fit: Floats = field(repr=False, compare=False)
    # (R, 2), the same along the border of the region whose deviance is at most phi F(1, df) above
    # the lowest. The range of a function over it is that function's 95 % profile interval. There is
    # no penalty in the region: where the data fit a step, a penalty alone would bound the slope and
    # place the middle of the step
    border: Floats = field(repr=False, compare=False)
    centre: float  # logarithm of the dose at which the level is the logit
    floor: float  # success without poison
    phi: float  # overdispersion of the readings
    df: float  # degrees of freedom of phi
    units: int  # number of readings x doses
    trials: int  # number of trials in all
    doses: tuple[float, float]  # the least and the greatest dose above 0

    @property
    def x50(self) -> Measure:
        """The dose with 50 % success."""
        return self.dose(0.5)

    @property
    def slope(self) -> Measure:
        """Growth of the logit when the dose grows e-fold; up to infinity if the data fit a step."""
        low, high = float(self.border[:, 1].min()), float(self.border[:, 1].max())
        how = f"growth of the logit of success when the dose grows e-fold; {self._how()}"
        return Measure(float(self.fit[1]), self.trials, low, high if high < STEP else math.inf, how)

    def dose(self, success: float) -> Measure:
        """Return the dose with a success, counted from the floor (0) to every time (1).

        success: inside (0, 1). Ends of 0 and infinity are not bounded by the data.
        """
        if not 0 < success < 1:
            raise ValueError(f"success must be inside (0, 1); got {success}")
        logit = math.log(success / (1 - success))

        def dose_at(points: Floats) -> Floats:
            level, slope = points[..., 0], points[..., 1]
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                rising = np.exp(self.centre + (logit - level) / slope)
            flat = np.where(level < logit, np.inf, 0.0)
            return np.where(slope > 0, rising, flat)

        value, border = dose_at(self.fit), dose_at(self.border)
        how = f"dose with {success:.0%} success; {self._how()}"
        return Measure(float(value), self.trials, float(border.min()), float(border.max()), how)

    def predict(self, x: ArrayLike) -> tuple[Floats, Floats, Floats]:
        """Return success at doses >= 0 (N,), and the ends of its pointwise 95 % interval."""
        doses = np.asarray(x, np.float64)
        offset = np.log(np.where(doses > 0, doses, 1)) - self.centre

        def success_at(points: Floats) -> Floats:
            eta = points[..., :1] + points[..., 1:] * offset
            success = self.floor + (1 - self.floor) * np.exp(-np.logaddexp(0, -eta))
            return np.where(doses > 0, success, self.floor)

        border = success_at(self.border)
        return success_at(self.fit), border.min(0), border.max(0)

    def describe(self, unit: str = "poisons") -> str:
        """State in one sentence where 50 % success is reached, and how certain that is."""
        x50, slope = self.x50, self.slope
        least, most = self.doses
        least_text, most_text = _format_dose(least), _format_dose(most)
        if x50.low <= 0 and math.isinf(x50.high):
            return (
                f"50 % success cannot be placed by {self.units} readings with {least_text} "
                f"to {most_text} {unit}"
            )
        where, detail = f"with fewer than {least_text} {unit}", ""
        if least <= x50.value <= most:
            steep = f"{slope.value:.2g}"
            if slope.low and math.isinf(slope.high):
                steep = f"at least {slope.low:.2g}"
            where, detail = f"at {_format_dose(x50.value)} {unit}", f", slope {steep}"
        elif x50.value > most:
            where = f"not reached up to {most_text} {unit}"
        if self.floor:
            detail += f"; counted from the {100 * self.floor:.2g} % without poison"
        interval = f"{_format_dose(x50.low)} .. {_format_dose(x50.high)}"
        return f"50 % success {where} ({interval}){detail}"

    def _how(self) -> str:
        return (
            f"logistic law in ln dose, floor {self.floor:.3g}, Firth's estimate, "
            f"profile likelihood interval, {self.units} readings x doses, "
            f"overdispersion {self.phi:.3g}"
        )


def fit_dose_response(
    doses: ArrayLike, rates: ArrayLike, trials: ArrayLike, floor: float | None = None
) -> DoseResponse:
    """Fit a dose-response curve to units, each a reading at a dose.

    Firth's (1993) penalty keeps every estimate finite if the doses that fail and those that succeed
    do not overlap. It is weighted by the overdispersion (quasi-binomial), as in bias reduction with
    a dispersion (Kosmidis et al. 2020).

    Args:
        doses: (N,), >= 0.
        rates: (N,), success in 0..1.
        trials: (N,) or a number, the number of trials of a rate.
        floor: success without poison (Abbott 1925), assumed to be known. None means the success
            measured at dose 0, or 0 if there is none.

    Raises:
        UserError: if there are fewer than 3 readings at 2 doses above 0, or the floor is 1.
    """
    readings, floor = read_doses(doses, rates, trials, floor)
    likelihood = Likelihood.of(readings, floor)
    fit = likelihood.maximise()
    phi, df = likelihood.dispersion(fit, readings)
    if phi > 1:
        likelihood = dataclasses.replace(likelihood, penalty=phi)
        fit = likelihood.maximise(fit)
    likelihood, fit, errors = likelihood.decorrelate(fit, phi)
    deviance = phi * t.ppf(0.975, df) ** 2
    # Readings that each fail or succeed as a whole vary most, and by how much is known.
    greatest = readings.trials.max() * t.ppf(0.975, math.inf) ** 2
    if deviance > greatest:
        deviance, df = greatest, math.inf
    border = likelihood.region_border(fit, errors, float(deviance) / 2)
    return DoseResponse(
        fit,
        border,
        likelihood.centre,
        floor,
        phi,
        df,
        len(readings),
        int(readings.trials.sum()),
        (float(readings.doses.min()), float(readings.doses.max())),
    )


@dataclass(frozen=True)
class Contrast:
    """A difference with its 95 % interval."""

    value: float  # the difference
    low: float  # lower end of the interval
    high: float  # upper end
    n: int  # number of readings
    detectable: float  # the least effect that is detected 4 times in 5, at a level of 5 %
    how: str  # its definition, in words

    def json(self) -> dict[str, Any]:
        """Return the contrast for a manifest."""
        return encode_nonfinite(asdict(self))


def difference(
    a: Sequence[float], b: Sequence[float], paired: bool, trials: int | None = None
) -> Contrast:
    """Compare the means of two groups of readings.

    Args:
        a: readings.
        b: readings, whose mean is subtracted from that of a.
        paired: Student's t of the pairs, or Welch's t of two independent groups.
        trials: number of trials of each reading, if it is a rate. The interval is then at least
            that of their binomial error. Without it, the interval of readings without variance is
            open.

    Raises:
        UserError: if a group is empty, or pairs are of groups of different sizes.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    n, m = len(x), len(y)
    if not n or not m or (paired and n != m):
        raise UserError(
            f"a difference needs readings on either side, as many if paired; there are {n} and {m}"
        )
    if paired:
        df = n - 1.0
        error = _mean_variance(x - y) ** 0.5
        how = f"mean difference of {n} pairs of readings, Student's t"
    else:
        u, v = _mean_variance(x), _mean_variance(y)
        df = min(n, m) - 1.0
        error = (u + v) ** 0.5
        if df and error:
            df = (u + v) ** 2 / (u**2 / (n - 1) + v**2 / (m - 1))
        how = f"difference of the means of {n} and {m} readings, Welch's t"
    least_error = 0.0
    if trials is not None:
        least_error = math.hypot(_binomial_error(x, trials), _binomial_error(y, trials))
    value = float(x.mean() - y.mean())
    contrast = _make_contrast(value, error, df, n if paired else n + m, how, least_error)
    if trials is None:
        return contrast
    return dataclasses.replace(contrast, low=max(-1.0, contrast.low), high=min(1.0, contrast.high))


def trend(x: Sequence[float], y: Sequence[float], trials: int | None = None) -> Contrast:
    """Fit the slope of y per doubling of x > 0 over readings, by least squares, with Student's t.

    trials: as of `difference`. Raises UserError for fewer than 3 readings at 2 places.
    """
    u, v = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if u.shape != v.shape or u.ndim != 1 or not (u > 0).all():
        raise ValueError("x and y must be (N,) alike, x > 0")
    n, distinct = len(u), len(np.unique(u))
    if n < 3 or distinct < 2:
        raise UserError(
            f"a trend needs at least 3 readings at 2 places; there are {n} at {distinct}"
        )
    offset = np.log2(u) - np.log2(u).mean()
    spread = float((offset**2).sum())
    slope = float((offset * v).sum()) / spread
    residuals = v - v.mean() - slope * offset
    error = math.sqrt(_mean_variance(residuals) * n * (n - 1) / (n - 2) / spread)
    least_error = 0.0
    if trials is not None:
        errors = [_binomial_error(rate, trials) for rate in v[:, None]]
        squares = ((w * e) ** 2 for w, e in zip(offset, errors, strict=True))
        least_error = math.sqrt(sum(squares)) / spread
    tau = 0.0 if len(np.unique(v)) < 2 else float(kendalltau(u, v).statistic)
    how = f"slope per doubling over {n} readings, Student's t; Kendall's tau {tau:.2f}"
    return _make_contrast(slope, error, n - 2.0, n, how, least_error)


def judge(
    contrast: Contrast, expected: Literal["+", "-", "same"], margin: float = 0.0
) -> ClaimVerdict:
    """Judge a claim by its interval.

    Args:
        contrast: the difference that the claim is about.
        expected: `+` claims that it is above 0, `-` below 0, `same` within +-margin.
        margin: above 0 for `same`.

    Returns:
        confirmed if the whole interval agrees with the claim, contradicted if no part of it does.
    """
    low, high = contrast.low, contrast.high
    if expected == "+":
        confirmed, contradicted = low > 0, high < 0
    elif expected == "-":
        confirmed, contradicted = high < 0, low > 0
    elif expected == "same":
        if not margin > 0:
            raise ValueError(f"to call two things the same needs a margin above 0; got {margin}")
        confirmed = -margin <= low and high <= margin
        contradicted = low > margin or high < -margin
    else:
        raise ValueError(f"expected must be '+', '-' or 'same'; got {expected!r}")
    if confirmed:
        return "confirmed"
    return "contradicted" if contradicted else "undecided"


def _make_contrast(
    value: float, error: float, df: float, n: int, how: str, least_error: float
) -> Contrast:
    """Make a contrast by Student's t of the readings, as wide at least as the trials' error allows.

    Readings that happen to agree do not show how far they vary, while it is known how far the
    trials vary. The interval is open if one reading, or no spread and no trials, leave the error
    unknown.

    error: standard error over readings, with `df` degrees of freedom. least_error: the trials'
    binomial error, 0 if unknown.
    """
    if df < 1 or max(error, least_error) == 0:
        how += "; no spread to judge by, interval open"
        return Contrast(value, -math.inf, math.inf, n, math.inf, how)
    t_level, t_power = t(df).ppf([0.975, 0.8])
    z_level, z_power = norm.ppf([0.975, 0.8])
    if z_level * least_error > t_level * error:
        how += "; the binomial error of the trials, which allows for more than the readings' spread"
    half = max(t_level * error, z_level * least_error)
    detectable = max((t_level + t_power) * error, (z_level + z_power) * least_error)
    return Contrast(value, float(value - half), float(value + half), n, float(detectable), how)


def _mean_variance(values: Floats) -> float:
    """Return the variance of the mean; 0 of one value, and of values that differ by rounding."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    if not spread > ROUNDING * (1 + float(np.abs(values).max())):
        return 0.0
    return spread**2 / len(values)


def _binomial_error(rates: Floats, trials: int) -> float:
    """Return the standard error of a mean of rates by Wilson's interval; it is never 0."""
    check_rates(rates)
    n = len(rates) * trials
    low, high = stats.wilson_interval(min(n, float(rates.sum()) * trials), n)
    return (high - low) / (2 * 1.959964)


def _format_dose(x: float) -> str:
    if x >= 1e7:
        return "∞" if math.isinf(x) else "over 10 million"
    return f"{x:,.0f}" if x >= 100 else f"{x:.2g}"
