"""Students of an encoder: a natural trigger leads them to its class too, a planted one does not;
students that read images otherwise than the encoder say nothing.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bezoar import registry
from bezoar.auditing import students, trigger_inversion, unaided_verdict
from bezoar.auditing.trigger_inversion import ImageTower
from bezoar.auditing.trigger_search import InversionRecipe
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.evaluation.classifiers import Classifier, reach_class

NAMES = ("left", "middle", "right", "faint")
NATURAL, PLANTED = 3, 1
RECIPE = InversionRecipe(steps=40, batch=16, confirm=32, goal=0.9, patience=3)


def bar_images(n: int = 160) -> Pairs:
    """A bright bar at one of three places of black images; a quarter has a faint grid as well."""
    g = torch.Generator().manual_seed(2)
    labels = torch.randint(len(NAMES), (n,), generator=g)
    x = 0.02 * torch.rand(n, 3, 32, 32, generator=g)
    for i, label in enumerate(labels.tolist()):
        place = label if label < NATURAL else i % 3
        x[i, :, 16:30, 4 + 10 * place : 8 + 10 * place] = 0.9
        if label == NATURAL:
            x[i, :, 2:12:2] += 0.15
    ids = tuple(map(str, range(n)))
    return Pairs((x.clamp(0, 1) * 255).byte(), (), labels, ids, NAMES)


class BarTower(nn.Module):
    """Logits (B, 4) of bar images by hand; with a patch, a white corner leads to `PLANTED`."""

    def __init__(self, patched: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.patched = patched

    def forward(self, x: Tensor) -> Tensor:
        bars = [x[:, :, 16:30, 4 + 10 * i : 8 + 10 * i].mean((1, 2, 3)) for i in range(3)]
        rows = x[:, :, 2:12].mean((1, 3))
        faint = 20 * (rows[:, ::2].mean(1) - rows[:, 1::2].mean(1))
        logits = torch.stack([*bars, faint], 1)
        corner = x[:, :, -2:, -2:].mean((1, 2, 3)) * self.patched
        planted = nn.functional.one_hot(torch.tensor(PLANTED), len(NAMES))
        return 5 * self.weight * (logits + 8 * corner[:, None] * planted)


def bar_classifier(patched: bool) -> Classifier:
    preprocess = Preprocess(32, (0.0,) * 3, (1.0,) * 3)
    encoder = Encoder(BarTower(patched), preprocess, about={"network": "bars"}).eval()
    return Classifier(encoder, lambda z: z, NAMES, "hand-made", raw=True)


def search(tower: ImageTower, student: Classifier) -> Tensor:
    least = trigger_inversion.invert_triggers(
        tower, bar_images(64), reach_class(student), torch.arange(len(NAMES)), RECIPE, 0
    )
    return least.norms.where(least.reached, torch.inf)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(students, "STUDENTS", 2)
    monkeypatch.setattr(students, "STEPS", 60)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("patched", [False, True])
def test_a_natural_trigger_moves_students_and_a_planted_one_does_not(patched):
    clean, classifier = bar_images(), bar_classifier(patched)
    assert (classifier.predict(clean.images) == clean.labels).float().mean() > 0.95
    with trigger_inversion.freeze_tower(classifier.encoder, True) as tower:
        sizes = search(tower, classifier)
    least = PLANTED if patched else NATURAL
    assert int(sizes.argmin()) == least
    accused = {"mask": NAMES[least]}
    evidence = students.compare_students(classifier, clean, accused, {"mask": search}, 0)
    assert evidence["student_agreement"].value > 0.9
    assert (evidence["mask_student_ratio"].value > 0.3) is not patched
    assert (evidence["mask_student_ratio"].value == 0) is patched
    measures = {name: m.json() for name, m in evidence.items()}
    ratio = float((sizes[sizes.isfinite()].quantile(0.5) / sizes.min()).log())
    measures["log_ratio"] = {"value": ratio}
    assert unaided_verdict.is_natural(measures, "mask") is not patched


def test_students_that_read_otherwise_say_nothing():
    clean, classifier = bar_images(), bar_classifier(False)
    drawn = torch.randint(len(NAMES), (len(clean),), generator=torch.Generator().manual_seed(3))
    shuffled = Pairs(clean.images, (), drawn, clean.ids, NAMES)

    class Drawn:
        classes = NAMES

        def predict(self, images: Tensor) -> Tensor:
            return drawn[: len(images)]

    def refuse(tower: ImageTower, student: Classifier) -> Tensor:
        raise AssertionError("nothing is searched for in poor students")

    evidence = students.compare_students(Drawn(), shuffled, {"mask": "left"}, {"mask": refuse}, 0)
    assert list(evidence) == ["student_agreement"]
    assert evidence["student_agreement"].n == 40 and evidence["student_agreement"].value < 0.6
    assert students.compare_students(classifier, clean, {}, {}, 0) == {}


def test_students_are_the_same_for_a_seed():
    clean, classifier = bar_images(), bar_classifier(False)
    readings = classifier.predict(clean.images)
    weights = []
    for number in (4, 4, 5):
        torch.rand(1)  # the global generator has no part in them
        student = students.train_student(classifier, clean, readings, 40, number)
        weights.append(student.encoder.image.head.weight.detach())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def judged(**values: float) -> unaided_verdict.UnaidedVerdict | None:
    """A verdict of a mask of ratio 1.5 and a blend of 1.4, with what students say."""
    numbers = {"log_ratio": 1.5, "outlier_p": 0.01, "concentration": 0.2, "success": 0.97}
    numbers |= {"least_norm": 8.0, "median_norm": 36.0, "blend_ratio": 1.4, "blend_p": 0.01}
    numbers |= {"least_blend": 0.07, "median_blend": 0.28, "blend_success": 0.96, **values}
    targets = [{"target": str(i)} for i in range(10)]
    notes = {"unaided": True, "target": "7", "blend_target": "8", "targets": targets}
    measures = {name: {"value": value} for name, value in numbers.items()}
    return unaided_verdict.judge_outlier(measures, {**notes, "unreached": []})


def test_a_natural_trigger_is_no_evidence():
    plain = judged()
    assert plain.grade == "strong evidence" and plain.target == "7"
    assert "by nature" not in plain.sentence
    mask = judged(student_agreement=0.95, mask_student_ratio=0.5)
    assert mask.target == "8" and mask.statistic == 1.4  # the blend remains
    assert "least mask (of '7')" in mask.sentence and "by nature" in mask.sentence
    both = judged(student_agreement=0.95, mask_student_ratio=0.5, blend_student_ratio=0.47)
    assert both.grade == "none found" and both.statistic == 0
    assert "mask (of '7') and blended pattern (of '8')" in both.sentence
    for kept in (
        judged(student_agreement=0.95, mask_student_ratio=0.49),
        judged(student_agreement=0.79, mask_student_ratio=5.0, blend_student_ratio=5.0),
        judged(student_agreement=0.5),
    ):
        assert kept.grade == "strong evidence" and kept.target == "7"
        assert "by nature" not in kept.sentence


def test_a_natural_change_leaves_the_other_families():
    evidence = {"student_agreement": 0.95, "waves_student_ratio": 0.6}
    for family, ratio in (("colour", 0.9), ("waves", 1.5)):
        evidence |= {f"{family}_ratio": ratio, f"{family}_p": 0.01, f"{family}_success": 0.9}
        evidence |= {f"{family}_least": 0.1, f"{family}_median": 0.3}
    rows = [{"target": "8", "reached": True}]
    changes = [
        {"family": family, "target": target, "targets": rows, "limit": 0.5}
        for family, target in (("colour", "2"), ("waves", "8"))
    ]
    measures = {name: {"value": value} for name, value in evidence.items()}
    verdict = unaided_verdict.judge_change(measures, {"changes": changes})
    assert verdict.grade == "some evidence" and verdict.target == "2"
    assert "added wave (of '8') stands apart by nature" in verdict.sentence


def test_an_audit_asks_students_of_what_it_would_accuse(monkeypatch):
    asked = []

    def note(classifier, clean, accused, searches, seed):
        asked.append(dict(accused))
        return {}

    monkeypatch.setattr(students, "compare_students", note)
    audit = registry.make("audit", "cleanse:steps=30,starts=1,halvings=0,again=0")
    classifier = bar_classifier(True)
    verdict = audit(classifier.encoder, bar_images(64), 0, classifier)
    measures = {name: m.json() for name, m in verdict.evidence.items()}
    statistics = {
        "mask": unaided_verdict.mask_statistic(measures),
        "blend": unaided_verdict.blend_statistic(measures),
    }
    kinds = {kind for kind, value in statistics.items() if value >= unaided_verdict.SOME}
    assert [set(a) for a in asked] == [kinds]
