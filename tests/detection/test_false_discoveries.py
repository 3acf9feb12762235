"""False discoveries by a sample of clean records, on mixtures whose truth is known; what the page
shows.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

from bezoar.detection import reliability
from bezoar.detection.reliability import false_discoveries
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.reports import record_tiles, reliability_sections


def test_a_sample_of_clean_records_bounds_the_clean_among_the_worst() -> None:
    held = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        values = np.concatenate([rng.standard_t(2, 5200), rng.normal(6, 1, 50)])
        sample = np.arange(5250) < 200
        estimate = false_discoveries.estimate_clean(values, sample, (60,))
        worst_rows = 200 + np.argsort(-values[200:])[:60]
        held += int((worst_rows < 5200).sum()) <= estimate.counts[0].high + 1e-9
    assert held >= 38
    few = false_discoveries.estimate_clean(values, np.arange(5250) < 5, (60,))
    assert "at least 20" in few.why and few.counts == ()


def test_the_interval_is_exact() -> None:
    values = np.arange(1000.0)
    m = false_discoveries.estimate_clean(values, values % 2 == 0, (100,)).counts[0]
    low, high = scipy.stats.binomtest(100, 500).proportion_ci(method="exact")
    assert (m.low, m.high) == pytest.approx((500 * low, min(100, 500 * high)), rel=0.03)
    assert m.low <= m.value <= m.high <= m.n == 100


def test_few_shares_of_the_records_are_reported() -> None:
    assert false_discoveries.reported_counts(1000) == (1, 3, 10, 20, 30, 50)
    assert false_discoveries.reported_counts(1000, [0, 7, 60]) == (1, 3, 7, 10, 20, 30, 50)
    assert false_discoveries.reported_counts(10) == (1,)


def test_trusted_records_come_from_a_file(tmp_path: Path) -> None:
    ids = tuple(f"r{i}" for i in range(2000))
    merged = Scores(ids, torch.randn(2000, generator=torch.Generator().manual_seed(0)))
    (tmp_path / "clean.txt").write_text("\n".join(ids[:300]) + "\nunknown\n")
    estimate = false_discoveries.estimate_from_file(merged, str(tmp_path / "clean.txt"), [4])
    plain = false_discoveries.estimate_clean(
        merged.values.double().numpy(),
        np.arange(2000) < 300,
        false_discoveries.reported_counts(1700, [4]),
    )
    assert estimate == plain and 4 in estimate.n
    (tmp_path / "none.txt").write_text("somebody else\n")
    for name, match in (("none.txt", "names none"), ("gone.txt", "no list of clean records")):
        with pytest.raises(UserError, match=match):
            false_discoveries.estimate_from_file(merged, str(tmp_path / name))


def test_a_scan_reports_the_estimate_only_with_trusted_records(tmp_path: Path) -> None:
    ids = tuple(f"r{i}" for i in range(2000))
    merged = Scores(ids, torch.randn(2000, generator=torch.Generator().manual_seed(0)))
    trusted = tmp_path / "clean.txt"
    trusted.write_text("\n".join(ids[:300]))
    plan = SimpleNamespace(edits=(), mask=lambda ids: np.zeros(len(ids), bool))
    scanned = None, SimpleNamespace(plan=plan), SimpleNamespace(ids=ids), merged, np.arange(60)
    assert reliability.measure_ranking(*scanned, False, "") == ({}, {})
    measures, notes = reliability.measure_ranking(*scanned, False, str(trusted))
    assert set(notes) == {"discovery"} and "expected_clean@60" in measures
    assert all(name.startswith("expected_clean@") for name in measures)
    section = reliability_sections.false_discovery_section(measures, notes["discovery"], None, 60)
    assert "Of the worst 60 records" in str(section)


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
