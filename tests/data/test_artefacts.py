"""Files of runs are read within bounds, whatever lies in their place."""

import os

import pytest
import torch

from bezoar.data.files import artefacts, tensors, writing
from bezoar.errors import UserError


def as_fifo(path):
    os.mkfifo(path)


def as_device(path):
    path.symlink_to("/dev/zero")


def as_loop(path):
    path.symlink_to(path)


def as_giant(path):
    with path.open("wb") as file:
        file.truncate(200 << 30)


def as_folder(path):
    path.mkdir()


def as_link(path):
    path.with_name("other").write_text("{}")
    path.symlink_to(path.with_name("other"))


@pytest.mark.parametrize("make", [as_fifo, as_device, as_loop, as_giant, as_folder, as_link])
def test_only_regular_files_of_a_bounded_size_are_read(tmp_path, make):
    path = tmp_path / "x.json"
    make(path)
    with pytest.raises(UserError, match=r"x\.json"):
        artefacts.read_json(path)
    with pytest.raises(UserError, match=r"x\.json"):
        tensors.read_tensors(path)


@pytest.mark.parametrize(
    "text",
    ["", "[" * 200_000 + "]" * 200_000, '{"a":' * 200_000, "1" * 1_000_000, "{", "\udc80"],
)
def test_json_that_cannot_be_read_is_one_line(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"x\.json") as problem:
        artefacts.read_json(path)
    assert "\n" not in str(problem.value) and len(str(problem.value)) < 400


def test_a_key_that_is_missing_or_of_another_type_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1, "b": {"c": [{}]}, "d": [1]}')
    facts = artefacts.read_facts(path)
    assert facts.object("b").objects("c") == [{}] and facts == {
        "a": 1,
        "b": {"c": [{}]},
        "d": [1],
    }
    for read in (
        lambda: facts["e"],
        lambda: facts.text("a"),
        lambda: facts["b"]["x"],
        lambda: facts.texts("d"),
        lambda: facts.object("d"),
    ):
        with pytest.raises(UserError, match=r"x\.json: "):
            read()


def test_tensors_are_written_whole_and_never_through_a_link(tmp_path):
    target, path = tmp_path / "precious", tmp_path / "x.safetensors"
    target.write_text("mine")
    path.symlink_to(target)
    tensors.write_tensors(path, {"a": torch.arange(3)})
    assert target.read_text() == "mine" and not path.is_symlink()
    assert tensors.read_tensors(path)["a"].tolist() == [0, 1, 2]


def test_folders_of_a_run_are_its_own(tmp_path):
    outside, link = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    (outside / "a.tar").write_text("mine")
    link.symlink_to(outside)
    writing.remove_folder(link)
    assert not link.exists() and (outside / "a.tar").exists()
    link.symlink_to(outside)
    writing.make_folder(link)
    assert link.is_dir() and not link.is_symlink() and not list(link.iterdir())
