"""`bezoar audit` and `bezoar calibrate` as their users run them, with a stand-in for an audit; what
they refuse.
"""

import dataclasses
import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bezoar import registry
from bezoar.auditing import unaided_verdict
from bezoar.auditing.bank import Bank, Calibration
from bezoar.cli import main
from bezoar.data.files import writing
from bezoar.repair import receipt
from bezoar.reports import page
from bezoar.reports.page import execute
from bezoar.runs import sweep
from bezoar.runs.run import Run
from bezoar.runs.verb import Settings
from bezoar.verbs.audit import Audit
from bezoar.verbs.poison import Poison
from bezoar.verbs.train import Train

STUB = '''"""A stand-in: the mean of the first weights, and two triggers."""
from typing import Annotated, ClassVar
import torch
from bezoar.errors import UserError
from bezoar.registry import method
from bezoar.evaluation.scores import proportion
from bezoar.evaluation.verdict import Inversion, Verdict

@method
class Stub:
    """Stand-in."""
    needs: ClassVar[tuple[str, ...]] = ("classifier", "report")
    least: Annotated[int, "classes"] = 2

    def __call__(self, encoder, clean, seed, classifier, report):
        if len(classifier.classes) < self.least:
            raise UserError("too few classes")
        h, w = clean.images.shape[-2:]
        mask = torch.zeros(1, h, w)
        mask[:, :4, :4] = 1
        patterns = (torch.full((3, h, w), v) for v in (0.0, 1.0))
        found = tuple(Inversion(mask, p, "striped star", 16.0, 0.5) for p in patterns)
        report(1, 1, "done")
        vectors = encoder.image(encoder.prepare_images(clean.images[:8]))
        value = 1000 * float(vectors.detach().mean())
        evidence = {"hits": proportion(3, len(clean), "hits")}
        return Verdict(value, evidence, found, {"limits": ["It is a stand-in."]})
'''
NETWORK = "tower:width=4,dim=16"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in audit; a bank that `calibrate` made of three clean encoders and an
    attacked one.
    """
    folder = tmp_path_factory.mktemp("audits")
    (folder / "stub.py").write_text(STUB)
    return folder


def here(trials, settings, progress):
    """A sweep without worker processes, which take seconds to start; each verb goes through JSON as
    theirs do.
    """
    quiet = dataclasses.replace(settings, quiet=True)
    verbs = {
        t: sweep.verb_from_json(
            json.loads(json.dumps(sweep.trial_to_json(t, quiet, False)))["verb"]
        )
        for t in trials
    }
    return {t: execute(verb, dataclasses.replace(quiet, seed=t.seed)) for t, verb in verbs.items()}


def ask(capsys, work, *words, status=0):
    """Run a command with --json; its manifest, and its run."""
    capsys.readouterr()
    assert (
        main([*map(str, words), "--runs", str(work / "runs"), "--device", "cpu", "--json", "full"])
        == status
    )
    manifest = json.loads(capsys.readouterr().out)
    manifests = (
        p for p in (work / "runs").glob("*/manifest.json") if json.loads(p.read_text()) == manifest
    )
    return manifest, Run(next(manifests).parent)


def refused(capsys, work, *words):
    """What a command that ends with 2 says, in one line."""
    capsys.readouterr()
    assert main([*map(str, words), "--runs", str(work / "runs"), "--device", "cpu"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bezoar:")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def clean(work):
    verb = Train("scenes:count=96", "clip_small:width=4,dim=16", "clip:epochs=1,batch=48")
    return [execute(verb, Settings(work / "runs", seed, "cpu", quiet=True)) for seed in range(4)]


@pytest.fixture(scope="module")
def attacked(work):
    plan = Poison("scenes:count=96", "backdoor:count=10", "patch:size=6", "striped star")
    verb = Train(plan, "clip_small:width=4,dim=16", "clip:epochs=1,batch=48")
    return execute(verb, Settings(work / "runs", 9, "cpu", quiet=True))


STORY = ("--audit", "whitening:probes=1,images=16", "--images", "40")


@pytest.fixture(scope="module")
def calibrated(work, clean, attacked):
    """A bank of three encoders, and of an attacked one, by a stand-in and by a true audit."""
    words = [
        "calibrate",
        *(str(r.path) for r in clean[:3]),
        "--attacked",
        str(attacked.path),
        *STORY[:2],
    ]
    words += [str(work / "stub.py"), "--images", "40", "--workers", "1", "--rate", "0.25"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "run_trials", here)
        assert main([*words, "--runs", str(work / "runs"), "--device", "cpu"]) == 0
    return Run(next((work / "runs").glob("calibrate-*")))


def test_calibrate_writes_a_bank_of_comparable_encoders(calibrated, clean, attacked):
    held = Bank.read(calibrated.file("bank.json"))
    assert held.family.network.startswith("clip_small:width=4") and held.family.data.startswith(
        "scenes:count=96"
    )
    assert (
        held.sample.images == 40
        and "split=test" in held.sample.data
        and held.family.objective.startswith("clip:epochs=1")
    )
    assert [c.name for c in held.audits] == ["whitening", "stub"]
    for c in held.audits:
        assert [e.name for e in c.clean] == [r.name for r in clean[:3]]
        assert [(e.name, e.attack) for e in c.attacked] == [(attacked.name, "backdoor patch")]
        assert c.attacked[0].trigger.startswith("patch:size=6")
    manifest = calibrated.manifest
    assert (
        manifest["metrics"]["stub.auroc"]["n"] == 4
        and manifest["metrics"]["stub.clean"]["value"] == 3
    )
    assert manifest["goal"] == [] and len(manifest["parents"]) == 4 + 8
    text = (calibrated.path / "report.html").read_text()
    assert (
        "could not be made" not in text and "A bank of 3 clean encoders and 1 attacked one" in text
    )


def audit(work, run, bank, *more):
    banks = bank if isinstance(bank, list) else [bank]
    return [
        "audit",
        run.path,
        *STORY,
        "--audit",
        STORY[1],
        work / "stub.py",
        "--bank",
        *banks,
        *more,
    ]


def test_an_audit_reads_a_bank_and_says_what_that_is_worth(
    work, calibrated, clean, attacked, capsys
):
    manifest, run = ask(capsys, work, *audit(work, clean[3], calibrated.name, "--rate", "0.25"))
    verdict = json.loads(run.file("verdict.json").read_text())
    held = Bank.read(calibrated.file("bank.json"))
    for a, c in zip(verdict["audits"], held.audits, strict=True):
        values = [e.value for e in c.clean]
        assert (
            a["bank"]["clean"] == values
            and a["p"] == (1 + sum(v >= a["value"] for v in values)) / 4
        )
        assert a["words"] == ("evidence" if a["value"] > max(values) else "no evidence") and a[
            "threshold"
        ] == max(values)
        assert manifest["metrics"][f"{a['name']}.value"]["value"] == a["value"]
    assert (
        verdict["words"] == manifest["notes"]["words"]
        and manifest["notes"]["verdict"] == verdict["sentence"]
    )
    assert (
        "is clean" not in json.dumps(verdict)
        and not manifest["notes"]["incomplete"]
        and manifest["goal"] == []
    )
    text = (run.path / "report.html").read_text()
    assert "could not be made" not in text
    for title in ("What each audit says", "Inverted triggers", "What was not tested"):
        assert title in text
    assert re.search(r"<h1[^>]*>.*?</h1>", text)[0].count(verdict["sentence"][:20]) == 1
    _, again = ask(capsys, work, *audit(work, attacked, calibrated.name, "--rate", "0.25"))
    assert (
        again.manifest["goal"] and "attacked on purpose" in (again.path / "report.html").read_text()
    )


def test_inversions_are_where_repairs_read_them(work, calibrated, clean, capsys):
    _, run = ask(capsys, work, *audit(work, clean[3], calibrated.name, "--rate", "0.25"))
    inversions = receipt.load_inversions(run.path)
    facts = json.loads(run.file("verdict.json").read_text())["inversions"]
    assert len(inversions) == len(facts) == 2 and [float(i.pattern.max()) for i in inversions] == [
        0.0,
        1.0,
    ]
    assert (
        inversions[0].target == "striped star"
        and inversions[0].norm == 16
        and inversions[0].success == 0.5
    )
    assert (
        len(facts[0]["before"]) == len(facts[0]["after"]) == 8
        and 0 < facts[0]["turns_into"][0][1] <= 1
    )
    assert load_file(run.file("examples.safetensors"))["images"].shape == (8, 3, 32, 32)


def test_an_unfinished_run_has_a_page(work, calibrated, clean, capsys, tmp_path):
    _, run = ask(capsys, work, *audit(work, clean[3], calibrated.name, "--rate", "0.25"))
    for done, file in ((run, "verdict.json"), (calibrated, "bank.json")):
        copy = Run(Path(shutil.copytree(done.path, tmp_path / done.name)))
        (copy.path / file).unlink()
        (copy.path / "manifest.json").write_text(
            json.dumps(copy.manifest | {"status": "failed", "metrics": {}, "notes": {}})
        )
        assert "was not finished" in page.write_page(copy).read_text()


def test_sarif_states_what_the_verdict_does(work, calibrated, clean, capsys):
    _, run = ask(capsys, work, *audit(work, clean[3], calibrated.name, "--rate", "0.25"))
    log = json.loads(run.file("audit.sarif").read_text())
    audits = json.loads(run.file("verdict.json").read_text())["audits"]
    assert log["version"] == "2.1.0" and log["runs"][0]["tool"]["driver"]["name"] == "bezoar"
    for result, a in zip(log["runs"][0]["results"], audits, strict=True):
        assert (
            result["level"] == ("error" if a["words"] == "evidence" else "note")
            and a["sentence"] in result["message"]["text"]
        )


def spoilt(calibrated, tmp_path, shift):
    """The same bank with all values moved: whoever is audited is above it, or below."""
    held = Bank.read(calibrated.file("bank.json"))

    def moved(c: Calibration) -> Calibration:
        entries = (
            tuple(type(e)(e.name, e.value + shift) for e in part) for part in (c.clean, c.attacked)
        )
        return Calibration(c.audit, c.code, c.classifier, *entries)

    path = tmp_path / f"bank{shift:g}.json"
    Bank(held.family, held.sample, tuple(map(moved, held.audits))).write(path)
    return path


def test_fail_on_decides_the_exit_status(work, calibrated, clean, tmp_path, capsys):
    low, high = spoilt(calibrated, tmp_path, -1e6), spoilt(calibrated, tmp_path, 1e6)
    at = ("--rate", "0.25", "--fail-on")
    for bank, how, status in (
        (low, "never", 0),
        (low, "evidence", 3),
        (high, "evidence", 0),
    ):
        ask(capsys, work, *audit(work, clean[3], bank, *at, how), status=status)
    fewer = ("--rate", "0.05", "--fail-on")
    manifest, _ = ask(capsys, work, *audit(work, clean[3], low, *fewer, "evidence"), status=5)
    assert manifest["notes"]["words"] == "no calibration" and manifest["notes"]["uncalibrated"] == [
        "whitening",
        "stub",
    ]
    ask(capsys, work, *audit(work, clean[3], low, *fewer, "never"), status=0)


def test_what_was_audited_is_not_audited_again(work, calibrated, clean, capsys):
    before = {p.name for p in (work / "runs").glob("audit-*")}
    ask(capsys, work, *audit(work, clean[0], calibrated.name, "--rate", "0.3"))
    new = {p.name for p in (work / "runs").glob("audit-*")} - before
    assert len(new) == 1, "its two audits were the calibration's"


def test_an_audit_that_refuses_is_named_and_the_rest_done(work, clean, capsys):
    words = [
        "audit",
        clean[3].path,
        "--audit",
        STORY[1],
        f"{work / 'stub.py'}:least=99",
        "--images",
        "40",
    ]
    manifest, run = ask(capsys, work, *words, status=4)
    assert manifest["notes"]["incomplete"] == ["audit stub: too few classes"]
    log = json.loads(run.file("audit.sarif").read_text())["runs"][0]
    assert log["invocations"][0]["executionSuccessful"] is False and len(log["results"]) == 1
    assert "too few classes" in refused(
        capsys, work, "audit", clean[3].path, "--audit", words[4], "--images", "40"
    )


def test_a_disk_that_is_full_for_a_moment_refuses_no_audit(work, clean, capsys, monkeypatch):
    words = ("audit", clean[2].path, "--audit", STORY[1], work / "stub.py", "--images", "33")
    replace, failures = os.replace, []

    def replace_or_fail(source, target):
        if Path(target).name == "verdict.json" and not failures:
            failures.append(target)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        replace(source, target)

    monkeypatch.setattr(writing.os, "replace", replace_or_fail)
    assert "No space left" in refused(capsys, work, *words)
    manifest, run = ask(capsys, work, *words)
    assert "incomplete" not in manifest["notes"] or not manifest["notes"]["incomplete"]
    assert {"whitening.value", "stub.value"} <= set(manifest["metrics"])
    assert failures and not list(run.path.parent.rglob("*.tmp"))


def test_triggers_are_tried_on_a_reference(work, calibrated, clean, capsys):
    """Both are read through heads of the same classes; a reference of none is refused."""
    words = audit(work, clean[3], calibrated.name, "--reference", str(clean[1].path))
    _, run = ask(capsys, work, *words)
    inversions = json.loads((run.path / "verdict.json").read_text())["inversions"]
    shares = [i["reference"] for i in inversions if i["audit"] == "stub"]
    assert len(shares) == 2 and all(0 <= share <= 1 for pair in shares for share in pair)
    assert shares[0][1] == shares[1][1], "without a trigger both are the same"
    assert "The reference reads" in (run.path / "report.html").read_text()


def test_a_bank_for_others_calibrates_nothing(work, calibrated, clean, capsys):
    manifest, _ = ask(capsys, work, *audit(work, clean[3], calibrated.name), "--images", "20")
    notes = json.dumps(manifest["notes"])
    assert manifest["notes"]["words"] == "no calibration" and "20 clean images, not 40" in notes
    assert "calibrate with --images 20" in notes


def test_what_cannot_be_audited_is_one_line(work, calibrated, clean, attacked, tmp_path, capsys):
    one = ("--audit", STORY[1])
    few = refused(capsys, work, "audit", clean[0].path, "--data", "scenes:count=9,split=test", *one)
    assert "9 clean images" in few and "16" in few and "sensitive" in few
    assert "--parent" in refused(
        capsys, work, "audit", clean[0].path, "--audit", "parent", "--images", "40"
    )
    assert "--data" in refused(capsys, work, "audit", "open_clip:ViT-B-32", *one)
    assert "rate" in refused(capsys, work, "audit", clean[0].path, *one, "--rate", "0")
    assert "no bank" in refused(
        capsys, work, "audit", clean[0].path, *one, "--bank", "missing.json"
    )
    (tmp_path / "bad.json").write_text('{"schema": 1}')
    assert "bad.json" in refused(
        capsys, work, "audit", clean[0].path, *one, "--bank", tmp_path / "bad.json"
    )
    nan = Path(shutil.copytree(clean[0].path, tmp_path / "nan"))
    weights = load_file(nan / "encoder.safetensors")
    name = next(k for k in weights if weights[k].is_floating_point())
    weights[name][...] = torch.nan
    save_file(weights, nan / "encoder.safetensors")
    message = refused(capsys, work, "audit", nan, *one, "--images", "40")
    assert "NaN" in message and name in message
    assert "is poisoned" in refused(capsys, work, "calibrate", attacked.path, *one)
    assert "not attacked" in refused(
        capsys, work, "calibrate", clean[0].path, "--attacked", clean[1].path, *one
    )
    assert "--train" in refused(capsys, work, "calibrate", *one)


def test_calibrate_trains_encoders_each_with_data_of_its_own(work, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "run_trials", here)
    words = [
        "calibrate",
        "--train",
        "scenes:count=64,seed=5",
        "--network",
        "clip_small:width=4,dim=16",
        "--count",
        "2",
    ]
    words += ["--objective", "clip:epochs=1,batch=32", *STORY, "--workers", "1"]
    manifest, run = ask(capsys, work, *words)
    held = Bank.read(run.file("bank.json"))
    assert manifest["notes"]["clean"] == 2 and held.family.data.startswith("scenes:count=64")
    questions = [Run(work / "runs" / e.name).manifest["ask"] for e in held.audits[0].clean]
    assert [a["seed"] for a in questions] == [0, 1]
    assert [re.search(r"seed=(\d+)", a["data"]["spec"])[1] for a in questions] == ["5", "6"]


def test_encoders_of_two_kinds_are_no_bank(work, clean, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "run_trials", here)
    other = Train("scenes:count=96", "clip_small:width=8,dim=16", "clip:epochs=1,batch=48")
    run = execute(other, Settings(work / "runs", 0, "cpu", quiet=True))
    message = refused(capsys, work, "calibrate", clean[0].path, run.path, *STORY, "--workers", "1")
    assert "does not belong to this bank" in message and "network" in message


WITHOUT_BANK = (
    "--audit",
    "cleanse:steps=10,starts=2,halvings=1,confirm=8,again=0",
    "--images",
    "40",
)


def test_a_verdict_without_a_bank(work, clean, capsys, monkeypatch):
    """It is in the headline, in verdict.json and on the page, with every class; --fail-on follows
    its words.
    """
    monkeypatch.setattr(unaided_verdict, "LEAST_SHARE", 0.0)
    command = ["audit", clean[3].path, *WITHOUT_BANK]
    for least, words, level, status in (
        (99.0, "none found", "note", 0),
        (-1.0, "some evidence", "warning", 3),
    ):
        monkeypatch.setattr(unaided_verdict, "STRONG", 100.0)
        monkeypatch.setattr(unaided_verdict, "SOME", least)
        manifest, run = ask(
            capsys, work, *command, "--fail-on", "evidence", "--fresh", status=status
        )
        verdict = json.loads(run.file("verdict.json").read_text())
        (found,) = verdict["audits"]
        assert manifest["notes"]["words"] == words == verdict["words"] == found["unaided"]["grade"]
        assert found["words"] == "no calibration" and len(found["notes"]["targets"]) == 40
        assert manifest["metrics"]["cleanse.statistic"]["value"] == found["unaided"]["statistic"]
        log = json.loads(run.file("audit.sarif").read_text())
        (result,) = log["runs"][0]["results"]
        assert (
            result["level"] == level and found["unaided"]["sentence"] in result["message"]["text"]
        )
        text = (run.path / "report.html").read_text()
        headline = re.search(r"<h1[^>]*>.*?</h1>", text, re.DOTALL)[0]
        assert "could not be made" not in text and "No calibration" not in headline
        assert text.count("No calibration") <= 2 and "the smallest trigger of every target" in text
    monkeypatch.setattr(unaided_verdict, "LEAST_SHARE", 1.1)
    manifest, run = ask(capsys, work, *command, "--fail-on", "evidence", "--fresh", status=5)
    assert manifest["notes"]["words"] == "could not tell" and run.verb == "audit"
    assert Audit.undecided(manifest)[0].startswith("the search found")


def test_the_least_changes_of_images_stand_on_the_page(work, clean, capsys, monkeypatch):
    """Of each family a row, and images before and after; the verdict says what turns them."""
    monkeypatch.setattr(unaided_verdict, "SOME", -1.0)
    monkeypatch.setattr(unaided_verdict, "STRONG", 100.0)
    audit = "image_change:steps=20,batch=4,confirm=8,goal=0.1"
    command = (
        "audit",
        clean[3].path,
        *WITHOUT_BANK[-2:],
        "--audit",
        audit,
        "--fail-on",
        "evidence",
    )
    manifest, run = ask(capsys, work, *command, status=3)
    (found,) = json.loads(run.file("verdict.json").read_text())["audits"]
    assert found["unaided"]["sentence"].startswith("Some evidence of a backdoor: ")
    assert manifest["notes"]["words"] == "some evidence"
    changes = found["notes"]["changes"]
    assert len(changes) == 4 and all(len(c["targets"]) == 40 for c in changes)
    assert manifest["metrics"]["image_change.colour_least"]["value"] > 0
    text = (run.path / "report.html").read_text()
    assert "could not be made" not in text and "Classes reached" in text
    for c in changes:
        assert (f"image_change, {c['family']}, towards" in text) == c["targets"][0]["reached"]
    assert any("patches, pictures and noise" in line for line in manifest["notes"]["not_tested"])


def test_an_encoder_without_classes_is_read_by_its_clusters(work, tmp_path, capsys):
    """No head, no text and no labels: clusters of the vectors stand for classes."""
    run = execute(
        Train("scenes:count=96", NETWORK, "simclr:epochs=1,batch=48"),
        Settings(work / "runs", 0, "cpu", quiet=True),
    )
    images = registry.make("data", "scenes:count=60,split=test")().images
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    words = ["audit", run.path, "--data", f"folder:path={folder}", *WITHOUT_BANK]
    manifest, audited = ask(capsys, work, *words)
    (found,) = json.loads(audited.file("verdict.json").read_text())["audits"]
    assert "clusters" in found["classifier"] and found["notes"]["target"].startswith("cluster")
    assert manifest["notes"]["words"] in (
        "none found",
        "some evidence",
        "strong evidence",
        "could not tell",
    )


def test_an_audit_begins_with_what_it_can_say(work, calibrated, clean, capsys):
    command = ["audit", clean[1].path, *WITHOUT_BANK, "--audit", *WITHOUT_BANK[1:2], STORY[1]]
    capsys.readouterr()
    assert (
        main(
            [
                *map(str, command),
                "--bank",
                str(calibrated.file("bank.json")),
                "--rate",
                "0.3",
                "--runs",
                str(work / "runs"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    said = capsys.readouterr().err
    assert "whitening: evidence or none at false-positive rate 0.3" in said
    assert "cleanse: strong, some or no evidence" in said and re.search(r"about \d+ s", said)
