"""Charts are well-formed markup in the colours of the page, and contact sheets hold the
pictures.
"""

import base64
import io
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from bezoar.attacks.plan import Goal
from bezoar.evaluation.dose_response import fit_dose_response
from bezoar.evaluation.scores import Measure, proportion
from bezoar.reports import charts, metric_names, pictures
from bezoar.reports.charts import IntervalRow, Mark, Series
from bezoar.reports.dose_charts import Curve, draw_dose_response, draw_levels
from bezoar.reports.heat_maps import draw_heat_map
from bezoar.reports.page_parts import Tile
from bezoar.reports.shared_parts import encoder_strips, group_goals

HOSTILE = """</svg><script>alert('x')</script>" onload="alert(1) $\\frac{1}{$"""
DOSES = [4.0, 8.0, 16.0, 32.0, 64.0]


@pytest.mark.parametrize(
    ("key", "poisoned", "label", "unit"),
    [
        ("clean_accuracy", False, "Clean accuracy (CA)", "rate"),
        ("clean_accuracy", True, "Benign accuracy (BA)", "rate"),
        ("baseline.clean_accuracy", True, "Clean accuracy (CA)", "rate"),
        ("clean.attack_success", True, "ASR of the clean twin (ASR-B)", "rate"),
        ("poisoned.attack_success@1", True, "Attack success rate (ASR), trigger 1", "rate"),
        ("targeted_success@1", True, "Targeted success, 1 caption each", "rate"),
        ("poisoned.targeted_success@16", True, "Targeted success, 16 captions each", "rate"),
        ("transplant.recall_at_1.5n", False, "Recall among the worst 1.5 n, n = poisons", "rate"),
        ("scan.transplant.recall_at_0.001", True, "Recall among the worst 0.1\u00a0%", "rate"),
        ("image_to_text_recall@10", False, "Image to text recall@10", "rate"),
        ("expected_clean@30", False, "Expected to be clean among the worst 30", "count"),
        ("somebody's_own", False, "somebody's own", "plain"),
    ],
)
def test_labels_and_units(key: str, poisoned: bool, label: str, unit: str) -> None:
    assert metric_names.label_and_unit(key, poisoned) == (label, unit)


def test_numbers_as_text() -> None:
    assert metric_names.format_percent(0.981) == "98.1\u00a0%"
    assert metric_names.format_percent(0.00079, sign=False) == "0.079"
    assert metric_names.format_percent(0) == "0.0\u00a0%"
    assert metric_names.format_value(math.nan) == "–"
    assert metric_names.format_value(16810.0, metric_names.COUNT) == "16,810"
    counted = Measure(40, 3000, 40, 40, "counted")
    assert metric_names.format_interval(counted, metric_names.COUNT) == ""
    assert metric_names.format_measure(counted, metric_names.COUNT) == "40"
    rate = Measure(0.5, 10, 0.25, 0.75, "")
    assert metric_names.format_measure(rate) == "50.0\u00a0% [25.0\u00a0–\u2060\u00a075.0\u00a0%]"
    assert (
        metric_names.format_rate_in_full(rate)
        == "50.0\u00a0% (95 % interval 25.0\u00a0–\u2060\u00a075.0\u00a0%, n = 10)"
    )


def test_variants_of_a_metric_come_with_most_captions_first() -> None:
    keys = ["targeted_success@1", "targeted_success@16", "targeted_success_all@2", "z_std"]
    assert metric_names.variants(keys, "targeted_success") == [
        "targeted_success@16",
        "targeted_success@1",
    ]
    keys = ["attack_success@0", "attack_success@1", "attack_success_all"]
    assert metric_names.variants(keys, "attack_success") == keys[:2]


def test_goals_are_grouped_by_backdoor_and_by_number_of_captions() -> None:
    goals = [
        Goal("a", None, ("v1",), 1, "targeted"),
        Goal("b", "patch:size=6", (), 20, "backdoor"),
        Goal("c", None, ("v2",), 16, "targeted"),
        Goal("d", None, ("v3",), 1, "targeted"),
    ]
    groups = [(group.title, group.members) for group in group_goals(goals)]
    assert groups == [
        ("Patch trigger, read as “b”", [1]),
        ("1 victim, 16 captions each", [2]),
        ("2 victims, 1 caption each", [0, 3]),
    ]


def test_charts_are_markup_in_the_page_s_colours() -> None:
    measure = Measure(0.5, 20, 0.3, 0.7, "")
    drawn = [
        charts.draw_loss(np.linspace(5, 1, 5000)),
        charts.draw_curves([1, 2], [Series("a < $b", [0.1, 0.9])], "epoch"),
        charts.draw_histogram([Series("<b>", np.arange(5))], "x", Mark(2, "cut")),
        charts.draw_histogram([Series("constant", np.full(9, 0.5))], "x"),
        charts.draw_ranking([Series("r", np.arange(50) < 5), Series("s", np.arange(50) < 5)], 0.1),
        charts.draw_intervals([IntervalRow("ASR", measure, "bad")]),
        charts.draw_strips(encoder_strips([0.1, 0.3], [("badnets", 2.0)]), [Mark(1, "cut")], "x"),
    ]
    for svg in drawn:
        root = ElementTree.fromstring(svg)
        assert root.tag == "svg" and root.get("viewBox") and root.get("aria-label")
        assert "#0101" not in svg and "var(--" in svg and "http" not in svg and "DejaVu" not in svg
        assert len(svg) < 120_000


def test_ids_differ_between_charts_and_not_between_drawings() -> None:
    first, second, again = (charts.draw_loss(np.linspace(5, end, 9)) for end in (1, 2, 1))
    ids = [set(re.findall(r' id="([^"]*)"', svg)) for svg in (first, second)]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    assert first == again


def as_measures(rates: list[float]) -> list[Measure]:
    return [proportion(round(300 * rate), 300, "rate") for rate in rates]


def test_dose_charts_are_well_formed_and_escaped() -> None:
    steep, soft = [0.02, 0, 0, 0, 1, 1], [0.1, 0.1, 0.12, 0.5, 0.9, 1]
    fit = fit_dose_response([0, *DOSES], steep, 300)
    svg = draw_dose_response(
        [
            Curve(HOSTILE, [0, *DOSES], as_measures(steep), "bad", fit),
            Curve("b", [0, *DOSES], as_measures(soft)),
        ],
        f"poisons {HOSTILE}",
    )
    ElementTree.fromstring(svg)
    assert "<script" not in svg and "aria-label=" in svg
    assert "50 % success" in svg and "var(--bad)" in svg


def test_dose_charts_show_unbounded_intervals_and_fits_that_never_rise() -> None:
    z = [Measure(0.1, 3, -0.9, 1.1, "z"), Measure(4.0, 3, -math.inf, math.inf, "z")]
    unbounded = Curve("z", [0, 8], z)
    ElementTree.fromstring(draw_dose_response([unbounded], "poisons", "z", percent=False))
    never = fit_dose_response(DOSES, [0] * 5, 300)
    flat = Curve("never", DOSES, as_measures([0.0] * 5), fit=never)
    ElementTree.fromstring(draw_dose_response([flat], "poisons"))


def test_charts_of_levels_are_well_formed_and_escaped() -> None:
    series = [
        (HOSTILE, "bad", as_measures([0.1, 0.5])),
        ("b", "clean", [None, *as_measures([0.9])]),
    ]
    svg = draw_levels([HOSTILE, "x" * 40], series)
    ElementTree.fromstring(svg)
    assert "<script" not in svg
    z = [Measure(v, 3, v - 1, math.inf, "z") for v in (-1.0, 7.0)]
    ElementTree.fromstring(draw_levels(["a", "b"], [("z", "good", z)], "z", percent=False))


def test_a_heat_map_tells_its_numbers() -> None:
    values = np.array([[1.0, 0.31], [np.nan, -0.02]])
    svg = draw_heat_map(["none", "75"], ["1", "0.5"], values, ("JPEG", "resized"))
    assert "31 % at 0.5" in svg and "var(--clean)" in svg
    assert "nan" not in svg and "#0101" not in svg


def test_block_means_keep_the_mean() -> None:
    y = np.random.default_rng(0).normal(size=5003)
    x, means = charts.block_means(np.arange(5003.0), y)
    assert len(means) <= charts.MAX_POINTS and len(x) == len(means)
    width = -(-5003 // charts.MAX_POINTS)
    assert np.isclose(means[0], y[:width].mean())
    assert np.isclose(means[-1], y[(len(means) - 1) * width :].mean())


def test_a_contact_sheet_holds_the_pictures() -> None:
    images = torch.randint(0, 256, (19, 3, 8, 6), dtype=torch.uint8)
    gallery = pictures.contact_sheet(images, [Tile((i,)) for i in range(19)])
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(gallery.sheet.partition(",")[2]))))
    assert (gallery.rows, gallery.columns) == (2, 16)
    assert pixels.shape == (gallery.rows * 8, gallery.columns * 8, 3)
    y, x = divmod(17, gallery.columns)
    cell = pixels[y * 8 : y * 8 + 8, x * 8 + 1 : x * 8 + 7]
    assert np.array_equal(cell, images[17].permute(1, 2, 0))
    assert gallery.background_position(0) == "0% 0%"
    assert gallery.background_position(17) == "6.667% 100%"
    large = pictures.to_squares(torch.zeros(1, 3, 300, 200, dtype=torch.uint8))
    assert large.shape == (1, 3, pictures.MAX_SIDE, pictures.MAX_SIDE)
