"""`reproduce --add`: a method of one's own beside those of a table."""

import json
from pathlib import Path

import pytest

from bezoar.cli import main

MINE = """
import torch
from bezoar.evaluation.scores import Scores
from bezoar.registry import method
@method
class Mine:
    k: int = 2

    def __call__(self, encoder, source):
        e = encoder.embed(source)
        return Scores(e.ids, -torch.cdist(e.images, e.images).topk(self.k, largest=False).values[:, -1])
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
