"""False discoveries: calibrated on mixtures whose truth is known, honest where nothing can be said; what the page shows."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.linear_model import PoissonRegressor

from bezoar.detection import reliability
from bezoar.detection.reliability import false_discoveries
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.reports import record_tiles

NULLS = {  # clean records' scores: light, exponential and bounded tails, skewed either way
    "normal": scipy.stats.norm(),
    "logistic": scipy.stats.logistic(),
    "gumbel": scipy.stats.gumbel_r(),
    "exponential": scipy.stats.expon(),
    "gamma": scipy.stats.gamma(2),
    "chi": scipy.stats.chi(20),
}


def mixture(name: str, n: int, rate: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and truth; poisons lie about the clean records' 99.9 % point."""
    null, rng, m = NULLS[name], np.random.default_rng(seed), round(rate * n)
    bad = null.ppf(0.99) + (null.ppf(0.999) - null.ppf(0.9)) * rng.normal(1, 0.5, m)
    return np.concatenate([null.rvs(n - m, random_state=rng), bad]), np.arange(n) >= n - m


@pytest.mark.parametrize("name", NULLS)
def test_by_tail_holds_the_truth_over_mixtures(name: str) -> None:
    held = total = 0
    for seed in range(2):
        for n, rate in ((4000, 0.0), (4000, 0.01), (12000, 0.003), (12000, 0.03)):
            values, truth = mixture(name, n, rate, seed)
            order = np.argsort(-values)
            found = false_discoveries.by_tail(values, false_discoveries.depths(n))
            assert not found.why
            for at, m in zip(found.n, found.counts, strict=True):
                clean = int((~truth[order[:at]]).sum())
                held += m.low - 1e-9 <= clean <= m.high + 1e-9
                total += 1
                assert 0 <= m.low <= m.value <= m.high <= at == m.n
    assert held >= 0.9 * total, (name, held, total)


def test_by_tail_tells_a_flood_from_chance() -> None:
    clean, flooded = (mixture("gumbel", 20000, rate, 0)[0] for rate in (0.0, 0.03))
    at = (200,)
    assert false_discoveries.by_tail(clean, at).counts[0].high == 200
    assert false_discoveries.by_tail(flooded, at).counts[0].high < 60


def test_by_tail_does_not_depend_on_order_or_scale() -> None:
    values, _ = mixture("gamma", 3000, 0.01, 1)
    one = false_discoveries.by_tail(values, (30, 90)).counts
    other = false_discoveries.by_tail(
        7 * np.random.default_rng(0).permutation(values) - 3, (30, 90)
    ).counts
    for a, b in zip(one, other, strict=True):
        assert [a.value, a.low, a.high] == pytest.approx(
            [b.value, b.low, b.high], rel=0.02, abs=0.5
        )


def test_by_tail_says_when_it_cannot_say() -> None:
    rng = np.random.default_rng(0)
    assert "needs 1000" in false_discoveries.by_tail(rng.normal(size=500), (5,)).why
    assert (
        "one and the same"
        in false_discoveries.by_tail(rng.integers(0, 9, 5000).astype(float), (5,)).why
    )
    assert "one and the same" in false_discoveries.by_tail(np.ones(5000), (5,)).why
    assert false_discoveries.by_tail(
        np.concatenate([rng.normal(size=4600), np.full(400, 9.0)]), (5,)
    ).why
    assert "heavier" in false_discoveries.by_tail(np.exp(rng.exponential(0.8, 20000)), (20,)).why
    assert (
        "%" in false_discoveries.Expected("tail").assumption
        and "random sample" in false_discoveries.Expected("reference").assumption
    )


def test_the_fit_is_a_poisson_regression() -> None:
    counts = (
        np.random.default_rng(0)
        .poisson(50 * np.exp(-2 * np.linspace(0, 1, 30)))[None]
        .astype(float)
    )
    x = (np.arange(30) + 0.5) / 30
    beta, variance = false_discoveries.fitted(counts, x, 2)
    model = PoissonRegressor(alpha=0, tol=1e-10, max_iter=5000).fit(
        false_discoveries.powers(x, 2)[:, 1:], counts[0]
    )
    assert beta[0] == pytest.approx([model.intercept_, *model.coef_], rel=1e-3, abs=1e-3)
    assert (np.diag(variance[0]) > 0).all()


def test_beyond_is_the_integral_of_the_density() -> None:
    counts = np.concatenate(
        [np.exp(5 - 3 * (np.arange(false_discoveries.BINS) + 0.5) / false_discoveries.BINS)[None]]
        * 2
    )
    shoulder = false_discoveries.Shoulder(0.0, 1.0, counts)
    at = np.array([1.0, 1.5, 2.0])
    exact = np.exp(5 - 3 * at) / 3 * false_discoveries.BINS
    for degree in (1, 2, 3):
        assert shoulder.beyond(degree, at)[0] == pytest.approx(exact, rel=0.02)


def test_a_reference_bounds_the_clean_among_the_worst() -> None:
    held = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        values = np.concatenate([rng.standard_t(2, 5200), rng.normal(6, 1, 50)])
        known = np.arange(5250) < 200
        found = false_discoveries.by_reference(values, known, (60,))
        worst_rows = 200 + np.argsort(-values[200:])[:60]
        held += int((worst_rows < 5200).sum()) <= found.counts[0].high + 1e-9
    assert held >= 38
    few = false_discoveries.by_reference(values, np.arange(5250) < 5, (60,))
    assert "at least 20" in few.why
    m = false_discoveries.by_reference(np.arange(1000.0), np.arange(1000) % 2 == 0, (100,)).counts[
        0
    ]
    low, high = scipy.stats.binomtest(100, 500).proportion_ci(method="exact")
    assert (m.low, m.high) == pytest.approx((500 * low, min(100, 500 * high)), rel=0.03)


def test_several_detectors_count_each_record_for_its_worst_one() -> None:
    ids = tuple(f"{i:05d}" for i in range(6000))
    one, truth = mixture("gumbel", 6000, 0.02, 0)
    two = np.random.default_rng(5).normal(size=6000)
    found = {
        "one": Scores(ids, torch.from_numpy(one).float()),
        "two": Scores(ids, torch.from_numpy(two).float()),
    }
    from bezoar.detection.merging import merge

    merged = merge(list(found.values()))
    many = false_discoveries.expected(merged, found, [180])
    assert 180 in many.n and not many.why
    order = merged.ranking()
    for at, m in zip(many.n, many.counts, strict=True):
        assert m.low - 1e-9 <= int((~truth[order[:at]]).sum()) <= m.high + 1e-9
    alone = false_discoveries.expected(found["one"], {"one": found["one"]})
    assert alone == false_discoveries.by_tail(
        found["one"].values.double().numpy(), false_discoveries.depths(6000)
    )
    coarse = found | {"flat": Scores(ids, torch.zeros(6000))}
    assert [
        m.value
        for m in false_discoveries.expected(merge(list(coarse.values())), coarse, [180]).counts
    ] == pytest.approx(
        [m.value for m in many.counts]
    )  # a detector that finds all alike finds nobody worst
    steps = found | {"two": Scores(ids, torch.from_numpy(two).round())}
    merged = merge(list(steps.values()))
    half = false_discoveries.expected(merged, steps, [180])
    assert (
        not half.why
        and half.mute[0].startswith("two: ")
        and "What two finds worst counts as ordinary" in half.assumption
    )
    order = merged.ranking()
    for at, m in zip(half.n, half.counts, strict=True):
        assert m.low - 1e-9 <= int((~truth[order[:at]]).sum()) <= m.high + 1e-9
    none = {k: Scores(ids, torch.from_numpy(np.round(s.values.numpy()))) for k, s in steps.items()}
    assert (
        false_discoveries.expected(merge(list(none.values())), none).why.count(
            "one and the same score"
        )
        == 2
    )


def test_trusted_records_come_from_a_file(tmp_path: Path) -> None:
    ids = tuple(f"r{i}" for i in range(2000))
    merged = Scores(ids, torch.randn(2000, generator=torch.Generator().manual_seed(0)))
    (tmp_path / "clean.txt").write_text("\n".join(ids[:300]) + "\nunknown\n")
    metrics, told = reliability.discoveries(merged, {}, str(tmp_path / "clean.txt"))
    assert told["discovery"]["how"] == "reference" and all(
        k.startswith("expected_clean@") for k in metrics
    )
    (tmp_path / "none.txt").write_text("somebody else\n")
    for name, match in (("none.txt", "names none"), ("gone.txt", "no list of clean records")):
        with pytest.raises(UserError, match=match):
            reliability.discoveries(merged, {}, str(tmp_path / name))


def test_windows_are_kept_and_drawn(tmp_path: Path) -> None:
    assert reliability.read_windows(tmp_path) == {}
    reliability.write_windows(tmp_path, ("a", "ü"), torch.tensor([[1, 2, 4, 3], [-5, 0, 99, 99]]))
    held = reliability.read_windows(tmp_path)
    assert held == {"a": (1, 2, 4, 3), "ü": (-5, 0, 99, 99)}
    image = torch.zeros(3, 10, 10, dtype=torch.uint8)
    drawn = record_tiles.draw_frame(image, held["a"])
    frame = torch.zeros(10, 10, dtype=torch.bool)
    frame[1:5, 2:5] = True
    frame[2:4, 3:4] = False
    assert (
        torch.equal(drawn[0] > 0, frame)
        and not image.any()
        and record_tiles.draw_frame(image, None) is image
    )
    assert record_tiles.draw_frame(image, held["ü"]).shape == image.shape
    (tmp_path / "windows.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="holds no windows"):
        reliability.read_windows(tmp_path)
