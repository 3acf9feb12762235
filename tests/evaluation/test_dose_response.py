"""Laws, pooled points and contrasts against plain loops, scipy, scikit-learn and closed forms;
intervals by coverage.
"""

import math

import numpy as np
import pytest
from scipy import stats as reference
from scipy.optimize import brentq, minimize, minimize_scalar

from bezoar.errors import UserError
from bezoar.evaluation import dose_response, stats
from bezoar.evaluation.dose_response import (
    Contrast,
    difference,
    fit_dose_response,
    judge,
    pool_readings,
    trend,
)
from bezoar.evaluation.scores import Measure, proportion

DOSES = [4.0, 8.0, 16.0, 32.0, 64.0]


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def plain(doses, rates, trials, floor: float, penalty: float):
    """The same likelihood, one unit after another: (ln x50, slope) -> value."""

    def value(middle: float, slope: float) -> float:
        total, info = 0.0, np.zeros((2, 2))
        for x, r, n in zip(doses, rates, trials, strict=True):
            s = logistic(slope * (math.log(x) - middle))
            p = min(max(floor + (1 - floor) * s, 1e-300), 1 - 1e-16)
            total += r * n * math.log(p) + (1 - r) * n * math.log1p(-p)
            row = np.array([1.0, math.log(x)])
            info += n * ((1 - floor) * s * (1 - s)) ** 2 / (p * (1 - p)) * np.outer(row, row)
        return total + (
            penalty / 2 * math.log(max(np.linalg.det(info), 1e-300)) if penalty else 0.0
        )

    return value


def simulated(seed: int, slope: float, x50: float, n: int, noise: float, repeats: int = 3):
    """Units of readings whose logits differ by normal noise."""
    rng = np.random.default_rng(seed)
    x = np.tile(DOSES, repeats)
    eta = slope * np.log(x / x50) + noise * rng.normal(size=len(x))
    return x, rng.binomial(n, 1 / (1 + np.exp(-eta))) / n


@pytest.mark.parametrize(
    ("rates", "n", "floor"),
    [
        ([0, 0.1, 0.4, 0.8, 1.0] * 2, 10, 0.0),
        ([0, 0, 0, 1, 1], 12, 0.0),
        ([0.1, 0.1, 0.3, 0.8, 1.0, 0.05, 0.15, 0.45, 0.7, 0.9], 40, 0.1),
        ([0, 0, 0.2, 0.9, 1, 0, 0.1, 0.7, 1, 1, 0, 0, 0.4, 0.6, 1], 50, 0.0),  # readings differ
    ],
)
def test_estimate_is_the_highest_penalised_likelihood(rates, n, floor):
    doses, trials = np.resize(DOSES, len(rates)), [n] * len(rates)
    curve = fit_dose_response(doses, rates, n, floor)
    value = plain(doses, rates, trials, floor, curve.phi)
    best = min(
        (
            minimize(lambda p: -value(*p), (math.log(20), s), method="Nelder-Mead", tol=1e-9)
            for s in (1, 5)
        ),
        key=lambda r: r.fun,
    )
    assert math.log(curve.x50.value) == pytest.approx(best.x[0], abs=1e-4)
    assert curve.slope.value == pytest.approx(best.x[1], rel=1e-3)


def test_profile_intervals_are_those_of_plain_likelihood():
    rates, n = [0, 0.1, 0.4, 0.8, 1.0] * 2, 10
    curve = fit_dose_response(DOSES * 2, rates, n)
    value = plain(DOSES * 2, rates, [n] * 10, 0.0, 0.0)
    peak = -minimize(lambda p: -value(*p), (math.log(20), 2), method="Nelder-Mead", tol=1e-9).fun
    drop = curve.phi * reference.f.ppf(0.95, 1, curve.df) / 2

    def lost_at_middle(m: float) -> float:
        return peak - drop - value(m, minimize_scalar(lambda s: -value(m, s), (0.5, 3)).x)

    def lost_at_slope(s: float) -> float:
        return peak - drop - value(minimize_scalar(lambda m: -value(m, s), (2.5, 3.5)).x, s)

    middle, slope = math.log(curve.x50.value), curve.slope.value
    ends = [brentq(lost_at_middle, middle - 1, middle), brentq(lost_at_middle, middle, middle + 1)]
    assert np.log([curve.x50.low, curve.x50.high]) == pytest.approx(ends, abs=2e-4)
    ends = [brentq(lost_at_slope, 0.2, slope), brentq(lost_at_slope, slope, 3 * slope)]
    assert [curve.slope.low, curve.slope.high] == pytest.approx(ends, rel=1e-3)


def test_many_trials_agree_with_unpenalised_regression_and_its_errors():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x, n = np.repeat(np.geomspace(1, 1000, 10), 4), 5000
    hits = rng.binomial(n, 1 / (1 + np.exp(-1.3 * np.log(x / 60))))
    curve = fit_dose_response(x, hits / n, n)
    u = np.log(np.tile(x, 2))[:, None]
    fitted = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(
        u, np.repeat([1, 0], len(x)), np.concatenate([hits, n - hits])
    )
    slope, middle = fitted.coef_[0, 0], -fitted.intercept_[0] / fitted.coef_[0, 0]
    assert curve.slope.value == pytest.approx(slope, rel=1e-4)
    assert math.log(curve.x50.value) == pytest.approx(middle, abs=1e-4)
    p = 1 / (1 + np.exp(-slope * (np.log(x) - middle)))
    design = np.stack([np.ones_like(x), np.log(x)], 1)
    covariance = np.linalg.inv((design.T * (n * p * (1 - p))) @ design)
    gradient = np.array([-1 / slope, -middle / slope])  # of -level / slope
    reach = reference.t.ppf(0.975, curve.df) * math.sqrt(curve.phi)
    width = math.log(curve.x50.high / curve.x50.low) / 2
    assert width == pytest.approx(reach * math.sqrt(gradient @ covariance @ gradient), rel=0.01)
    assert (curve.slope.high - curve.slope.low) / 2 == pytest.approx(
        reach * math.sqrt(covariance[1, 1]), rel=0.01
    )


def test_band_and_doses_are_two_views_of_one_region():
    curve = fit_dose_response(DOSES * 2, [0, 0.1, 0.4, 0.8, 1.0] * 2, 10)
    for success in (0.1, 0.5, 0.9):
        dose = curve.dose(success)
        at = curve.predict([dose.value, dose.low, dose.high])
        assert at[0][0] == pytest.approx(success)
        assert at[2][1] == pytest.approx(
            success, abs=1e-3
        )  # where the upper end of the band gets there
        assert at[1][2] == pytest.approx(success, abs=1e-3)
    value, low, high = curve.predict(np.geomspace(1, 500, 40))
    assert (low <= value).all() and (value <= high).all() and (np.diff(value) > 0).all()
    assert curve.x50 == curve.dose(0.5)


def test_a_step_leaves_open_what_it_does_not_tell():
    curve = fit_dose_response(DOSES * 3, [0, 0, 0, 1, 1] * 3, 100)
    assert (curve.x50.low, curve.x50.high) == (
        pytest.approx(16, rel=0.01),
        pytest.approx(32, rel=0.01),
    )
    assert (
        16 < curve.x50.value < 32
        and math.isfinite(curve.slope.value)
        and curve.slope.high == math.inf
    )
    assert curve.describe().startswith("50 % success at 23 poisons (16 .. 32), slope at least ")
    never = fit_dose_response(DOSES * 3, [0] * 15, 100)
    assert (never.x50.value, never.x50.high) == (
        math.inf,
        math.inf,
    ) and never.x50.low == pytest.approx(64, rel=0.01)
    assert never.describe() == "50 % success not reached up to 64 poisons (64 .. ∞)"
    always = fit_dose_response(DOSES * 3, [1] * 15, 100)
    assert (always.x50.value, always.x50.low) == (0, 0) and always.x50.high == pytest.approx(
        4, rel=0.01
    )
    assert always.describe("captions") == "50 % success with fewer than 4 captions (0 .. 4)"
    half = fit_dose_response(DOSES * 3, [0.5] * 15, 100)
    assert (half.x50.low, half.x50.high, half.slope.low) == (0, math.inf, 0)
    assert half.describe() == "50 % success cannot be placed by 15 readings with 4 to 64 poisons"
    assert (
        fit_dose_response(DOSES, [0.9, 0.6, 0.4, 0.3, 0.1], 50).slope.value == 0
    )  # more poison never helps less


@pytest.mark.filterwarnings("error")
def test_any_data_give_an_estimate_inside_its_interval():
    rng = np.random.default_rng(5)
    for i in range(40):
        x = np.tile(
            np.geomspace(1, rng.choice([1.5, 20, 1e5]), rng.integers(3, 7)), rng.integers(1, 4)
        )
        n, floor = int(rng.choice([1, 5, 500, 100_000])), float(rng.choice([0, 0.1, 0.5]))
        chance = [rng.random(len(x)), (rng.random(len(x)) < 0.5) * 1.0, (x > np.median(x)) * 1.0][
            i % 3
        ]
        curve = fit_dose_response(x, rng.binomial(n, floor + (1 - floor) * chance) / n, n, floor)
        for m in (curve.x50, curve.slope, curve.dose(0.9)):
            assert m.low <= m.value * (1 + 1e-9) and m.value <= m.high * (1 + 1e-9)
        value, low, high = curve.predict(np.r_[0, x])
        assert (low <= value + 1e-9).all() and (value <= high + 1e-9).all()


def test_floor_is_the_success_measured_without_poison():
    rates = [0.1, 0.1, 0.12, 0.5, 0.9, 1.0]
    curve = fit_dose_response([0, *DOSES], rates, 200)
    assert curve.floor == 0.1 and curve.units == 5 and curve.doses == (4, 64)
    assert curve.x50 == fit_dose_response(DOSES, rates[1:], 200, 0.1).x50
    assert curve.predict([0.0, curve.x50.value])[0] == pytest.approx([0.1, 0.55])
    assert "counted from the 10 % without poison" in curve.describe()
    assert fit_dose_response(DOSES, rates[1:], 200).floor == 0


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="3 readings at 2 doses above 0; there are 2 at 2"):
        fit_dose_response([0, 4, 8], [0, 0, 1], 10)
    with pytest.raises(UserError, match="there are 3 at 1"):
        fit_dose_response([4, 4, 4], [0, 0, 1], 10)
    with pytest.raises(UserError, match="below 1"):
        fit_dose_response([0, *DOSES], [1.0] * 6, 10)
    for doses, rates, trials in (
        ([-1, 2, 3], [0, 0, 1], 5),
        ([1, 2, 3], [0, 0, 1.1], 5),
        ([1, 2, 3], [0, np.nan, 1], 5),
    ):
        with pytest.raises(ValueError):
            fit_dose_response(doses, rates, trials)
    with pytest.raises(ValueError):
        fit_dose_response(DOSES, [0, 0, 0, 1, 1], 10).dose(1.0)


@pytest.mark.parametrize(
    ("slope", "n", "noise", "least"),
    [(2.0, 200, 0.7, 0.85), (4.0, 500, 0.7, 0.85), (30.0, 500, 0.0, 0.85), (2.0, 10, 0.0, 0.85)],
)
def test_interval_of_x50_covers(slope, n, noise, least):
    covered = []
    for seed in range(40):
        m = fit_dose_response(*simulated(seed, slope, 18.0, n, noise), n).x50
        covered.append(m.low <= 18 <= m.high)
    assert np.mean(covered) >= least  # 95 % of 40 is 38 +- 1.4


def test_pooled_is_a_mean_over_readings():
    rates = [proportion(k, 50, "hits") for k in (20, 30, 45)]
    m = pool_readings(rates, "ASR")
    values = np.array([0.4, 0.6, 0.9])
    half = reference.t.ppf(0.975, 2) * values.std(ddof=1) / math.sqrt(3)
    assert (m.value, m.n, m.low, m.high) == (
        pytest.approx(values.mean()),
        150,
        pytest.approx(max(0, values.mean() - half)),
        1,
    )
    assert "mean of 3 readings" in m.how
    same = pool_readings([proportion(50, 50, "hits")] * 3, "ASR")
    assert (same.value, same.low, same.high) == (1, stats.wilson_interval(150, 150)[0], 1)
    one = pool_readings(rates[:1], "ASR")
    assert (one.value, one.n, one.low, one.high) == (0.4, 50, rates[0].low, rates[0].high)
    z = pool_readings([Measure(v, 50, v - 1, v + 1, "z") for v in (2.0, 4.0)], "z", rate=False)
    assert (z.low, z.high) == pytest.approx(stats.mean_interval([2.0, 4.0])) and z.low < 0
    with pytest.raises(ValueError, match=r"inside 0\.\.1"):
        pool_readings([Measure(2.0, 5, 1, 3, "z")] * 2, "z")
    with pytest.raises(UserError):
        pool_readings([], "ASR")


def test_differences_are_those_of_student_and_welch():
    a, b = [0.7, 0.8, 0.9, 0.75], [0.5, 0.65, 0.6, 0.7]
    for contrast, test in (
        (difference(a, b, True), reference.ttest_rel(a, b)),
        (difference(a, b, False), reference.ttest_ind(a, b, equal_var=False)),
        (difference(a, b[:3], False), reference.ttest_ind(a, b[:3], equal_var=False)),
    ):
        ends = test.confidence_interval(0.95)
        assert (contrast.low, contrast.high) == pytest.approx((ends.low, ends.high))
    error = np.std(np.subtract(a, b), ddof=1) / 2
    assert difference(a, b, True).detectable == pytest.approx(
        (reference.t.ppf(0.975, 3) + reference.t.ppf(0.8, 3)) * error
    )
    assert difference(a, b, True, trials=10_000).low == pytest.approx(
        difference(a, b, True).low
    )  # readings vary more


@pytest.mark.parametrize("between", [0.0, 0.01, 0.05])
def test_an_interval_of_few_readings_of_many_trials_holds_the_truth(between):
    rng, trials, held, widths = np.random.default_rng(3), 2000, 0, []
    for _ in range(400):
        a, b = (
            rng.binomial(trials, np.clip(0.6 + between * rng.normal(size=3), 0, 1)) / trials
            for _ in range(2)
        )
        contrast = difference(list(a), list(b), True, trials=trials)
        held += contrast.low <= 0 <= contrast.high
        widths.append(contrast.high - contrast.low)
    assert held >= 0.94 * 400, "never short of Student's t, nor of the binomial error"
    floor = 2 * 1.96 * math.sqrt(2 * 0.24 / (3 * trials))
    assert min(widths) >= 0.97 * floor


def test_readings_that_happen_to_agree_leave_the_binomial_error_and_no_more():
    contrast = difference([0.5, 0.501, 0.499], [0.5, 0.501, 0.499], True, trials=5000)
    low, high = stats.wilson_interval(7500, 15000)
    assert (
        contrast.high == pytest.approx((high - low) / math.sqrt(2), rel=1e-3)
        and "allows for more" in contrast.how
    )
    assert judge(contrast, "same", 0.02) == "confirmed"


def test_no_spread_at_the_ends_is_not_certainty():
    sure = difference([1.0] * 3, [1.0] * 3, True, trials=200)
    assert (
        sure.value == 0
        and -0.1 < sure.low < 0 < sure.high < 0.1
        and sure.detectable > 0
        and "binomial" in sure.how
    )
    blind = difference([1.0] * 3, [1.0] * 3, False)
    assert (blind.low, blind.high, blind.detectable) == (-math.inf, math.inf, math.inf)
    assert judge(blind, "same", 0.1) == "undecided"
    shifted = difference([0.3, 0.7], [0.1, 0.5], True)  # equal differences up to rounding
    assert shifted.low == -math.inf
    whole = difference([1.0] * 3, [0.0] * 3, True, trials=50)
    assert whole.low > 0.8 and whole.high == 1 and judge(whole, "+") == "confirmed"
    alone = difference([1.0], [0.0], True, trials=50)
    assert (alone.low, alone.high) == (-1, 1) and judge(alone, "+") == "undecided"
    with pytest.raises(UserError, match="as many if paired"):
        difference([1.0], [0.0, 1.0], True)


def test_detectable_is_found_four_times_in_five():
    rng = np.random.default_rng(0)
    noise, seeds = 1.0, 12
    error = noise * math.sqrt(2 / seeds)
    effect = (reference.t.ppf(0.975, seeds - 1) + reference.t.ppf(0.8, seeds - 1)) * error
    pairs = effect + rng.normal(size=(4000, seeds)) * noise - rng.normal(size=(4000, seeds)) * noise
    power = np.mean(
        [judge(difference(list(p), [0.0] * seeds, True), "+") == "confirmed" for p in pairs[:1000]]
    )
    assert power == pytest.approx(0.8, abs=0.05)
    detectable = np.mean([difference(list(p), [0.0] * seeds, True).detectable for p in pairs[:200]])
    assert detectable == pytest.approx(effect, rel=0.05)


def test_trend_is_least_squares_on_doublings():
    rng = np.random.default_rng(1)
    x = np.repeat([1, 2, 4, 8, 16], 3)
    y = 0.1 * np.log2(x) + 0.05 * rng.normal(size=15)
    contrast, line = trend(x, y), reference.linregress(np.log2(x), y)
    half = reference.t.ppf(0.975, 13) * line.stderr
    assert (contrast.value, contrast.low, contrast.high) == pytest.approx(
        (line.slope, line.slope - half, line.slope + half)
    )
    assert contrast.detectable == pytest.approx(
        (reference.t.ppf(0.975, 13) + reference.t.ppf(0.8, 13)) * line.stderr
    )
    assert judge(contrast, "+") == "confirmed" and judge(contrast, "-") == "contradicted"
    flat = trend(x, np.ones(15), trials=100)
    assert flat.value == 0 and 0 < flat.high < 0.05 and trend(x, np.ones(15)).high == math.inf
    assert trend(x, 3 * np.log2(x)).low == -math.inf  # no spread about the line: rounding is none
    with pytest.raises(UserError, match="3 readings at 2 places"):
        trend([1, 1, 1], [0, 1, 2])
    with pytest.raises(ValueError):
        trend([0, 1, 2], [0, 1, 2])


@pytest.mark.parametrize(
    ("low", "high", "plus", "minus", "same"),
    [
        (0.1, 0.3, "confirmed", "contradicted", "undecided"),
        (-0.3, -0.1, "contradicted", "confirmed", "undecided"),
        (-0.1, 0.1, "undecided", "undecided", "confirmed"),
        (0.05, 0.1, "confirmed", "contradicted", "confirmed"),
        (0.3, 0.4, "confirmed", "contradicted", "contradicted"),
        (-0.4, -0.3, "contradicted", "confirmed", "contradicted"),
        (-0.5, 0.5, "undecided", "undecided", "undecided"),
        (math.nan, math.nan, "undecided", "undecided", "undecided"),
    ],
)
def test_judge(low, high, plus, minus, same):
    contrast = Contrast((low + high) / 2, low, high, 5, 0.1, "")
    assert [judge(contrast, "+"), judge(contrast, "-"), judge(contrast, "same", 0.2)] == [
        plus,
        minus,
        same,
    ]


def test_judge_needs_a_claim():
    contrast = Contrast(0, -1, 1, 5, 0.1, "")
    with pytest.raises(ValueError, match="margin above 0"):
        judge(contrast, "same")
    with pytest.raises(ValueError, match="expected must be"):
        judge(contrast, "more")  # type: ignore[arg-type]


def test_numbers_are_for_reading():
    assert [dose_response._format_dose(v) for v in (math.inf, 1e48, 1234.4, 41.2, 0.034)] == [
        "∞",
        "over 10 million",
        "1,234",
        "41",
        "0.034",
    ]
