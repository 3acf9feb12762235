"""`bezoar scan DATA`, the first thing people type: a small model is trained on the data, said
beforehand.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bezoar.cli import main
from bezoar.data.files.images import read_shorter_side
from bezoar.data.files.skipped import Unreadable
from bezoar.detection import suspect_training
from bezoar.detection.corpus.corpus import reopen_corpus
from bezoar.errors import UserError
from bezoar.runs import inputs
from bezoar.runs.run import Run
from bezoar.verbs.scan import DEFAULT_DETECTORS

CAPTIONS = ("a red star over a wall", "a blue cross", "the green square", "an orange ring")


@pytest.fixture
def brief(monkeypatch):
    """A training of one epoch."""
    monkeypatch.setattr(suspect_training, "MAX_PAIRS", 64)


@pytest.fixture
def images(tmp_path):
    """220 captioned images of 80 pixels."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(220):
        pixels = rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(CAPTIONS[i % 4])
    return folder


def scan(tmp_path, *words):
    status = main(["scan", *map(str, words), "--runs", str(tmp_path / "runs"), "--workers", "1"])
    return status, Run(next((tmp_path / "runs").glob("scan-*")))


def test_a_folder_is_scanned_by_a_model_that_was_trained_on_it(tmp_path, images, brief, capsys):
    status, run = scan(tmp_path, images, "--fail-on", "trigger")
    errors = capsys.readouterr().err.splitlines()
    assert status == 0
    first = next(line for line in errors if line.startswith("scan: "))
    assert first.startswith(
        "scan: no encoder is given: clip_small is trained on 220 of these records"
    )
    assert f"then {', '.join(DEFAULT_DETECTORS)}, repetition and side channels" in first
    (train,) = [parent for parent in run.parents if parent.verb == "train"]
    assert train.manifest["notes"]["records"] == 220
    notes = run.manifest["notes"]
    assert notes["untrained"] == "" and "leaks" in notes
    assert len(notes["detectors"]) == len(DEFAULT_DETECTORS) + 1
    assert (run.path / "keep.txt").read_text().count("\n") == 213
    assert "could not be made" not in (run.path / "report.html").read_text()


def test_small_images_are_trained_on_and_scanned_at_their_own_size(tmp_path, images, brief):
    for path in images.glob("*.png"):
        Image.open(path).resize((40, 48)).save(path)
    (images / "000.png").write_text("no image")
    (images / "001.png").chmod(0)  # root reads it all the same
    status, run = scan(tmp_path, images, "--detector", "clip_score")
    (train,) = [parent for parent in run.parents if parent.verb == "train"]
    assert status == 4 and "size=40," in train.manifest["ask"]["data"]["spec"]
    assert run.manifest["notes"]["size"] == 40 and reopen_corpus(run).size == 40
    assert (run.path / "keep.txt").read_text().count("\n") > 200


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_the_side_of_what_is_no_image_is_not_read(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    for image in (content, tmp_path / "x.png", tmp_path / "absent.png"):
        with pytest.raises(Unreadable):
            read_shorter_side(image)


def test_tars_of_a_shells_glob_are_one_data_set(tmp_path, images, brief):
    for number in range(2):
        with tarfile.open(tmp_path / f"{number:05d}.tar", "w") as tar:
            for i in range(45 * number, 45 * number + 45):
                for ending in ("png", "txt"):
                    tar.add(images / f"{i:03d}.{ending}", f"{i:03d}.{ending}")
    tars = sorted(tmp_path.glob("*.tar"))
    _, run = scan(tmp_path, *tars, "--detector", "clip_score")
    assert run.manifest["notes"]["records"] == 90
    assert len(json.loads((run.path / "ranked.json").read_text())) == 90


def test_a_poison_run_is_scanned_with_its_poisons(tmp_path, brief):
    words = [
        "--poison",
        "backdoor:count=20",
        "--trigger",
        "patch:size=6",
        "--target",
        "striped star",
    ]
    runs = ["--runs", str(tmp_path / "runs")]
    assert main(["poison", "scenes:count=200", *words, *runs]) == 0
    (poison,) = (tmp_path / "runs").glob("poison-*")
    _, run = scan(tmp_path, poison.name, "--detector", "duplicates", "clip_score")
    (train,) = [parent for parent in run.parents if parent.verb == "train"]
    assert train.metric("poisons_kept").value == 20
    assert "poisons_removed" in run.metrics


def test_images_without_captions_are_refused_first_and_taken_by_what_reads_none(
    tmp_path, images, brief, capsys
):
    for path in images.glob("*.txt"):
        path.unlink()
    status, _ = scan(tmp_path, f"folder:path={images},layout=flat")
    assert status == 2 and "--detector dao looks at images alone" in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("train-*"))
    status = main(
        [
            "scan",
            f"folder:path={images},layout=flat,size=32",
            "--detector",
            "dao:k=8",
            "--runs",
            str(tmp_path / "runs"),
            "--workers",
            "1",
        ]
    )
    assert status == 0
    (train,) = (tmp_path / "runs").glob("train-*")
    assert Run(train).manifest["ask"]["network"]["spec"].startswith("tower")


@pytest.mark.parametrize(
    ("records", "size", "epochs", "batch"),
    [(32, 64, 40, 8), (1000, 64, 40, 128), (20_000, 32, 7, 128), (50_000, 64, 3, 128)],
)
def test_the_training_is_bounded(records, size, epochs, batch):
    plan = suspect_training.plan_training(records, size, True)
    assert plan.objective == f"clip:epochs={epochs},batch={batch}" and plan.epochs == epochs
    assert epochs * records <= suspect_training.MAX_PAIRS and plan.minutes > 0


def test_few_records_are_refused():
    with pytest.raises(UserError, match="too few to train a model on"):
        suspect_training.plan_training(31, 64, True)


def test_which_data_an_encoder_saw(tmp_path, images, brief):
    words = ["--network", "clip_small:width=4,dim=8", "--objective", "clip:epochs=1,batch=32"]
    runs = ["--runs", str(tmp_path / "runs")]
    assert main(["train", "scenes:count=64", *words, *runs]) == 0
    train = Run(next((tmp_path / "runs").glob("train-*")))
    from bezoar import registry

    def saw(spec):
        return inputs.was_trained_on(train, registry.make("data", spec))

    assert saw("scenes:count=64") and not saw("scenes:count=64,seed=1")
    assert not saw("scenes:count=65") and not saw(f"folder:path={images}")
    assert inputs.was_trained_on(train, train)
    poison = ["--poison", "backdoor:count=3", "--trigger", "patch", "--target", "star"]
    assert main(["poison", "scenes:count=64", *poison, *runs]) == 0
    poisoned = Run(next((tmp_path / "runs").glob("poison-*")))
    assert not inputs.was_trained_on(train, poisoned)
    assert Path(train.path / "encoder.json").exists()
