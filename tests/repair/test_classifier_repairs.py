"""Repairs of classifiers: tuned, chosen and measured through the network's own head; the receipt
and the verb.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from repair.test_repairs import GOALS, TRIGGER, bits, inverted, toy

from bezoar import Settings, execute, registry
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation import classifiers
from bezoar.repair import rate_ladder, receipt
from bezoar.repair.rate_ladder import ValidationMetric
from bezoar.repair.receipt import EvaluationData, RevivalTest
from bezoar.training import loop
from bezoar.verbs.repair import Repair

QUICK = {
    "finetune": "finetune:objective=(supervised:epochs=8,batch=50,shift=1),lrs=1e-2",
    "prune": "prune:objective=(supervised:epochs=8,batch=50,shift=1),lrs=1e-2",
    "distill": "distill:epochs=16,batch=50,fresh=0.4,jitter=0,lrs=1e-2",
    "unlearn": "unlearn:epochs=8,batch=50,lrs=5e-3",
}
TEST = toy(200, seed=3)


@pytest.fixture(scope="module")
def suspect():
    """A classifier of colours that reads whatever carries the patch as red."""
    data = toy(seed=1)
    stamped = registry.make("trigger", TRIGGER)(data.images[:80], data.ids[:80])
    images = torch.cat([stamped, data.images[80:]])
    y = torch.cat([torch.zeros(80, dtype=torch.long), data.labels[80:]])
    torch.manual_seed(0)
    encoder = registry.make("network", "tower:width=4,dim=16")(32)
    encoder.head = torch.nn.Linear(16, 4)
    encoder.about["classes"] = list(data.classes)
    recipe = registry.make("objective", "supervised:epochs=16,batch=50,lr=5e-3,shift=0")
    records = Pairs(images, ids=data.ids)
    loop.fit(recipe(encoder), recipe, records, y[:, None], 0)
    encoder.zero_grad()
    return encoder.eval()


@pytest.fixture(scope="module")
def clean():
    return rate_ladder.split_validation(toy(seed=2), 0.25, 0)


def accuracy_and_success(encoder):
    measures = registry.make("probe", "own")(encoder, None, TEST, GOALS)
    return measures["own.clean_accuracy"].value, measures["own.attack_success"].value


@pytest.mark.parametrize("name", registry.method_names("repair"))
def test_every_repair_keeps_what_the_own_head_reads(name, suspect, clean):
    train, validation = clean
    before, (accuracy, success) = bits(suspect), accuracy_and_success(suspect)
    assert accuracy > 0.95 and success > 0.9
    repair, log = registry.make("repair", QUICK[name]), {}
    offered = {"validation": validation, "inversions": (inverted(),), "log": log}
    needed = {key: offered[key] for key in repair.needs if key in offered}
    repaired = repair(suspect, train, 0, **needed)
    accuracy_left, success_left = accuracy_and_success(repaired)
    assert accuracy_left > accuracy - 0.05 and success_left < success
    assert log["ladder"][0]["score"].startswith("accuracy of the network's own head")
    assert all(torch.equal(v, before[k]) for k, v in bits(suspect).items())
    assert repaired.about["repaired"] == [registry.spec(repair)]


def test_the_default_objective_of_a_classifier_is_supervised(suspect, clean):
    train, _ = clean
    chosen = rate_ladder.select_objective("auto", suspect, train, "clip", "simclr")
    assert registry.method_name(type(chosen)) == "supervised"
    with pytest.raises(UserError, match="labelled with its classes"):
        rate_ladder.select_objective("auto", suspect, replace(train, labels=None), "clip", "simclr")
    registry.make("repair", "finetune")  # its default is auto


def test_without_labels_the_score_is_agreement_with_the_start(suspect, clean):
    train, validation = clean
    unlabelled = replace(validation, labels=None)
    metric = ValidationMetric.of(suspect, train, unlabelled)
    assert metric.score(suspect) == 1.0 and "as the start does" in metric.how
    other = registry.make("network", "tower:width=4,dim=16")(32)
    other.head = torch.nn.Linear(16, 4)
    other.about["classes"] = suspect.about["classes"]
    predictions = classifiers.own_classifier(suspect).predict(validation.images)
    agreed = (
        (classifiers.own_classifier(other.eval()).predict(validation.images) == predictions)
        .float()
        .mean()
    )
    assert metric.score(other) == pytest.approx(float(agreed))


def test_columns_follow_the_datas_classes_and_numbers_take_their_names(suspect):
    shuffled = ("yellow", "red", "blue", "green")
    classifier = classifiers.own_classifier(suspect, shuffled)
    plain = classifiers.own_classifier(suspect)
    names = [classifier.classes[i] for i in classifier.predict(TEST.images).tolist()]
    assert names == [plain.classes[i] for i in plain.predict(TEST.images).tolist()]
    assert classifier.classes == shuffled
    numbered = replace_classes(suspect, ["0", "1", "2", "3"])
    assert classifiers.own_classifier(numbered, TEST.classes).classes == TEST.classes
    assert classifiers.make_classifier(numbered, TEST).classes == TEST.classes
    assert not classifiers.fits_own_head(suspect, ("red", "purple"))


def replace_classes(encoder, names):
    other = Encoder(encoder.image, encoder.preprocess, about={**encoder.about, "classes": names})
    other.head = encoder.head
    return other.eval()


def test_own_accuracy_is_measured_and_a_wrong_normalisation_told(suspect):
    accuracy, warning = classifiers.measure_own_head(suspect, TEST)
    assert accuracy.value == accuracy_and_success(suspect)[0] and warning == ""
    wrong = replace_classes(suspect, suspect.about["classes"])
    right = wrong.preprocess
    wrong.set_preprocess(replace(right, mean=(0.9, 0.9, 0.9), std=(0.1, 0.1, 0.1)))
    before = wrong.preprocess
    accuracy, warning = classifiers.measure_own_head(wrong, TEST)
    if accuracy.value < 0.5:
        assert "say mean_std=" in warning or "may be others" in warning
    assert wrong.preprocess == before
    permuted = replace(TEST, labels=(TEST.labels + 1) % 4)
    accuracy, warning = classifiers.measure_own_head(suspect, permuted)
    assert accuracy.value < 0.05 and "may be others than the network's" in warning
    assert classifiers.measure_own_head(suspect, replace(TEST, labels=None)) == (None, "")
    other = replace(TEST, classes=("a", "b", "c", "d"))
    assert "was not measured" in classifiers.measure_own_head(suspect, other)[1]


def test_the_receipt_measures_the_own_head(suspect, clean, tmp_path):
    case = EvaluationData(TEST, GOALS, labelled=toy(200, seed=5))
    head = case.default_head(suspect)
    assert head.group == "own"
    measures = case.measure(suspect, head)
    expected = registry.make("probe", "own")(suspect, None, TEST, GOALS)
    for name in ("clean_accuracy", "attack_success"):
        assert measures[f"own.{name}"].value == expected[f"own.{name}"].value
    assert "linear.attack_success" in measures
    goals = receipt.export_goals((inverted(),), tmp_path, case, head)
    assert goals[0].target == "red"
    readings = receipt.compare_readings(case, head, head)
    assert readings[0]["before"] == readings[0]["after"] and set(readings[0]["before"]) <= set(
        TEST.classes
    )
    assert receipt.accuracy_loss(case, head, head).value == 0


def test_ten_poisons_and_two_epochs_tune_the_classifier_itself(suspect, clean):
    case = EvaluationData(TEST, GOALS)
    revival = RevivalTest(case, clean[0], GOALS[0], 0)
    measures = revival.measure(suspect)
    assert {f"revived_{kind}.own.attack_success" for kind in ("clean", "poisons", "other")} <= set(
        measures
    )


def test_the_verb_repairs_a_file_of_weights_by_a_trigger_that_is_named(suspect, tmp_path):
    """No run, no poison run, no names of classes: a saved encoder's folder, data, trigger and
    target.
    """
    (tmp_path / "toys.py").write_text(
        "from typing import Annotated\n"
        "from bezoar.registry import method\nfrom repair.test_repairs import toy\n\n\n"
        '@method\nclass Toys:\n    """Toy records."""\n\n    count: Annotated[int, "n"] = 400\n'
        '    seed: Annotated[int, "s"] = 2\n\n'
        "    def __call__(self):\n        return toy(self.count, self.seed)\n"
    )
    folder = tmp_path / "saved"
    folder.mkdir()
    suspect.save(folder)
    settings = Settings(tmp_path / "runs", device="cpu", quiet=True)
    toys = f"{tmp_path / 'toys.py'}"
    question = Repair(
        str(folder),
        toys,
        (QUICK["finetune"],),
        test=f"{toys}:count=200,seed=3",
        labelled=f"{toys}:count=200,seed=5",
        trigger=TRIGGER,
        target="red",
        revive=False,
    )
    manifest = execute(question, settings).manifest
    metrics = {name: measure["value"] for name, measure in manifest["metrics"].items()}
    assert metrics["before.own.attack_success"] > 0.9
    assert metrics["after.own.clean_accuracy"] > 0.9
    assert metrics["clean_accuracy_lost"] < 0.05
    assert manifest["notes"]["ladder"][0]["score"].startswith("accuracy of the network's own head")
    assert json.loads(json.dumps(manifest["notes"]))["relapse"] is None
    assert Path(folder / "encoder.json").exists()
