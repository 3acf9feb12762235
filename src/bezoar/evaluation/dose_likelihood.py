"""The likelihood of a dose-response curve: a logistic function of ln dose above a known floor.

No library that bezoar depends on fits it: with a floor it is no generalised linear model, and
success that turns from never to always between two doses has no maximum without Firth's penalty.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from bezoar.errors import UserError
from bezoar.evaluation.stats import Floats

DIRECTIONS = 360  # directions in which the border of a region is searched
FAR = 2.0**40  # standard errors at which a direction counts as open
FLAT = 1e-6  # a rise over all doses, in logits, that counts as none
HALVINGS = 40  # of a step's length, on a logarithmic scale


@dataclass(frozen=True)
class Readings:
    """Success rates at doses: N units of one reading and one dose each."""

    doses: Floats  # float64 (N,), above 0
    rates: Floats  # float64 (N,), success in 0..1
    trials: Floats  # float64 (N,), how many trials a rate is of

    def __len__(self) -> int:
        return len(self.doses)


def read_doses(
    doses: ArrayLike, rates: ArrayLike, trials: ArrayLike, floor: float | None
) -> tuple[Readings, float]:
    """Check the data of a curve. Returns the readings at doses above 0, and the floor."""
    x, p, n = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (doses, rates, trials)))
    if x.ndim != 1 or not (np.isfinite(x).all() and (x >= 0).all() and (n >= 1).all()):
        raise ValueError("doses must be (N,), finite and >= 0, with at least one trial each")
    check_rates(p)
    zero = x == 0
    if floor is None:
        floor = float((p * n)[zero].sum() / n[zero].sum()) if zero.any() else 0.0
    if not 0 <= floor < 1:
        raise UserError(
            f"success without poison must be below 1 for a dose-response law; it is {floor:g}"
        )
    readings = Readings(x[~zero], p[~zero], n[~zero])
    distinct = len(np.unique(readings.doses))
    if len(readings) < 3 or distinct < 2:
        raise UserError(
            f"a dose-response law needs 3 readings at 2 doses above 0; there are {len(readings)} "
            f"at {distinct}"
        )
    return readings, floor


def check_rates(rates: Floats) -> None:
    """Raise ValueError unless all rates are in 0..1."""
    if not ((rates >= 0) & (rates <= 1)).all():  # refuses NaN too
        raise ValueError(f"rates must be inside 0..1; got {rates.min():g}..{rates.max():g}")


@dataclass(frozen=True)
class Likelihood:
    """Penalised log-likelihood of a dose-response curve.

    The curve is p(x) = floor + (1 - floor) logistic(level + slope (ln x - centre)). A point is
    (level, slope): the logit at the dose exp(centre), and its growth when the dose grows e-fold.
    """

    log_doses: Floats  # float64 (D,), logarithms of the distinct doses
    hits: Floats  # float64 (D,), successes at each
    trials: Floats  # float64 (D,), trials at each
    floor: float  # success without poison, taken as known
    centre: float  # logarithm of a dose
    penalty: float = 1.0  # weight of Jeffreys' prior (Firth 1993)

    @classmethod
    def of(cls, readings: Readings, floor: float) -> Likelihood:
        """Sum up readings by dose; the centre is the mean dose, weighted by information."""
        log_doses, place = np.unique(np.log(readings.doses), return_inverse=True)
        hits = np.bincount(place, readings.rates * readings.trials)
        trials = np.bincount(place, readings.trials).astype(np.float64)
        rates = (hits + 0.5) / (trials + 1)
        centre = float(np.average(log_doses, weights=trials * rates * (1 - rates)))
        return cls(log_doses, np.minimum(hits, trials), trials, floor, centre)

    def log_terms(self, points: Floats) -> tuple[Floats, Floats, Floats]:
        """Return logarithms of success, of failure and of Fisher's information on the logit.

        points: (..., 2). Each result is (..., D).
        """
        eta = points[..., :1] + points[..., 1:] * (self.log_doses - self.centre)
        log_rest = math.log1p(-self.floor)
        log_floor = math.log(self.floor) if self.floor else -np.inf
        log_up, log_down = -np.logaddexp(0, -eta), -np.logaddexp(0, eta)
        success = np.logaddexp(log_floor, log_rest + log_up)
        failure = log_rest + log_down
        information = np.log(self.trials) + 2 * (log_rest + log_up + log_down) - success - failure
        return success, failure, information

    def __call__(self, points: Floats) -> Floats:
        """Return the penalised log-likelihood, (...), of points (..., 2).

        It is the binomial log-likelihood + penalty / 2 log det of the information.
        """
        success, failure, information = self.log_terms(points)
        misses = self.trials - self.hits
        value = np.asarray((self.hits * success + misses * failure).sum(-1))
        if not self.penalty:
            return value
        top = information.max(-1, keepdims=True)
        share = np.exp(information - top)
        # Seen from the dose that weighs most, the determinant does not cancel, however little the
        # others weigh.
        offset = self.log_doses - self.log_doses[information.argmax(-1)][..., None]
        offset = offset - (share * offset).sum(-1, keepdims=True) / share.sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            log_det = 2 * top[..., 0] + np.log(share.sum(-1)) + np.log((share * offset**2).sum(-1))
        return np.asarray(value + self.penalty / 2 * log_det)

    def maximise(self, start: Floats | None = None) -> Floats:
        """Return the point (2,) of the highest value with slope >= 0.

        The best of a grid over all scales, or `start`, is polished by the simplex method.
        """
        span = self.log_doses[-1] - self.log_doses[0]
        if start is None:
            levels = np.sinh(np.linspace(-5, 5, 41))
            slopes = np.sinh(np.linspace(0, 6, 31)) / span
            level, slope = np.meshgrid(levels, slopes)
            grid = np.stack([level.ravel(), slope.ravel()], 1)
            start = grid[self(grid).argmax()]
        corners = start + np.array([[0, 0], [0.3, 0], [0, 0.3 / span]])
        options = {"initial_simplex": corners, "xatol": 1e-6, "fatol": 1e-8, "maxfev": 4000}
        result = minimize(
            lambda point: -float(self(np.array([point[0], abs(point[1])]))),
            start,
            method="Nelder-Mead",
            options=options,
        )
        level, slope = result.x[0], abs(result.x[1])
        return np.array([level, slope if slope * span > FLAT else 0.0])

    def dispersion(self, point: Floats, readings: Readings) -> tuple[float, float]:
        """Return the overdispersion of the readings, at least 1, and its degrees of freedom.

        It is Pearson's chi-squared with the weights 4 q (1 - q): readings that always or never
        succeed cannot vary, and would dilute the others. Degrees of freedom are Satterthwaite's. q
        is at least half a trial away from 0 and 1, so that one chance success at a dose without
        fitted success has little influence.
        """
        n = readings.trials
        offset = np.log(readings.doses) - self.centre
        logistic = np.exp(-np.logaddexp(0, -(point[0] + point[1] * offset)))
        fitted = self.floor + (1 - self.floor) * logistic
        q = (n * fitted + 0.5) / (n + 1)
        surprise = n * (readings.rates - fitted) ** 2 / (q * (1 - q))
        information = n * q * (1 - q)
        weight = 4 * q * (1 - q)
        offset = offset - np.average(offset, weights=information)
        spread = information * offset**2
        freedom = 1 - information / information.sum() - spread / spread.sum()  # 1 - leverage
        phi = (weight * surprise).sum() / (weight * freedom).sum()
        df = (weight * freedom).sum() ** 2 / (weight**2 * freedom).sum()
        return float(np.clip(phi, 1, n.max())), float(np.clip(df, 1, len(readings) - 2))

    def decorrelate(self, point: Floats, phi: float) -> tuple[Likelihood, Floats, Floats]:
        """Move the centre to where level and slope are uncorrelated at a point.

        Returns:
            The likelihood, the same point seen from the new centre, and the standard errors (2,).
        """
        weight = np.exp(self.log_terms(point)[2])
        centre = float(np.average(self.log_doses, weights=weight))
        spread = (weight * (self.log_doses - centre) ** 2).sum()
        errors = np.sqrt(phi / np.array([weight.sum(), spread]))
        moved = np.array([point[0] + point[1] * (centre - self.centre), point[1]])
        return dataclasses.replace(self, centre=centre), moved, errors

    def region_border(self, fit: Floats, errors: Floats, drop: float) -> Floats:
        """Return points (R, 2) along the border of the confidence region around the fit.

        In each direction the border is where the unpenalised likelihood is `drop` below its
        maximum, or where the slope is 0. The directions are straight lines all around, and lines
        along which the success at one dose stays fixed while the slope grows. Along the latter the
        region is open if the data fit a step, and they are followed up to FAR standard errors.
        """
        unpenalised = dataclasses.replace(self, penalty=0.0)
        least = max(unpenalised(fit), unpenalised(unpenalised.maximise(fit))) - drop
        angle = np.arange(DIRECTIONS) * 2 * np.pi / DIRECTIONS
        straight = np.stack([np.cos(angle), np.sin(angle)], 1) * errors
        turning = np.stack([self.centre - self.log_doses, np.ones_like(self.log_doses)], 1)
        ways = np.concatenate([straight, turning * errors[1]])
        falls = ways[:, 1] < 0
        wall = np.where(falls, fit[1] / -np.where(falls, ways[:, 1], -1), FAR)  # slope 0, or FAR
        is_open = unpenalised(fit + wall[:, None] * ways) >= least
        inner, outer = np.minimum(1 / FAR, wall), wall
        for _ in range(HALVINGS):
            middle = np.sqrt(inner * outer)
            is_inside = unpenalised(fit + middle[:, None] * ways) >= least
            inner = np.where(is_inside, middle, inner)
            outer = np.where(is_inside, outer, middle)
        points = fit + np.where(is_open, wall, inner)[:, None] * ways
        return np.stack([points[:, 0], np.where(falls & is_open, 0.0, points[:, 1])], 1)
