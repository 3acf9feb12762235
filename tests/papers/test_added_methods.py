"""`reproduce --add`: a method of one's own beside those of a table."""

import json
import re
from pathlib import Path

import pytest
import torch

from bezoar import registry
from bezoar.cli import main
from bezoar.runs.tables import TableOptions

MINE = """
import torch
from bezoar.evaluation.scores import Scores
from bezoar.registry import method
@method
class Mine:
    k: int = 2

    def __call__(self, encoder, source):
        e = encoder.embed(source)
        nearest = torch.cdist(e.images, e.images).topk(self.k, largest=False).values
        return Scores(e.ids, -nearest[:, -1])
"""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["matrix/detection", "--add", "detector"], "--add takes pairs of a kind and a method"),
        (["matrix/detection", "--add", "deteктor", "dao"], "--add takes pairs"),
        (["matrix/detection", "--add", "audit", "decree"], "compares no audits"),
        (["carlini2022/poisons", "--add", "detector", "dao"], "compares no detectors"),
        (["matrix/detection", "--add", "detector", "nowhere.py"], "nowhere.py"),
    ],
)
def test_what_has_no_row_is_refused(words, says, tmp_path, capsys):
    command = ["reproduce", *words, "--scale", "smoke", "--runs", str(tmp_path)]
    assert main(command) == 2
    assert says in capsys.readouterr().err


def test_the_trigger_and_the_repair_of_the_page_are_what_it_says(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text()
    _, stripe, shake = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "stripe.py").write_text(stripe)
    (tmp_path / "shake.py").write_text(shake)
    registry.allow(f"{tmp_path}/stripe.py")
    registry.allow(f"{tmp_path}/shake.py")
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    stamped = registry.make("trigger", f"{tmp_path}/stripe.py:row=3")(images, ("a", "b"))
    assert not images.any() and (stamped[:, :, 3] == 255).all() and stamped.sum() == 2 * 3 * 8 * 255
    encoder = registry.make("network", "clip_small:width=4,dim=8")(32, ("star",))
    repair = registry.make("repair", f"{tmp_path}/shake.py")
    repaired = repair(encoder, None, 0)
    assert repaired.about["repaired"] == [registry.spec(repair)] and not encoder.about.get(
        "repaired"
    )
    weights = zip(encoder.image.parameters(), repaired.image.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in weights)


def test_an_own_trigger_is_one_of_the_attacks_of_a_table(tmp_path):
    spec = f"{tmp_path}/stripe.py:row=3"
    own = TableOptions("smoke", added=(("trigger", spec),))
    plain, table = (
        registry.make("paper", "matrix/detection")(o) for o in (TableOptions("smoke"), own)
    )
    new = {row.curve for row in table.rows} - {row.curve for row in plain.rows}
    assert new == {"stripe, 3.52 %"}
    (cell, *_) = next(row for row in table.rows if row.curve in new).cells
    trial = cell.readings[0][0]
    assert trial.verb.data.data.trigger == spec and len(set(map(str, table.trials))) > len(
        plain.trials
    )


@pytest.mark.slow
def test_an_own_detector_stands_in_the_table_with_the_same_encoders(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    spec = f"{tmp_path / 'mine.py'}:k=3"
    words = ["reproduce", "matrix/detection", "--scale", "smoke", "--runs", str(tmp_path / "runs")]
    assert main([*words, "--add", "detector", spec, "--workers", "1", "--json"]) == 0
    short = json.loads(capsys.readouterr().out)
    (table,) = json.loads(Path(short["files"]["tables.json"]).read_text())
    mine = [row for row in table["rows"] if row["name"] == spec]
    curves = {row["curve"] for row in table["rows"]}
    assert {row["curve"] for row in mine} == curves
    assert all(len(row["cells"]) == 7 for row in mine)
    assert spec.partition(":")[0] in Path(short["files"]["tables.csv"]).read_text()
