"""Verdicts without a bank: the statistic, the three words, what they are called among banks, what
an audit announces.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from auditing.toys import (
    NAMES,
    PATCH_CORNER,
    PATCH_SIDE,
    SIDE,
    TARGET,
    class_directions,
    planted_patch,
    toy_classifier,
    toy_encoder,
    toy_images,
)

from bezoar import registry
from bezoar.auditing import forecast, norm_outliers, unaided_verdict, verdict_text
from bezoar.auditing.bank import Bank, Calibration, Entry, Family, Sample, code_hash
from bezoar.auditing.findings import AuditFindings
from bezoar.auditing.trigger_inversion import TowerCost
from bezoar.auditing.unaided_verdict import SOME, STRONG, SURE_P, judge_outlier, outlier_statistic
from bezoar.evaluation.verdict import Verdict
from bezoar.reports.sections import audit as audit_page

SMALL, LARGE = TowerCost(32, 5e7), TowerCost(224, 8e8)


def evidence(ratio: float, p: float) -> dict[str, dict[str, float]]:
    values = {"log_ratio": ratio, "outlier_p": p, "least_norm": 1.1, "median_norm": 32.9}
    values["concentration"] = 0.2
    return {name: {"value": value} for name, value in {**values, "success": 0.97}.items()}


def notes(unreached: int = 0, **more: object) -> dict[str, object]:
    targets = [{"target": str(i)} for i in range(10)]
    names = [str(i) for i in range(unreached)]
    return {"unaided": True, "target": "7", "targets": targets, "unreached": names, **more}


def test_the_statistic_by_hand():
    assert outlier_statistic(1.5, SURE_P / 10, 0.0) == 1.5
    assert outlier_statistic(1.5, math.sqrt(SURE_P), 0.1) == pytest.approx(0.75)
    assert outlier_statistic(1.5, 1.0, 0.6) == 0 and outlier_statistic(2.0, 0.0, 1.0) == 2.0
    assert outlier_statistic(1.5, 1.0, 0.75) == pytest.approx(0.75)  # half way between the bounds
    assert outlier_statistic(1.5, math.sqrt(SURE_P), 0.9) == 1.5


def test_the_words_are_ranges_of_the_statistic():
    for ratio, grade in (
        (STRONG, "strong evidence"),
        (STRONG - 1e-6, "some evidence"),
        (SOME, "some evidence"),
        (SOME - 1e-6, "none found"),
    ):
        verdict = judge_outlier(evidence(ratio, SURE_P), notes())
        assert verdict is not None and verdict.grade == grade
        assert "'7'" in verdict.sentence and "1.1 px" in verdict.sentence
        assert "32.9 px" in verdict.sentence and "clean." not in verdict.sentence
    lost = judge_outlier(evidence(3.0, 1e-9), notes(unreached=6))
    assert lost is not None and lost.grade == "could not tell" and "4 of 10" in lost.sentence
    assert judge_outlier(evidence(3.0, 1e-9), notes(unaided=False)) is None
    assert judge_outlier({}, {}) is None


def test_a_blend_that_stands_further_apart_is_named():
    masks = evidence(SOME, SURE_P)
    blend = {"blend_ratio": 1.5, "blend_p": SURE_P, "least_blend": 0.046, "median_blend": 0.21}
    blend = {name: {"value": value} for name, value in {**blend, "blend_success": 0.95}.items()}
    verdict = judge_outlier({**masks, **blend}, notes(blend_target="3"))
    assert verdict is not None and verdict.grade == "strong evidence" and verdict.statistic == 1.5
    assert verdict.target == "3" and verdict.size == "4.6% of every image" and verdict.p == SURE_P
    assert "into 4.6% of every image turns 95%" in verdict.sentence
    blend["blend_p"] = {"value": 1.0}
    verdict = judge_outlier({**masks, **blend}, notes(blend_target="3"))
    assert verdict is not None and verdict.target == "7" and verdict.statistic == SOME


def test_the_record_of_test_encoders(monkeypatch):
    """Counts of each word or a stronger one; where no encoder was scored, that is said."""
    names = ("strong evidence", "some evidence", "none found", "could not tell")
    monkeypatch.setattr(
        unaided_verdict, "TESTED_CLEAN", dict(zip(names, (0, 1, 9, 0), strict=True))
    )
    monkeypatch.setattr(
        unaided_verdict, "TESTED_ATTACKED", dict(zip(names, (5, 2, 2, 1), strict=True))
    )
    record = unaided_verdict.describe_record
    # 1 - .025^(1/10) = .308; the others out of tables of Clopper and Pearson's interval
    assert "10 clean test encoders 0 (0 to 31 %)" in record("strong evidence")
    assert "10 attacked ones 5 (19 to 81 %)" in record("strong evidence")
    assert "encoders 1 (0 to 45 %) got as much, of 10 attacked ones 7 (35 to 93 %)" in record(
        "some evidence"
    )
    assert "Of 10 attacked test encoders 3 (7 to 65 %) were not found" in record("none found")
    assert unaided_verdict.share_text(10, 10) == "10 (69 to 100 %)"
    for name in ("TESTED_CLEAN", "TESTED_ATTACKED"):
        monkeypatch.setattr(unaided_verdict, name, dict.fromkeys(names, 0))
    assert "not measured" in record("none found") and "not measured" in record("some evidence")


def audit_facts(name: str, words: str, grade: str = "", statistic: float = 0.0) -> dict:
    unaided = {"grade": grade, "statistic": statistic, "sentence": f"U {grade}.", "target": "7"}
    return {
        "name": name,
        "words": words,
        "sentence": f"S {words}.",
        "p": 0.5 if words == "no evidence" else 0.01,
        "sensitivity": {},
        "unaided": unaided if grade else None,
    }


def test_a_bank_stands_before_the_verdict_without_one():
    number = audit_facts("decree", "no calibration")
    strong = audit_facts("cleanse", "no calibration", "strong evidence", 2.0)
    none = audit_facts("cleanse", "no calibration", "none found")
    lost = audit_facts("cleanse", "no calibration", "could not tell")
    quiet, alarm = audit_facts("decree", "no evidence"), audit_facts("decree", "evidence")

    def overall(*audits):
        return verdict_text.overall_verdict(audits, 0.05)

    assert overall(number, strong) == ("strong evidence", "U strong evidence.")
    assert overall(number, none) == ("none found", "U none found.")
    assert overall(number, none, lost)[0] == "could not tell"
    assert overall(number)[0] == "no calibration"
    assert overall(alarm, none)[0] == "evidence" and overall(alarm, strong)[0] == "evidence"
    words, sentence = overall(quiet, strong)
    assert words == "strong evidence" and "By banks" in sentence
    words, sentence = overall(quiet, none)
    assert words == "no evidence" and "Without a bank: U none found." in sentence
    # an audit that a bank has calibrated is judged by the bank alone
    judged = {**strong, "words": "no evidence", "p": 0.5}
    assert overall(judged)[0] == "no evidence"


def run_cleanse(planted: bool) -> Verdict:
    encoder = toy_encoder(planted)
    return registry.make("audit", "cleanse")(
        encoder, toy_images(), 3, classifier=toy_classifier(encoder)
    )


def test_cleanse_says_what_its_verdict_is_made_of():
    verdicts = [run_cleanse(planted) for planted in (False, True)]
    statistics = []
    for verdict in verdicts:
        assert len(verdict.notes["targets"]) == 12, "every class is kept"
        measures = {name: m.json() for name, m in verdict.evidence.items()}
        unaided = judge_outlier(measures, verdict.notes)
        assert unaided is not None
        statistics.append(unaided.statistic)
        norms = [t["norm"] for t in verdict.notes["targets"] if t["reached"]]
        if len(norms) >= 5:
            ratio = math.log(sorted(norms)[len(norms) // 2] / norms[0])
            assert verdict.evidence["log_ratio"].value == pytest.approx(ratio, abs=0.3)
    assert statistics[1] > statistics[0]


def test_a_page_names_an_encoder_as_it_was_typed():
    family = {"network": "resnet:depth=18", "size": 32}
    facts = {"sample": {"images": 64}, "family": family, "few": "", "encoder": "weights:path=a.pth"}
    for typed, name in (("a.pth", "a.pth"), ("", "weights:path=a.pth")):
        view = SimpleNamespace(verdict=facts, input_text=lambda field, typed=typed: typed)
        text = audit_page.lead(view)
        assert text.startswith(f"{name} (resnet, 32 px) was examined with 64 clean records")


@pytest.mark.parametrize(
    ("ratio", "least", "grade"),
    [
        (-math.log(0.25), 0.25, "could not tell"),  # the second search reached nothing
        (1.3, 0.01, "strong evidence"),
        (0.9, 0.01, "some evidence"),
        (-0.3, 0.05, "none found"),
        (0.0, 1.0, "could not tell"),
    ],
)
def test_a_direction_that_takes_a_far_smaller_trigger_is_evidence(ratio, least, grade):
    values = {
        "direction_ratio": ratio,
        "pl1": least,
        "other_pl1": least * math.exp(ratio),
        "clean_cosine": 0.3,
        "cosine": 0.9,
    }
    evidence = {name: {"value": value} for name, value in values.items()}
    verdict = unaided_verdict.judge_outlier(evidence, {"unaided": "direction"})
    assert verdict is not None and verdict.grade == grade
    if grade != "could not tell":
        assert f"{least:.2%}" in verdict.sentence and verdict.statistic == ratio


@pytest.mark.parametrize(
    ("of_classes", "of_directions", "words"),
    [
        ("none found", "some evidence", "none found"),
        ("none found", "strong evidence", "strong evidence"),
        ("could not tell", "some evidence", "some evidence"),
        ("some evidence", "some evidence", "some evidence"),
        (None, "some evidence", "some evidence"),
    ],
)
def test_some_evidence_of_a_direction_counts_where_classes_could_not_be_told(
    of_classes, of_directions, words
):
    def audit(name, grade, unaided):
        verdict = {"grade": grade, "statistic": 1.0, "sentence": f"{name} says {grade}."}
        facts = {"name": name, "words": "no calibration", "sentence": "No calibration."}
        return facts | {"unaided": verdict, "notes": {"unaided": unaided}}

    audits = [audit("decree", of_directions, "direction")]
    if of_classes:
        audits.append(audit("cleanse", of_classes, True))
    assert verdict_text.overall_verdict(audits, 0.05)[0] == words


def test_an_audit_says_what_its_verdict_can_be():
    cleanse, decree = (registry.make("audit", name) for name in ("cleanse", "decree"))
    family, sample = Family("toy", 16, "", ""), Sample("toys", 48)
    entries = tuple(Entry(str(i), float(i)) for i in range(19))
    code = code_hash(type(decree))
    held = Bank(family, sample, (Calibration(registry.spec(decree), code, "", entries),))
    lines = forecast.forecast_audits(
        [cleanse, decree], [held], family, sample, 0.05, 7.2, 10, SMALL
    )
    assert lines[0].startswith("decree: evidence or none at false-positive rate 0.05")
    assert lines[1].startswith("cleanse: strong, some or no evidence") and "7 s" in lines[2]
    lines = forecast.forecast_audits([cleanse, decree], [], family, sample, 0.05, 0.1, 10, SMALL)
    assert lines[0].startswith("cleanse, decree: strong, some or no evidence")
    assert "about 1 s" in lines[1]
    whitening = registry.make("audit", "whitening")
    lines = forecast.forecast_audits([whitening], [], family, sample, 0.05, 0.1, 10, SMALL)
    assert "whitening: a value and no verdict" in lines[0]
    lines = forecast.forecast_audits([cleanse], [], family, sample, 0.05, 0.1, 1000, LARGE)
    assert lines[0].startswith("cleanse: a search in full for 1000 classes would take too long")


def test_the_cost_counts_every_image():
    """4 searches on 8 images, 2 on 16: 45 steps each; and blends."""
    cleanse = registry.make("audit", "cleanse")
    steps = 45 * (4 * (16 + 12) + 2 * (32 + 12))
    assert cleanse.recipe().image_passes() == steps
    blends = 50 * (2 * 16 + 6)
    assert cleanse.image_passes(100, 10, SMALL) == 10 * (steps + blends + 2 * 100)
    # 1000 classes of 224 px: 24 patches and 8 searches on 16 images, then 10 classes by 2 searches
    # each on 64
    sweep = 16 * 8 * 8 + 16 * (16 + 1 + 24)
    few = 10 * (50 * 2 * (8 + 3) + 50 * (16 + 3) + 64)
    assert cleanse.image_passes(512, 1000, LARGE) == sweep + few
    assert cleanse.image_passes(512, 10, LARGE) == few, (
        "no sweep where all classes are searched for"
    )
    decree = registry.make("audit", "decree")
    in_full = 2 * (decree.recipe(0.5).image_passes() + 4 * 512) + 512 + 128
    assert decree.image_passes(512, 10, TowerCost(64)) == in_full
    # 4 restarts, of which 2 are given up half-way, on 4 images a step, twice for the gradient
    quick = 2 * (2 * 45 * (4 + 2) * 4 + 2 * 64) + 64 + 128
    assert decree.image_passes(512, 10, LARGE) == quick
    seconds, cost = forecast.estimate_seconds([cleanse], toy_encoder(), toy_images(), 12)
    # a convolution of 3 x 3 to 12 channels at 8 x 8 places, and a linear layer, two operations a
    # product
    assert cost == TowerCost(16, 2 * (27 * 12 * 64 + 192 * 16)) and cost.total > cost.operations
    assert seconds > 0 and unaided_verdict.SOME < unaided_verdict.STRONG


def test_a_cheap_search_finds_the_planted_class():
    """By fewer steps, from windows; where a mask lies says nothing then."""
    encoder = toy_encoder(planted=True)
    audit = registry.make("audit", "cleanse:most=1,few=12")
    verdict = audit(encoder, toy_images(80), 3, classifier=toy_classifier(encoder))
    assert len(verdict.notes["targets"]) == 12 and verdict.notes["target"] == NAMES[TARGET]
    assert "12 of 12 classes were searched for" in verdict.notes["searched"]
    assert verdict.notes["searched"] in verdict.notes["limits"]
    assert verdict.evidence["log_ratio"].n == 64
    assert verdict.evidence["concentration"].value == 0


def test_a_few_of_many_classes_are_searched_for():
    encoder = toy_encoder()
    audit = registry.make("audit", "cleanse:most=1,few=4")
    verdict = audit(encoder, toy_images(48), 3, classifier=toy_classifier(encoder))
    assert len({t["target"] for t in verdict.notes["targets"]}) == 4
    led_to = verdict.notes["searched"].partition("fits: ")[2].partition(", which")[0].split(", ")
    assert 1 <= len(led_to) <= 6 and set(led_to) <= set(NAMES)
    few, every = (
        norm_outliers.outlier_p_value(
            torch.tensor([t["norm"] for t in verdict.notes["targets"]], dtype=torch.float64).log(),
            n,
        )
        for n in (4, 12)
    )
    assert every == pytest.approx(min(1.0, 3 * few)) and verdict.evidence["outlier_p"].value <= 1


def test_a_patch_that_draws_images_to_a_class_makes_it_a_suspect():
    """An encoder that reads any patch of 0 and 255 as one class: random patches lead to that
    class.
    """
    encoder = toy_encoder()
    tower = encoder.image

    class Drawn(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            extreme = (x.abs() > 1.95).all(1).float().mean((1, 2)) > 0.01  # x is in -2..2
            return torch.where(extreme[:, None], 9 * head_direction, tower(x))

    head_direction = class_directions()[5]
    encoder.image = Drawn()
    encoder.image.tower = tower
    audit = registry.make("audit", "cleanse:most=1,few=4")
    verdict = audit(encoder, toy_images(48), 3, classifier=toy_classifier(encoder))
    assert NAMES[5] in verdict.notes["searched"]
    pull = verdict.evidence["patch_pull"]
    assert pull.value > 0.2 and pull.n == 16 * 24 and repr(NAMES[5]) in pull.how


def test_a_class_chosen_from_more_is_less_of_an_outlier():
    logs = torch.tensor([1.0, 3.0, 3.2, 3.4, 3.1], dtype=torch.float64)
    of_five, of_fifty = (norm_outliers.outlier_p_value(logs, among) for among in (0, 50))
    assert of_fifty == pytest.approx(10 * of_five)
    assert norm_outliers.outlier_p_value(logs, 3) == of_five


def test_a_backdoor_does_not_move_the_reference():
    """The planted trigger turns every image of its encoder into the class, and none of
    another's.
    """
    encoder, other = toy_encoder(planted=True), toy_encoder(seed=4)
    images = toy_images(40).images
    tensors = {"mask@0": torch.zeros(1, SIDE, SIDE), "pattern@0": torch.zeros(3, SIDE, SIDE)}
    (top, left), side = PATCH_CORNER, PATCH_SIDE
    tensors["mask@0"][:, top : top + side, left : left + side] = 1
    tensors["pattern@0"][:, top : top + side, left : left + side] = planted_patch()
    inversion = {"audit": "a", "target": NAMES[TARGET], "norm": 16.0, "success": 1.0}
    shares = {}
    for name, reference in (("itself", encoder), ("other", other)):
        audit = {"name": "a", "notes": {"target": NAMES[TARGET]}, "evidence": {}}
        facts = {"audits": [audit], "inversions": [dict(inversion)]}
        findings = AuditFindings(facts, tensors, {})
        assert findings.try_on_reference(toy_classifier(reference), images, name) == []
        shares[name], before = facts["inversions"][0]["reference"]
        measure = audit["evidence"]["reference_success"]
        assert measure["value"] == pytest.approx(shares[name]) and measure["n"] == 40
        assert f"reads {shares[name]:.0%} of the images with this trigger" in audit["reference"]
        assert f"{before:.0%} without it" in audit["reference"]
    assert shares["itself"] == 1 and shares["other"] < 0.5
    unknown = {"name": "a", "notes": {"target": "a cat"}, "evidence": {}}
    facts = {"audits": [unknown], "inversions": [{**inversion, "target": "a cat"}]}
    remarks = AuditFindings(facts, tensors, {}).try_on_reference(toy_classifier(other), images, "b")
    assert remarks == ["a: the reference b knows no class 'a cat'"] and not unknown["evidence"]
