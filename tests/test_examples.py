"""The scripts of examples/, each run on small data, and the example of CONTRIBUTING."""

import csv
import importlib.util
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from bezoar import Settings, Train, execute, registry
from bezoar.cli import main

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NETWORK = "clip_small:width=4,dim=16"
OBJECTIVE = "clip:epochs=1,batch=64"
DATA = "scenes:count=128"
TEST = "scenes:count=80,split=test"

TABLE = f'''
from bezoar.registry import method
from bezoar.runs.tables import Cell, Claim, Row, Table, TableOptions
from bezoar.runs.verb import Trial
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.train import Train


@method
class Tiny:
    def __call__(self, options: TableOptions) -> Table:
        verb = Evaluate(Train("{DATA}", "{NETWORK}", "{OBJECTIVE}"), "{TEST}", ("zero_shot",))
        accuracy = Cell.mean("CA", [Trial(verb, 0), Trial(verb, 1)], "clean_accuracy")
        claim = Claim(
            "Accuracy is above chance",
            "ours",
            "+",
            lambda r: r.compare_with_bound(accuracy, 1 / 40),
        )
        return Table("Tiny", rows=(Row("two seeds", (accuracy,)),), claims=(claim,))
'''

if not EXAMPLES.is_dir():
    pytest.skip("examples/ is not beside the tests", allow_module_level=True)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """One folder of runs for all examples, so that what one trained serves the next."""
    return Settings(tmp_path_factory.mktemp("runs"), quiet=True)


@pytest.fixture(scope="module")
def encoder(settings):
    return execute(Train(DATA, NETWORK, OBJECTIVE), settings)


def run_example(name, *arguments, **options):
    """Load a script and call its `main`."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(*arguments, **options)


def test_every_example_has_a_test():
    called = re.findall(r'run_example\(\s*"(\w+)"', Path(__file__).read_text())
    assert sorted(called) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


def test_scan_my_folder(tmp_path, settings, capsys):
    pairs = registry.make("data", DATA)()
    for name, image, caption in zip(pairs.ids, pairs.images, pairs.captions, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    run_example("scan_my_folder", str(tmp_path), NETWORK, OBJECTIVE, settings=settings)
    printed = capsys.readouterr().out
    keep = Path(re.search(r"what to keep: (.*)", printed)[1])
    assert len(keep.read_text().splitlines()) == 128 - 6  # the worst 5 % are left out


def test_audit_a_checkpoint(tmp_path, settings, capsys):
    torch.manual_seed(0)
    torch.save(resnet18(num_classes=5).state_dict(), tmp_path / "resnet18.pth")
    audits = ("decree:steps=2,restarts=2",)
    run_example(
        "audit_a_checkpoint",
        str(tmp_path / "resnet18.pth"),
        "scenes:count=40,split=test",
        *audits,
        images=16,
        settings=settings,
    )
    printed = capsys.readouterr().out
    assert "decree:" in printed and "no calibration" in printed


def test_poison_and_train(settings, capsys):
    run_example("poison_and_train", DATA, TEST, NETWORK, OBJECTIVE, settings=settings)
    printed = capsys.readouterr().out
    assert "(ASR)" in printed and "n = " in printed


def test_reproduce_a_table(tmp_path, encoder, settings, capsys):
    """With a table of the user's own, of two trials: those that ship take longer."""
    (tmp_path / "tiny.py").write_text(TABLE)
    run_example("reproduce_a_table", str(tmp_path / "tiny.py"), settings=settings)
    printed = capsys.readouterr().out
    assert "two seeds: CA 0." in printed and "Accuracy is above chance: " in printed


def test_my_detector(encoder, settings, capsys):
    run_example("my_detector", DATA, encoder, settings=settings)
    assert "keep.txt leaves out" in capsys.readouterr().out


def test_results_as_table(encoder, settings):
    file = io.StringIO()
    run_example("results_as_table", str(settings.runs), file)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert {"run", "metric", "value", "n"} <= rows[0].keys()
    assert encoder.name in {row["run"] for row in rows}


def test_the_example_of_contributing_runs_as_printed(tmp_path, encoder, settings, monkeypatch):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    runs = str(settings.runs)
    assert main(["scan", encoder.name, "--detector", "./mine.py:k=4", "--runs", runs]) == 0
    (scan,) = (
        run
        for run in settings.runs.glob("scan-*")
        if "mine.py" in (run / "manifest.json").read_text()
    )
    assert (scan / "report.html").is_file()
    assert main(["scan", encoder.name, "--detector", "./mine.py:k=0", "--runs", runs]) == 2
