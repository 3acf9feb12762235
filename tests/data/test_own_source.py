"""A source of the user's own, written in one file, is scanned, trained on and cleaned like those
that ship.
"""

import csv
import json
from pathlib import Path

import pytest
import torch
from verbs.test_scan import NETWORK, contents, notes, picture, scan, unread

from bezoar import registry
from bezoar.cli import main
from bezoar.data.files.paths import expand_paths
from bezoar.data.pairs import load_pairs
from bezoar.data.sources.shards import ShardSource
from bezoar.data.stored_pairs import StoredPairs
from bezoar.detection.corpus import corpus
from bezoar.runs.run import Run

LISTING = '''"""Images named in a text file: a line is a path, a tab and a caption."""

from pathlib import Path
from typing import Annotated

from bezoar.data.decoding import Record
from bezoar.data.files.skipped import Skipped
from bezoar.data.source import number_units
from bezoar.data.streams import RecordStream
from bezoar.registry import method


@method
class Listing:
    path: Annotated[str, "the text file"]
    size: Annotated[int, "pixels a side"] = 16

    def files(self):
        return [Path(self.path)]

    def __call__(self):
        return Lines(Path(self.path), self.size)


class Lines(RecordStream):
    def __init__(self, path, size):
        self.paths, self.size = (path,), size

    def units(self):
        count = len(self.paths[0].read_text().splitlines())
        return number_units((str(self.paths[0]), 10, (0, start)) for start in range(0, count, 10))

    def records(self, unit=None):
        lines = list(enumerate(self.paths[0].read_text().splitlines()))
        for row, line in lines if unit is None else lines[unit.place[1] :][:10]:
            name, tab, caption = line.partition("\\t")
            if not tab:
                yield Skipped(str(self.paths[0]), f"line {row}", "no caption")
                continue
            image = self.image_path(0, name)
            place = {"file": str(self.paths[0]), "member": name, "offset": row}
            yield Record(image=image, ids=(name,), captions=(caption,), **place)

    def image_path(self, shard, member):
        return self.paths[0].parent / member
'''


@pytest.fixture
def listing(tmp_path: Path) -> str:
    """The spec of 36 images and a line that is none."""
    lines = []
    for i in range(36):
        (tmp_path / f"{i:02d}.png").write_bytes(picture(i))
        colour = ("red", "blue", "green", "brown")[i % 4]
        lines.append(f"{i:02d}.png\ta {colour} star")
    lines.insert(17, "a line without a caption")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    (tmp_path / "listing.py").write_text(LISTING)
    (tmp_path / "tiny.py").write_text(NETWORK)
    spec = f"{tmp_path}/listing.py:path={tmp_path}/list.txt"
    registry.allow(spec)
    return spec


def test_it_is_scanned_in_units_by_workers_too(tmp_path, listing):
    torch.set_num_threads(1)
    words = ("--encoder", tmp_path / "tiny.py", "--detector", "k_distance:k=4", "duplicates")
    folders = []
    for workers in (1, 2):
        status, folder = scan(tmp_path / f"runs{workers}", listing, *words, workers=workers)
        assert status == 4 and unread(folder) == [("list.txt", "line 17", "no caption")]
        assert notes(folder)["records"] == 36
        folders.append(contents(folder))
    assert folders[0] == folders[1] and len(folders[0]) > 8
    whole = load_pairs(registry.make("data", listing)())
    records = corpus.reopen_corpus(Run(folder))
    assert tuple(records.ids) == whole.ids and records.place_of(3) == f"{tmp_path}/list.txt 03.png"
    assert torch.equal(records.take([35, 2]).images, whole.take([35, 2]).images)


def test_its_images_are_read_as_they_are_drawn_if_memory_is_short(listing):
    whole = load_pairs(registry.make("data", listing)())
    stored = registry.make("data", listing)().load_records(max_bytes=0)
    assert isinstance(stored, StoredPairs)
    assert tuple(stored.ids) == whole.ids and tuple(stored.captions) == whole.captions
    assert torch.equal(stored.images[[30, 1]], whole.images[[30, 1]])


def test_it_is_cleaned(tmp_path, listing):
    words = ("--encoder", tmp_path / "tiny.py", "--detector", "k_distance:k=4", "--remove", "0.25")
    _, folder = scan(tmp_path / "runs", listing, *words, "--write", "shards")
    kept_ids = (folder / "keep.txt").read_text().split()
    assert len(kept_ids) == notes(folder)["written"] == 27
    cleaned = load_pairs(ShardSource(expand_paths(str(folder / "shards")), 16))
    whole = load_pairs(registry.make("data", listing)())
    assert cleaned.ids == tuple(kept_ids)
    rows = [whole.ids.index(key) for key in kept_ids]
    assert torch.equal(cleaned.images, whole.take(rows).images)
    with (folder / "keep.csv").open(newline="") as file:
        paths = [Path(row["filepath"]) for row in csv.DictReader(file, delimiter="\t")]
    assert paths == [tmp_path / key for key in kept_ids]


def test_it_is_poisoned_trained_on_and_looked_at_for_side_channels(tmp_path, listing):
    runs = ("--runs", str(tmp_path / "runs"))
    poison = ("--poison", "backdoor:count=6", "--trigger", "patch:size=4", "--target", "red")
    assert main(["poison", f"{listing},size=32", *poison, *runs]) == 4
    network = ("--network", "clip_small:width=4,dim=16")
    recipe = ("--objective", "clip:epochs=1,batch=12")
    assert main(["train", "poison-", *network, *recipe, *runs]) == 4
    (trained,) = (tmp_path / "runs").glob("train-*")
    assert json.loads((trained / "manifest.json").read_text())["notes"]["records"] == 36
    words = ("--encoder", tmp_path / "tiny.py", "--detector", "k_distance:k=4")
    status, folder = scan(tmp_path / "leaks", listing, *words, "--leaks", "--remove", "0.25")
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert status == 4 and "leak.file_size.auroc" in metrics
