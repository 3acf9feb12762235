"""Scans of the same data with the same encoder share their vectors and scores."""

import shutil
from pathlib import Path

import pytest
import torch
from verbs.test_scan import NETWORK, notes, records, scan, shards, tar_of

from bezoar.detection import scoring
from bezoar.detection.corpus import corpus, shared_embeddings, units
from bezoar.evaluation.scores import Scores
from bezoar.runs.run import Run


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(NETWORK)
    return path


@pytest.fixture
def work(monkeypatch) -> list[str]:
    """What was embedded and which detectors were asked, in order."""
    calls: list[str] = []
    embed, score = units.embed_unit, scoring.score_records

    def embed_unit(source, unit, *rest):
        calls.append(f"unit {unit.number}")
        embed(source, unit, *rest)

    def score_records(detector, name, *rest):
        calls.append(name)
        return score(detector, name, *rest)

    monkeypatch.setattr(units, "embed_unit", embed_unit)
    monkeypatch.setattr(scoring, "score_records", score_records)
    return calls


def entries(runs: Path) -> list[Path]:
    return sorted((runs / shared_embeddings.SHARED).iterdir())


def test_vectors_are_made_once_and_cleaned_shards_ask_no_detector_again(tmp_path, tiny, work):
    spec, runs = shards(tmp_path / "s", 2), tmp_path / "runs"
    options = (spec, "--encoder", tiny, "--detector")
    _, one = scan(runs, *options, "k_distance:k=4")
    assert work == ["unit 0", "unit 1", "k_distance"]
    _, two = scan(runs, *options, "k_distance:k=4", "slof:k=4", "--remove", "0.2")
    assert work[3:] == ["slof"] and two != one
    _, three = scan(
        runs, *options, "k_distance:k=4", "slof:k=4", "--remove", "0.2", "--write", "shards"
    )
    assert len(work) == 4 and list((three / "shards").glob("*.tar"))
    assert (three / "keep.txt").read_bytes() == (two / "keep.txt").read_bytes()
    _, alone = scan(tmp_path / "others", *options, "k_distance:k=4", "slof:k=4", "--remove", "0.2")
    for name in ("ranked.json", "vectors/images.npy", "vectors/id.utf8", "vectors/done.json"):
        assert (alone / name).read_bytes() == (two / name).read_bytes()
    assert (one / "vectors/images.npy").stat().st_ino == (two / "vectors/images.npy").stat().st_ino
    (entry,) = entries(runs)
    assert (entry / "vectors/images.npy").stat().st_nlink == 4

    work.clear()
    _, again = scan(runs, *options, "slof:k=4", "--fresh")
    assert work == ["unit 0", "unit 1", "slof"]
    assert torch.equal(
        corpus.load_scores(again).detectors["slof"].values,
        corpus.load_scores(two).detectors["slof"].values,
    )
    for run in (one, two):  # a run does not depend on what it shared
        assert len(corpus.reopen_corpus(Run(run)).ids) == 40


def test_other_data_are_another_entry_and_what_no_run_holds_goes(tmp_path, tiny, work):
    spec, runs = shards(tmp_path / "s", 1), tmp_path / "runs"
    options = ("--encoder", tiny, "--detector", "k_distance:k=4")
    _, one = scan(runs, spec, *options)
    (first,) = entries(runs)
    tar_of(tmp_path / "s" / "00000.tar", records(range(30, 50)))
    _, two = scan(runs, spec, *options)
    assert two != one and len(entries(runs)) == 2
    assert work == ["unit 0", "k_distance"] * 2
    shutil.rmtree(one)
    assert len(entries(runs)) == 2
    tar_of(tmp_path / "s" / "00000.tar", records(range(60, 80)))
    scan(runs, spec, *options)
    assert len(entries(runs)) == 2 and first not in entries(runs)


def test_what_was_not_read_is_listed_by_every_run_and_spoilt_scores_are_made_again(
    tmp_path, tiny, work
):
    (tmp_path / "s").mkdir()
    tar_of(tmp_path / "s" / "0.tar", records(range(20), **{"x.png": b"no image", "x.txt": b"a"}))
    runs, options = (
        tmp_path / "runs",
        (f"shards:path={tmp_path}/s,size=16", "--encoder", tiny, "--detector"),
    )
    status, one = scan(runs, *options, "k_distance:k=4")
    status2, two = scan(runs, *options, "k_distance:k=4", "--remove", "0.5")
    assert status == status2 == 4
    assert (one / "skipped.jsonl").read_text() == (two / "skipped.jsonl").read_text() != ""
    assert notes(one)["reading"] == notes(two)["reading"]
    (path,) = (entries(runs)[0] / "scores").iterdir()
    path.write_bytes(b"spoilt")
    _, three = scan(runs, *options, "k_distance:k=4", "--remove", "0.1")
    assert work == ["unit 0", "k_distance", "k_distance"]
    assert torch.equal(
        corpus.load_scores(one).merged.values, corpus.load_scores(three).merged.values
    )


def test_vectors_and_scores_of_a_stranger_are_not_read(tmp_path, tiny, work, monkeypatch):
    """Somebody else's folder of runs holds an entry for the same question, and what is in it is
    made up.
    """
    spec, runs = shards(tmp_path / "s", 1), tmp_path / "runs"
    options = (spec, "--encoder", tiny, "--detector", "k_distance:k=4")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "stranger"))
    _, one = scan(runs, *options)
    expected = (one / "scores.csv").read_bytes()
    (entry,) = entries(runs)
    for name in ("images.npy", "texts.npy"):
        path = entry / "vectors" / name
        content = path.read_bytes()
        path.write_bytes(content[:128] + bytes(reversed(content[128:])))
    (kept,) = (entry / "scores").iterdir()
    shutil.rmtree(one)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "own"))
    _, two = scan(runs, *options)
    assert work == ["unit 0", "k_distance"] * 2 and (two / "scores.csv").read_bytes() == expected
    assert not kept.exists()  # no run of this user holds the entry
    secret = tmp_path / "own" / "bezoar" / shared_embeddings.SECRET
    assert secret.stat().st_mode & 0o777 == 0o600
    shared_embeddings._secret_of_process.cache_clear()
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/no/such/place")
    assert shared_embeddings.read_secret() == shared_embeddings.read_secret() != secret.read_text()


def test_all_that_scores_hold_comes_back(tmp_path):
    from bezoar import registry

    entry, detector = (
        shared_embeddings.Entry(tmp_path / "e"),
        registry.make("detector", "k_distance"),
    )
    ids = ("a", "b", "c")
    full = Scores(
        ids,
        torch.tensor([0.1, 0.2, 0.3]),
        boxes=torch.arange(12).view(3, 4),
        notes={"n": [1, "x"]},
        raised=torch.tensor([True, False, True]),
        groups=torch.tensor([-1, 2, 2]),
    )
    assert entry.load_scores(detector, ids) is None
    entry.store_scores(detector, full.select(ids[::-1]), ids)
    entry.store_scores(registry.make("detector", "k_distance:k=3"), full, ("a", "b", "d"))
    again = entry.load_scores(detector, ids)
    assert again.notes == full.notes and torch.equal(again.values, full.values)
    assert torch.equal(again.boxes, full.boxes) and torch.equal(again.raised, full.raised)
    assert torch.equal(again.groups, full.groups)
    assert entry.load_scores(detector, ("a", "b")) is None  # of other records
    assert entry.load_scores(registry.make("detector", "k_distance:k=3"), ids) is None


def test_unfinished_entries_are_few(tmp_path):
    folder = tmp_path / shared_embeddings.SHARED
    for i in range(5):
        (folder / str(i)).mkdir(parents=True)
    shared_embeddings.remove_unused(shared_embeddings.Entry(folder / "4"))
    assert len(list(folder.iterdir())) == 1 + shared_embeddings.UNFINISHED
