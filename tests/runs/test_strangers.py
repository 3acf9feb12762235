"""Runs that anybody may have made: nothing in them is believed, fetched, followed or
overwritten.
"""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bezoar import registry
from bezoar.cli import main
from bezoar.data.files import writing
from bezoar.errors import UserError
from bezoar.runs import inputs
from bezoar.runs.run import Run

BACKDOOR = ["--poison", "backdoor:count=20", "--trigger", "patch:size=6"]
POISON = ["poison", "scenes:count=100", *BACKDOOR, "--target", "striped star"]
VALUES = (None, 7, -1, True, "", "x\x1b[2J", "../../etc/passwd", [], {}, [[]], [None], {"x": {}})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A poison run, and an encoder that was trained on it."""
    runs = tmp_path_factory.mktemp("made") / "runs"
    assert main([*POISON, "--runs", str(runs)]) == 0
    train = ["train", "poison", "--objective", "clip:epochs=1,batch=32"]
    assert main([*train, "--runs", str(runs)]) == 0
    return runs


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """The same runs, to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "runs"))


def find(runs: Path, verb: str) -> Run:
    (path,) = runs.glob(f"{verb}-*")
    return Run(path)


def respell(run: Run, **changes) -> None:
    """Change fields of a manifest."""
    (run.path / "manifest.json").write_text(json.dumps(run.manifest | changes))


def refused(capsys, *words) -> str:
    """The one line with which a command refuses its input."""
    capsys.readouterr()
    assert main([*map(str, words)]) == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err.rstrip().count("\n") <= 1 and "\x1b" not in shown.err
    return shown.err


@pytest.mark.parametrize("file", ["manifest.json", "encoder.json"])
def test_fields_of_any_type_end_in_one_line(runs, file, capsys):
    path = find(runs, "train").path / file
    raw = json.loads(path.read_text())
    words = ["evaluate", "train", "scenes:count=40,split=test", "--runs", str(runs)]
    for key in raw:
        for value in VALUES:
            path.write_text(json.dumps(raw | {key: value}))
            assert main(["show", "train", "--runs", str(runs)]) in (0, 2), (key, value)
            capsys.readouterr()
            if file == "encoder.json":
                assert main(words) in (0, 2), (key, value)
                shown = capsys.readouterr()
                assert "\x1b" not in shown.out + shown.err


@pytest.mark.parametrize("value", VALUES)
def test_a_plan_of_any_type_is_one_line(runs, value, capsys):
    path = find(runs, "poison").path / "plan.jsonl"
    header, edit, *rest = path.read_text().splitlines()
    for key in json.loads(header):
        spoilt = json.dumps(json.loads(header) | {key: value})
        path.write_text("\n".join([spoilt, edit, *rest]) + "\n")
        assert main(["verify", "poison", "--runs", str(runs)]) in (0, 2)
    for key in json.loads(edit).keys() - ({"triggered"} if value is True else set()):
        spoilt = json.dumps(json.loads(edit) | {key: value})
        path.write_text("\n".join([header, spoilt, *rest]) + "\n")
        refused(capsys, "verify", "poison", "--runs", runs)


@pytest.mark.parametrize(
    "value", [*VALUES, 1e308, 10**400, "<script>alert(1)</script>", "'><img src=x>"]
)
def test_a_strangers_run_in_a_notebook_is_inert(runs, value):
    """Whatever its summary holds: no markup gets through, and nothing is raised."""
    run = find(runs, "train")
    facts = json.loads((run.path / "summary.json").read_text())
    places = [("finding",), ("figures",), ("files",), ("lines",)]
    places += [("figures", 0, key) for key in ("label", "text", "value", "low", "n")]
    for place in places:
        spoilt = json.loads(json.dumps(facts))
        node = spoilt
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value
        (run.path / "summary.json").write_text(json.dumps(spoilt))
        shown = Run(run.path)._repr_html_()
        assert "<script" not in shown and "<img" not in shown and "\x1b" not in shown, place
    for text in (
        "[" * 200_000,
        '{"n": Infinity}',
        json.dumps(facts).replace('"n": ', '"n": 1e999, "m": '),
    ):
        (run.path / "summary.json").write_text(text)
        assert Run(run.path)._repr_html_().startswith("<p>")


def test_a_run_that_is_its_own_parent_is_told(runs, capsys):
    run = find(runs, "train")
    respell(run, parents=[run.name] * 10, ask=run.manifest["ask"] | {"data": {"run": run.name}})
    assert "made from itself" in refused(
        capsys, "train", "train", "--objective", "clip:epochs=1", "--runs", runs
    )
    assert run.ancestor("poison") is None
    assert main(["show", run.name, "--page", str(runs / "x.html"), "--runs", str(runs)]) == 0


def test_parents_beyond_number_and_paths_as_names_are_refused(runs, capsys):
    run = find(runs, "train")
    respell(run, parents=[f"train-{i}" for i in range(100_000)])
    assert "parents" in refused(capsys, "show", "train", "--runs", runs)
    with pytest.raises(UserError, match="expected a name"):
        find(runs, "poison").sibling("../../etc")


def pictures(folder: Path) -> Path:
    """Somebody's own pictures."""
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.full((32, 32, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"somebody {i}")
    return folder


def test_a_received_run_opens_only_what_its_fingerprint_proves(runs, tmp_path, capsys):
    folder, run = pictures(tmp_path / "private"), find(runs, "poison")
    spec = registry.spec(registry.make("data", f"folder:path={folder},size=32"))
    for files in ({}, {"files": "0" * 16}):
        respell(run, ask=run.manifest["ask"] | {"data": {"spec": spec, "source": "", **files}})
        with pytest.raises(UserError, match="are not those that run"):
            inputs.root_method(run)
    page = tmp_path / "x.html"
    assert main(["show", "poison", "--page", str(page), "--runs", str(runs)]) == 0
    assert "are not those that run" in page.read_text()
    assert "are not those" in refused(capsys, "verify", "poison", "--runs", runs)


def test_a_plan_names_no_victims_that_were_not_asked_for(runs, tmp_path):
    folder, run = pictures(tmp_path / "private"), find(runs, "poison")
    path = run.path / "plan.jsonl"
    header, *edits = path.read_text().splitlines()
    spoilt = json.loads(header) | {"victims": f"folder:path={folder},size=32"}
    path.write_text("\n".join([json.dumps(spoilt), *edits]) + "\n")
    with pytest.raises(UserError, match="names victims that the run was not asked for"):
        _ = inputs.open_dataset(run).pairs


def test_nothing_is_downloaded_because_a_run_says_so(runs, tmp_path, monkeypatch):
    from torchvision.datasets import utils

    monkeypatch.setattr(utils, "download_and_extract_archive", lambda *_, **__: pytest.fail())
    run = find(runs, "poison")
    spec = f"cifar10:root={tmp_path / 'new'},download=true"
    respell(run, ask=run.manifest["ask"] | {"data": {"spec": spec, "source": "", "files": "0"}})
    with pytest.raises(UserError):
        inputs.root_method(run)
    assert not (tmp_path / "new").exists()


def test_victims_that_were_asked_for_are_opened_again(tmp_path):
    runs, folder = tmp_path / "runs", pictures(tmp_path / "victims")
    words = ["poison", "scenes:count=100", "--poison", "targeted:victims=1,captions=4"]
    words += ["--target", "striped star"]
    assert main([*words, "--victims", f"folder:path={folder},size=32", "--runs", str(runs)]) == 0
    run = find(runs, "poison")
    assert len(inputs.open_dataset(run).pairs) == 104
    assert main(["verify", "poison", "--runs", str(runs)]) == 0
    (folder / "0.png").write_bytes((folder / "1.png").read_bytes())
    with pytest.raises(UserError, match="are not those that run"):
        _ = inputs.open_dataset(run).pairs


def test_a_trigger_opens_only_files_that_a_run_was_asked_for_with(tmp_path, capsys):
    runs, folder = tmp_path / "runs", pictures(tmp_path / "pictures")
    trigger = ["--trigger", f"file:path={folder / '0.png'},size=6", "--target", "striped star"]
    words = ["poison", "scenes:count=100", "--poison", "backdoor:count=20", *trigger]
    assert main([*words, "--runs", str(runs)]) == 0
    run = find(runs, "poison")
    assert main(["verify", "poison", "--runs", str(runs)]) == 0
    assert len(inputs.open_dataset(run).pairs) == 100
    private = folder / "1.png"
    spec = registry.spec(registry.make("trigger", f"file:path={private},size=6"))
    with pytest.raises(UserError, match="are not those that run"):
        inputs.recorded_trigger(spec, run)
    path = run.path / "plan.jsonl"
    path.write_text(path.read_text().replace("0.png", "1.png"))
    assert "are not those" in refused(capsys, "verify", "poison", "--runs", runs)
    goal = run.manifest["goal"][0] | {"trigger": spec}
    respell(run, goal=[goal])
    with pytest.raises(UserError, match="are not those that run"):
        inputs.goals_to_stamp(run)
    assert [g.trigger for g in inputs.known_goals(run)] == [spec], "naming it opens nothing"


@pytest.mark.parametrize(
    "name", ["report.html", ".lock", "plan.jsonl", "manifest.json", "report.html.tmp"]
)
def test_no_link_in_a_run_is_followed(made, tmp_path, name):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    folder = tmp_path / "runs" / find(made, "poison").name
    folder.mkdir(parents=True)
    (folder / name).symlink_to(mine)
    assert main([*POISON, "--runs", str(tmp_path / "runs")]) in (0, 2)
    assert mine.read_text() == "mine"


def test_shards_that_are_a_link_lose_nothing(tmp_path):
    words, runs, outside = [*POISON, "--write", "shards"], tmp_path / "runs", tmp_path / "outside"
    outside.mkdir()
    (outside / "00000.tar").write_text("mine")
    assert main([*words, "--runs", str(runs)]) == 0
    folder = find(runs, "poison").path
    shutil.rmtree(folder / "shards")
    (folder / "shards").symlink_to(outside)
    assert main([*words, "--runs", str(runs), "--fresh"]) == 0
    assert (outside / "00000.tar").read_text() == "mine"
    assert (folder / "shards").is_dir() and not (folder / "shards").is_symlink()


def test_a_run_is_not_written_through_a_link(made, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "runs" / find(made, "poison").name).symlink_to(tmp_path / "outside")
    assert "is a link" in refused(capsys, *POISON, "--runs", tmp_path / "runs")
    assert not list((tmp_path / "outside").iterdir())


def test_a_run_that_was_killed_before_its_page_gets_it(runs):
    page = find(runs, "poison").path / "report.html"
    debris = page.with_name("report.html.0123456789ab.tmp")
    page.unlink()
    debris.write_text("half")
    before = (page.parent / "manifest.json").read_text()
    assert main([*POISON, "--runs", str(runs)]) == 0
    assert page.is_file() and not debris.exists()
    assert (page.parent / "manifest.json").read_text() == before


def test_debris_is_no_output(tmp_path):
    assert main([*POISON, "--runs", str(tmp_path)]) == 0
    run = find(tmp_path, "poison")
    outputs = run.manifest["outputs"]
    (run.path / "plan.jsonl.0123456789ab.tmp").write_text("half")
    respell(run, status="running")
    assert main([*POISON, "--runs", str(tmp_path)]) == 0
    assert run.manifest["outputs"] == outputs


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["poison", "scenes:count=1000000000000", *POISON[2:]], "GiB; "),
        (["train", "scenes", "--network", "clip_small:width=100000000"], "width is at most"),
        (["train", "scenes", "--objective", "clip:lr=nan"], "lr must be float"),
        (["train", "scenes:count=" + "(" * 20_000 + ")" * 20_000], "nested more than"),
        (["train", "folder:path=~nosuchuser/x"], "no such home directory"),
        (["train", "shards:path={0..99999999999}.tar"], "names more than"),
        (["train", "x\udc80.csv"], "missing"),
        ([*POISON[:-1], "a \udc80 star"], "no caption holds the target"),
    ],
)
def test_what_is_asked_has_bounds(tmp_path, words, reason, capsys):
    start = time.monotonic()
    assert reason in refused(capsys, *words, "--runs", tmp_path)
    assert time.monotonic() - start < 20


def test_folders_that_cannot_be_are_one_line(runs, tmp_path, capsys):
    assert "too long" in refused(capsys, *POISON, "--runs", tmp_path / ("x" * 300))
    page = tmp_path / "nowhere" / "x.html"
    error = refused(capsys, "show", "poison", "--runs", runs, "--page", page)
    assert f"{page}: No such file" in error


def test_json_of_a_run_is_whole_and_its_own(tmp_path):
    writing.write_json(tmp_path / "x.json", {"a": "é"})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": "é"}
    assert os.listdir(tmp_path) == ["x.json"]
