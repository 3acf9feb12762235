"""The audit of changes of the whole image: its families against plain versions, what it finds in a
tower with a planted filter, what it says, what its page shows.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from auditing.toys import (
    NAMES,
    TARGET,
    Toy,
    class_directions,
    toy_classifier,
    toy_encoder,
    toy_images,
)

from bezoar import registry
from bezoar.attacks.triggers.filter import CURVES
from bezoar.auditing import forecast, image_changes, unaided_verdict, verdict_text
from bezoar.auditing.bank import Family, Sample
from bezoar.auditing.image_changes import FAMILIES
from bezoar.auditing.trigger_inversion import TowerCost
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.classifiers import Classifier
from bezoar.evaluation.verdict import Verdict
from bezoar.reports.sections import audit as audit_page

SIDE = 32


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """uint8 (6, 3, 32, 32), smooth, in the middle of the range."""
    small = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return (70 + F.interpolate(small, (SIDE, SIDE), mode="bilinear") * 110).byte()


def levels(family: str, numbers: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) after a change (P,), in levels 0..255."""
    return FAMILIES[family].change(numbers[None], images.float() / 255)[0] * 255


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_changes_nothing_at_zero_and_each_of_several_alike(name, images):
    family, x = FAMILIES[name], images.float() / 255
    count = family.count_numbers(SIDE, SIDE)
    zero = torch.zeros(1, count)
    y = family.change(zero, x)
    assert y.shape == (1, *x.shape) and torch.allclose(y[0], x, atol=1e-6)
    assert float(family.measure(zero, x, y)) < 2e-3
    t = family.spread * torch.randn(3, count, generator=torch.Generator().manual_seed(2))
    together = family.change(t, x)
    assert (together[0] - x).abs().max() > 1e-3
    for i in range(3):
        assert torch.allclose(family.change(t[i : i + 1], x)[0], together[i], atol=1e-6)
    sizes = family.measure(t, x, together)
    assert sizes.shape == (3,) and bool(
        (family.measure(2 * t, x, family.change(2 * t, x)) > sizes).all()
    )


def test_curves_make_a_photo_filter(images):
    nodes = torch.linspace(0, 1, 5)
    curves = torch.zeros(3, 7)
    curves[:, :5] = torch.tensor(CURVES["kelvin"]) / 255 - nodes
    filtered = registry.make("trigger", "filter:preset=kelvin")(images, [""] * 6).float()
    # the filter's nodes lie at 64, 128, 192 of 255, not at quarters
    assert (levels("colour", curves.flatten(), images) - filtered).abs().max() < 2
    swap = torch.zeros(3, 7)
    swap[0, 5] = 1.0  # a share of another channel
    x = images.float()
    want = (x[:, 0] + x[:, 2] - 127.5).clamp(0, 255)
    assert torch.allclose(levels("colour", swap.flatten(), images)[:, 0], want, atol=1e-3)


def test_a_kernel_makes_a_blur(images):
    kernel = torch.full((25,), 1 / 25)
    kernel[12] -= 1
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="replicate")
    blurred = F.avg_pool2d(padded, 5, stride=1)
    assert (levels("kernel", kernel, images) - blurred).abs().max() < 1e-3
    constant = torch.full((25,), 0.3)  # brightness is not for kernels
    assert (levels("kernel", constant, images) - images).abs().max() < 1e-3


def test_a_warp_reads_pixels_from_beside(images):
    mesh = torch.zeros(2, 6, 6)
    mesh[0] = 1.0  # along x, by a pixel
    moved = levels("warp", mesh.flatten(), images)
    assert (moved[..., :-1] - images[..., 1:]).abs().max() < 0.01
    assert torch.allclose(FAMILIES["warp"].measure(mesh.view(1, -1), images, images), torch.ones(1))


def test_waves_make_a_sinusoid(images):
    waves = FAMILIES["waves"]
    rows, columns = waves.periods(SIDE, SIDE)
    w = torch.zeros(3, 2, len(rows), len(columns))
    amplitude = 20 / 255  # in each of three channels; of an imaginary number, minus a sine
    place = rows.tolist().index(0), columns.tolist().index(6)
    w[:, 1, *place] = -amplitude / math.sqrt(amplitude * math.sqrt(3))
    stamped = registry.make("trigger", "sinusoid:delta=20,frequency=6")(images, [""] * 6).float()
    assert (levels("waves", w.flatten(), images) - stamped).abs().max() < 0.6  # it is rounded
    size = waves.measure(w.view(1, -1), images, images)
    assert float(size) == pytest.approx(amplitude * math.sqrt(3), abs=1e-5)


class TintedToy(Toy):
    """A toy whose vectors turn to a class as far as images are redder than they are green."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = F.normalize(self.parts(x), dim=1)
        tint = (x[:, 0] - x[:, 1]).mean((1, 2)) / 4  # x is in -2..2
        return z + 6 * torch.sigmoid(100 * (tint - 0.1))[:, None] * class_directions()[TARGET]


def tinted_encoder() -> Encoder:
    encoder = toy_encoder()
    tower = TintedToy()
    tower.load_state_dict(encoder.image.state_dict())
    encoder.image = tower
    return encoder


@pytest.fixture(scope="module")
def verdicts() -> list[Verdict]:
    """Of a tower with a planted tint, and of one without."""
    audit = registry.make("audit", "image_change:steps=40")
    return [
        audit(e, toy_images(80), 3, classifier=toy_classifier(e))
        for e in (tinted_encoder(), toy_encoder())
    ]


def judge(verdict: Verdict) -> unaided_verdict.UnaidedVerdict:
    measures = {name: m.json() for name, m in verdict.evidence.items()}
    unaided = unaided_verdict.judge_outlier(measures, json.loads(json.dumps(verdict.notes)))
    assert unaided is not None
    return unaided


def test_a_planted_tint_is_found(verdicts):
    planted, clean = verdicts
    unaided = judge(planted)
    assert unaided.grade == "strong evidence" and unaided.target == NAMES[TARGET]
    assert "a change of the colours of" in unaided.sentence and "of the range" in unaided.size
    ratios = [planted.evidence[f"{family}_ratio"].value for family in FAMILIES]
    assert planted.value == max(ratios) >= unaided.statistic > judge(clean).statistic
    assert judge(clean).grade == "none found" and "no change of the whole" in judge(clean).sentence
    colour = next(c for c in planted.notes["changes"] if c["family"] == "colour")
    assert len(colour["targets"]) == len(NAMES) and colour["targets"][0]["reached"]
    assert colour["after"].count(NAMES[TARGET]) >= 7 > colour["before"].count(NAMES[TARGET])
    least, median = (planted.evidence[f"colour_{key}"].value for key in ("least", "median"))
    assert planted.evidence["colour_ratio"].value == pytest.approx(math.log(median / least))
    assert planted.evidence["colour_success"].value >= 0.85


def test_its_page_shows_images_before_and_after(verdicts):
    audit = {
        "name": "image_change",
        "evidence": {name: m.json() for name, m in verdicts[0].evidence.items()},
        "notes": json.loads(json.dumps(verdicts[0].notes)),
    }
    table = audit_page.target_parts(audit)[0]
    assert [row[0] for row in table.rows] == list(FAMILIES)
    colour = table.rows[0]
    assert colour[1] == NAMES[TARGET] and colour[5].endswith(f"of {len(NAMES)}")
    galleries = audit_page.change_galleries([audit], toy_images(6).images)
    assert any("colour, towards" in g.title for g in galleries)
    changed = next(g for g in galleries if "colour" in g.title)
    assert len(changed.tiles) == 6 and changed.tiles[0].lines[1].text == NAMES[TARGET]
    audit["notes"]["changes"][0]["numbers"] = [[10**6, 1.0]]
    assert len(audit_page.change_galleries([audit], toy_images(6).images)) == len(galleries) - 1


@pytest.mark.parametrize(
    "pairs", [None, "ab", [1], [[0]], [["0", 1.0]], [[-1, 1.0]], [[0, math.nan]], [[True, 1.0]]]
)
def test_numbers_of_a_file_are_checked(pairs):
    assert image_changes.restore_numbers(FAMILIES["kernel"], pairs, SIDE, SIDE) is None
    numbers = image_changes.restore_numbers(FAMILIES["kernel"], [[3, 0.5]], SIDE, SIDE)
    assert numbers is not None and numbers.nonzero().tolist() == [[0, 3]]


def test_a_search_that_would_take_too_long_is_left_out():
    encoder = toy_encoder()
    audit = registry.make("audit", "image_change:most=1")
    verdict = audit(encoder, toy_images(), 3, classifier=toy_classifier(encoder))
    assert verdict.value == 0 and "would take too long" in verdict.notes["limits"][0]
    assert unaided_verdict.judge_outlier({}, verdict.notes) is None
    family, sample = Family("toy", 16, "", ""), Sample("toys", 48)
    for cost, text in ((TowerCost(224, 8e8), "nothing, because"), (TowerCost(16, 1e5), "strong")):
        default = registry.make("audit", "image_change")
        lines = forecast.forecast_audits([default], [], family, sample, 0.05, 1.0, 1000, cost)
        assert lines[0].startswith(f"image_change: {text}")
        assert (default.image_passes(512, 1000, cost) == 0) == (text != "strong")


def test_every_image_is_counted():
    audit = registry.make("audit", "image_change")
    search = 60 * (2 * 12 + 64 // 5)
    assert audit.image_passes(100, 10, TowerCost(16, 1e5)) == 4 * 10 * (search + 2 * 100)


def test_two_classes_cannot_be_compared():
    encoder = toy_encoder()
    head = Classifier(encoder, lambda z: z[:, :2], ("a", "b"), "two")
    with pytest.raises(UserError, match="and 3 are needed"):
        registry.make("audit", "image_change")(encoder, toy_images(), 0, classifier=head)


def test_what_it_does_not_look_for_is_said():
    facts = {"name": "image_change", "audit": "image_change", "words": "no calibration"}
    assert "patches, pictures" in verdict_text._uncovered_attacks({**facts, "unaided": {"p": 1}})
    assert "no verdict" in verdict_text._uncovered_attacks({**facts, "unaided": None})
