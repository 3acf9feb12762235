"""`scan --dedup`: of one picture with diverging captions the keep-list keeps as many records as
asked for.
"""

import functools
import json
from pathlib import Path

import pytest

from bezoar import Poison, Settings, execute, registry
from bezoar.attacks.plan import Plan
from bezoar.cli import main

NETWORK = '''"""Colours in a coarse grid. Made for tests."""

import torch
from torch import nn

from bezoar.encoders.encoder import Encoder, Preprocess, WordTokenizer
from bezoar.registry import method

WORDS = ("red", "blue", "green", "star", "cross")


@method
class Grid:
    def __call__(self, size, vocabulary):
        torch.manual_seed(0)
        image = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 24))
        texts = nn.EmbeddingBag(len(WORDS) + 1, 24)
        return Encoder(image, Preprocess(16), texts, WordTokenizer(WORDS), {"network": "grid"})
'''


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Plan]:
    """Runs, with a poison run of altered copies among them; the encoder's file; the plan."""
    folder = tmp_path_factory.mktemp("dedup")
    (folder / "grid.py").write_text(NETWORK)
    verb = Poison("scenes:count=400", "noisy_copies:captions=8,victims=3", target="striped star")
    run = execute(verb, Settings(runs=folder / "runs", quiet=True))
    make_trigger = functools.partial(registry.make, "trigger")
    return run.path, folder / "grid.py", Plan.read(run.file("plan.jsonl"), make_trigger)


def scan(poisoned: tuple[Path, Path, Plan], *words: str) -> tuple[int, Path]:
    run, encoder, _ = poisoned
    before = set(run.parent.glob("scan-*"))
    asked = ["scan", str(run), "--encoder", str(encoder), *words, "--runs", str(run.parent)]
    status = main([*asked, "--workers", "1"])
    return status, next(iter(set(run.parent.glob("scan-*")) - before), run)


@pytest.mark.parametrize("most", [1, 2])
def test_as_many_copies_of_a_victim_stay_as_asked_for(poisoned, most: int) -> None:
    status, folder = scan(
        poisoned, "--detector", "duplicates", "--remove", "0", "--dedup", str(most)
    )
    assert status == 0
    kept = (folder / "keep.txt").read_text().splitlines()
    _, _, plan = poisoned
    for goal in range(3):
        copies = {edit.id for edit in plan.edits if edit.goal == goal}
        assert len(copies) == 8 and len(copies.intersection(kept)) == most
    notes = json.loads((folder / "manifest.json").read_text())["notes"]
    assert notes["deduplicated"] == 3 * (8 - most) and notes["removed"] == 0
    assert len(kept) == 400 + 3 * 7 - 3 * (8 - most), "nothing else is left out"


def test_copies_come_first_in_a_scan_by_several_detectors(poisoned) -> None:
    status, folder = scan(poisoned, "--detector", "duplicates", "clip_score", "k_distance:k=8")
    assert status == 0
    worst = [record["id"] for record in json.loads((folder / "ranked.json").read_text())]
    _, _, plan = poisoned
    assert set(worst[:24]) == plan.ids
    goals = {edit.id: edit.goal for edit in plan.edits}
    for record in json.loads((folder / "ranked.json").read_text())[:24]:
        copy = record["copy_of"]
        assert (
            copy
            and copy != record["id"]
            and goals.get(copy, goals[record["id"]]) == goals[record["id"]]
        )
    page = (folder / "report.html").read_text()
    assert "Copies of one picture, each beside another with its caption" in page
    assert f'<p class="key" title="{worst[0]}">{worst[0]}</p>' in page
    assert page.count(">beside ") == 24


def test_dedup_is_refused_before_the_work(poisoned, capsys) -> None:
    for words in (("--detector", "k_distance:k=8", "--dedup", "1"), ("--dedup", "-1")):
        assert scan(poisoned, *words)[0] == 2
        assert "dedup must be at least 0" in capsys.readouterr().err
