"""What leaves, why, and how it is handed to tools in which people look at images."""

import base64
import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from bezoar.cli import main
from bezoar.detection import merging
from bezoar.detection.corpus.removal_lists import plain_cell
from bezoar.evaluation.scores import Scores
from bezoar.runs.run import Run

NETWORK = "clip_small:width=4,dim=8"
MARKS = """
import torch
from bezoar.registry import method
from bezoar.evaluation.scores import Scores
@method
class Marks:
    decides = True

    def __call__(self, encoder, source):
        ids = [i for batch in source.batches(64) for i in batch.ids]
        raised = torch.arange(len(ids)) % 10 == 3
        boxes = torch.where(raised[:, None], torch.tensor([8, 16, 4, 8]), torch.tensor(-1))
        return Scores(tuple(ids), torch.zeros(len(ids)), boxes, None, raised)
"""


@pytest.fixture
def folder(tmp_path):
    """Forty captioned images."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(40):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02d}.png")
        (tmp_path / "images" / f"{i:02d}.txt").write_text(f"=star {i}")
    (tmp_path / "marks.py").write_text(MARKS)
    return tmp_path


def scan(tmp_path, data, *words):
    train = ["train", str(data), "--network", NETWORK, "--objective", "clip:epochs=1,batch=10"]
    runs = tmp_path / "runs"
    assert main([*train, "--runs", str(runs)]) == 0
    (encoder,) = runs.glob("train-*")
    command = [
        "scan",
        str(data),
        "--encoder",
        encoder.name,
        "--detector",
        str(tmp_path / "marks.py"),
    ]
    assert main([*command, *words, "--runs", str(runs)]) == 0
    (run,) = runs.glob("scan-*")
    return Run(run)


def test_raised_records_come_first_whatever_their_scores():
    scores = Scores(("a", "b", "c", "d"), torch.tensor([4.0, 3.0, 2.0, 1.0]))
    raised = merging.raised_rows(
        [
            Scores(scores.ids, scores.values, raised=torch.tensor([False, False, True, False])),
            Scores(scores.ids, scores.values, raised=torch.tensor([False, False, False, True])),
            scores,
        ],
        4,
    )
    assert raised.tolist() == [False, False, True, True]
    assert merging.order_records(scores, raised).tolist() == [2, 3, 0, 1]


def test_what_is_raised_leaves_whatever_share_is_removed(folder):
    run = scan(folder, folder / "images", "--remove", "0")
    kept = (run.path / "keep.txt").read_text().split()
    rows = list(csv.DictReader((run.path / "removed.csv").open()))
    gone = {f"{i:02d}.png" for i in (3, 13, 23, 33)}
    assert {row["id"] for row in rows} == gone and len(kept) == 36 and not gone & set(kept)
    assert all(row["why"].startswith("raised by ") for row in rows)
    assert {row["caption"] for row in rows} == {f"'=star {i}" for i in (3, 13, 23, 33)}
    scores = list(csv.DictReader((run.path / "scores.csv").open()))
    assert [row["id"] for row in scores] == [f"{i:02d}.png" for i in range(40)]
    table = run.table("scores")
    assert len(table) == 40 and "score" in (
        table.columns if hasattr(table, "loc") else table.column_names
    )


def test_what_is_ranked_leaves_with_its_rank(folder):
    run = scan(folder, folder / "images", "--remove", "0.25")
    rows = list(csv.DictReader((run.path / "removed.csv").open()))
    assert [row["why"].partition(" ")[0] for row in rows] == ["raised"] * 4 + ["rank"] * 6
    assert rows[-1]["why"] == "rank 10 by score"


def test_label_studio_gets_tasks_with_paths_windows_and_reasons(folder):
    run = scan(folder, f"folder:path={folder / 'images'},size=32", "--export", "label-studio")
    tasks = json.loads((run.path / "label-studio.json").read_text())
    assert len(tasks) == 40 and "label-studio.json" in run.summary.files
    task = tasks[0]
    assert task["data"]["image"] == str(folder / "images" / task["data"]["id"])
    choice, window = task["predictions"][0]["result"]
    assert choice["value"]["choices"] == ["raised"]
    assert window["value"] == {
        "x": 50.0,
        "y": 25.0,
        "width": 25.0,
        "height": 12.5,
        "rotation": 0,
        "rectanglelabels": ["trigger"],
    }
    assert len(tasks[-1]["predictions"][0]["result"]) == 1


def test_images_without_files_of_their_own_go_along(folder):
    data = "scenes:count=40"
    run = scan(folder, data, "--export", "label-studio")
    tasks = json.loads((run.path / "label-studio.json").read_text())
    head, _, content = tasks[0]["data"]["image"].partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (32, 32)


def test_fiftyone_gets_a_detection_data_set(folder):
    run = scan(folder, "scenes:count=40", "--export", "fiftyone")
    places = json.loads((run.path / "fiftyone" / "data.json").read_text())
    content = json.loads((run.path / "fiftyone" / "labels.json").read_text())
    assert places.keys() == content["labels"].keys() and len(places) == 40
    assert all(Image.open(path).size == (32, 32) for path in places.values())
    (label,) = content["labels"]["00000"]
    assert label["label"] == "raised" and label["bounding_box"] == [0.5, 0.25, 0.25, 0.125]
    (label,) = content["labels"]["00039"]
    assert label["label"] == "ranked" and label["bounding_box"] == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(("text", "cell"), [("=1+1", "'=1+1"), ("a = b", "a = b"), ("@x", "'@x")])
def test_no_caption_is_a_formula(text, cell):
    assert plain_cell(text) == cell
