"""Folders of images: streamed as shards are, with the result of reading them whole; hostile
ones.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from verbs.test_scan import NETWORK, contents, notes, picture, scan, unread

from bezoar import registry
from bezoar.data import decoding, source
from bezoar.data.decoding import Record, gather_pairs
from bezoar.data.files import folders, paths
from bezoar.data.files.paths import IMAGE_SUFFIXES, expand_paths
from bezoar.data.pairs import Pairs, load_pairs
from bezoar.data.source import as_source
from bezoar.data.sources.folder import FolderSource
from bezoar.data.sources.shards import ShardSource
from bezoar.data.stored_pairs import StoredPairs
from bezoar.detection.corpus import corpus, units
from bezoar.runs import inputs, verb
from bezoar.runs.run import Run

WORDS = ("--detector", "k_distance:k=4")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(NETWORK)
    return path


def classes(root: Path, count: int = 30) -> str:
    """Two class folders, a directory in the midst of one's files."""
    for i in range(count):
        deeper = "star/0010_more" if i % 5 == 0 else "star"
        path = root / ("cross" if i % 2 else deeper) / f"{i:04d}.{'png' if i % 3 else 'PNG'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    return f"folder:path={root},size=16"


def img2dataset(root: Path, shards: int = 2, each: int = 8) -> str:
    """What img2dataset writes with `--output_format files`."""
    for s in range(shards):
        (root / f"{s:05d}").mkdir(parents=True)
        (root / f"{s:05d}_stats.json").write_text("{}")
        (root / f"{s:05d}.parquet").write_bytes(b"PAR1")
        for i in range(each):
            key = root / f"{s:05d}" / f"{s:05d}{i:04d}"
            key.with_suffix(".jpg").write_bytes(picture(s * each + i))
            key.with_suffix(".txt").write_text(f"a red star {s} {i}")
            key.with_suffix(".json").write_text(
                json.dumps({"caption": "other", "url": f"http://x/{s}/{i}", "key": key.name})
            )
    return f"folder:path={root},size=16"


def whole(root: Path) -> Pairs:
    """A folder of class folders, every file of it read into memory: the oracle."""

    def records() -> Iterator[Record]:
        for label, folder in enumerate(sorted(p for p in root.iterdir() if p.is_dir())):
            for path in sorted(folder.rglob("*")):
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    key = path.relative_to(root).as_posix()
                    yield Record(
                        image=path,
                        ids=(key,),
                        captions=(f"a photo of a {folder.name}",),
                        label=label,
                        file=str(root),
                        member=key,
                    )

    return gather_pairs(
        records(), 16, str(root), sorted(p.name for p in root.iterdir() if p.is_dir())
    )


def same(one: Pairs, two: Pairs) -> None:
    assert one.ids == two.ids and one.captions == two.captions and one.classes == two.classes
    assert torch.equal(one.images, two.images)
    assert one.labels is not None and two.labels is not None and torch.equal(one.labels, two.labels)


def test_a_folder_gives_what_it_gives_in_memory_to_the_bit(tmp_path, tiny, monkeypatch):
    spec, detectors = (
        classes(tmp_path / "f"),
        ("--detector", "k_distance:k=4", "clip_score", "duplicates"),
    )
    plain = whole(tmp_path / "f")
    same(load_pairs(registry.make("data", spec)()), plain)
    assert load_pairs(registry.make("data", f"{spec},limit=7")()).ids == plain.ids[:7]
    for max_bytes, kind in ((0, StoredPairs), (1 << 40, Pairs)):
        records = registry.make("data", spec)().load_records(max_bytes)
        assert isinstance(records, kind)
        same(records.take(range(len(plain))), plain)
    monkeypatch.setattr(folders, "BLOCK_FILES", 7)
    monkeypatch.setattr(source, "UNIT_RECORDS", 7)
    status, streamed = scan(tmp_path / "streamed", spec, "--encoder", tiny, *detectors)
    c, scores = corpus.reopen_corpus(Run(streamed)), corpus.load_scores(streamed)
    assert status == 0 and tuple(c.ids) == plain.ids and tuple(c.captions) == plain.captions
    same(c.take([29, 3, 3, 0]), plain.take([29, 3, 3, 0]))
    assert scores.places[0] == f"{tmp_path}/f cross/0001.png"
    monkeypatch.setattr(units, "open_source", lambda args: as_source(plain))
    status, held = scan(tmp_path / "held", spec, "--encoder", tiny, *detectors)
    assert status == 0
    for name in ("vectors/images.npy", "vectors/texts.npy", "vectors/id.utf8", "keep.txt"):
        assert (streamed / name).read_bytes() == (held / name).read_bytes()
    assert torch.equal(scores.merged.values, corpus.load_scores(held).merged.values)


def test_images_in_memory_do_not_grow_with_the_folder(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(folders, "BLOCK_FILES", 100)
    monkeypatch.setattr(source, "BATCH_IMAGES", 16)
    original, alive, most = decoding.decode_image, [0], [0]

    def gone():
        alive[0] -= 1

    def decode(*args):
        image = original(*args)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(image, gone)
        return image

    monkeypatch.setattr(decoding, "decode_image", decode)
    bound = 16 + 16 * (
        2 * decoding.thread_count() + 3
    )  # a batch, and the tasks that are decoded ahead
    for count in (40, 700):
        folder, most[0] = tmp_path / str(count), 0
        folder.mkdir()
        for i in range(count):
            (folder / f"{i:04d}.png").write_bytes(picture(i % 50, 8))
        spec = f"folder:path={folder},size=8"
        status, run = scan(tmp_path, spec, "--encoder", tiny, *WORDS)
        assert status == 0 and len(corpus.load_scores(run)) == count and alive[0] == 0
        assert 0 < most[0] <= min(bound, count)
    assert bound < 700


def test_two_workers_and_none_write_the_same_files(tmp_path, tiny, monkeypatch):
    spec, files = classes(tmp_path / "f"), []
    monkeypatch.setattr(folders, "BLOCK_FILES", 10)
    torch.set_num_threads(1)
    for workers in (1, 2):
        status, run = scan(
            tmp_path / f"runs{workers}", spec, "--encoder", tiny, *WORDS, workers=workers
        )
        assert status == 0 and len(registry.make("data", spec)().units()) == 3
        files.append(contents(run))
    assert files[0] == files[1] and len(files[0]) > 8


def program(runs: Path, spec: str, tiny: Path) -> str:
    """A scan in units of ten files, for a process of its own."""
    words = ["scan", spec, "--encoder", str(tiny), *WORDS, "--runs", str(runs), "--workers", "1"]
    return (
        "from bezoar.data.files import folders; folders.BLOCK_FILES = 10; from bezoar.cli import "
        f"main; main({words!r}) and exit(1)"
    )


def test_a_scan_that_is_killed_goes_on_with_the_files_it_was_at(tmp_path, tiny, monkeypatch):
    spec, runs = classes(tmp_path / "f", 50), tmp_path / "runs"
    torch.set_num_threads(1)  # as the process below has: other sums, other bits
    environment = {**os.environ, "PAUSE": "0.3", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", program(runs, spec, tiny)],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    start = time.monotonic()
    while (
        len(list(runs.glob(".embeddings/*/vectors/0*.json"))) < 2 and time.monotonic() - start < 120
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -9
    (folder,) = runs.glob("scan-*")
    done = len(list(runs.glob(".embeddings/*/vectors/0*.json")))
    assert 2 <= done < 5
    embedded, original = [], units.embed_unit

    def watched(folder_source, unit, *rest):
        embedded.append(unit.number)
        original(folder_source, unit, *rest)

    monkeypatch.setattr(folders, "BLOCK_FILES", 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "embed_unit", watched)
        status, again = scan(runs, spec, "--encoder", tiny, *WORDS)
    assert (
        status == 0
        and again == folder
        and embedded == list(range(done, 5))
        and not list(folder.rglob("*.tmp"))
    )
    _, fresh = scan(tmp_path / "other", spec, "--encoder", tiny, *WORDS)
    for name in ("ranked.json", "keep.txt", "vectors/images.npy", "vectors/id.utf8"):
        assert (fresh / name).read_bytes() == (folder / name).read_bytes()


def test_what_is_bad_in_a_folder_is_named_and_no_link_is_followed_out(tmp_path, tiny, capsys):
    root, out = tmp_path / "f", tmp_path / "out"
    spec = classes(root, 20)
    out.mkdir()
    (out / "secret.png").write_bytes(picture(99))
    (root / "star" / "cut.png").write_bytes(picture(50)[:300])
    (root / "star" / "out.png").symlink_to(out / "secret.png")
    (root / "star" / "up.png").symlink_to("../../out/secret.png")
    (root / "star" / "inside.png").symlink_to("../cross/0001.png")
    (root / "star" / "gone.png").symlink_to("nothing.png")
    (root / "star" / "loop.png").symlink_to("loop.png")
    (root / "star" / "folder").symlink_to(out, target_is_directory=True)
    (root / "star" / "again").symlink_to("../cross", target_is_directory=True)
    (root / "linked").symlink_to(out, target_is_directory=True)
    (root / "star" / "two\nlines.png").write_bytes(picture(51))
    (root / "star" / "notes.md").write_text("notes")
    os.mkfifo(root / "star" / "pipe.png")
    deep = root / "star" / Path(*["d"] * 70)
    deep.mkdir(parents=True)
    (deep / "deep.png").write_bytes(picture(52))
    status, run = scan(tmp_path, spec, "--encoder", tiny, *WORDS)
    scores = corpus.load_scores(run)
    assert (
        status == 4
        and len(scores) == 21
        and "star/inside.png" in scores.ids
        and not any("out" in k for k in scores.ids)
    )
    assert {(m.rpartition("/")[2], r) for _, m, r in unread(run)} == {
        ("cut.png", "not decodable"),
        ("out.png", "link leaves the folder"),
        ("up.png", "link leaves the folder"),
        ("gone.png", "no such file"),
        ("loop.png", "no such file"),
        ("folder", "link leaves the folder"),
        ("again", "link to a folder, not followed"),
        ("linked", "link leaves the folder"),
        ("pipe.png", "not a regular file"),
        ("two\\nlines.png", "unsafe name"),
        ("notes.md", "not an image by its name"),
        ("d", "more than 64 directories within one another"),
    }
    assert notes(run)["reading"]["reasons"]["link leaves the folder"] == 4
    assert "could not be read" in capsys.readouterr().err
    assert not any(
        str(out) in str(p) or "secret" in n for n, p in registry.make("data", spec).files()
    )


def test_a_folder_that_changes_while_it_is_scanned_is_named(tmp_path, tiny, monkeypatch):
    spec, cut = classes(tmp_path / "f"), FolderSource.units
    monkeypatch.setattr(folders, "BLOCK_FILES", 10)

    def changing(folder_source):
        pieces = cut(folder_source)
        (tmp_path / "f" / "star" / "0001_new.png").write_bytes(picture(60))
        return pieces

    monkeypatch.setattr(FolderSource, "units", changing)
    status, run = scan(tmp_path, spec, "--encoder", tiny, *WORDS)
    assert status == 4 and len(corpus.load_scores(run)) == 10
    assert {r for *_, r in unread(run)} == {
        f"files were added or taken away below {tmp_path}/f while it was read"
    }


def test_captions_beside_images_as_img2dataset_writes_them(tmp_path, tiny):
    spec = img2dataset(tmp_path / "f")
    status, run = scan(tmp_path, spec, "--encoder", tiny, *WORDS, "clip_score")
    c = corpus.reopen_corpus(Run(run))
    assert status == 0 and len(c) == 16 and c.ids[9] == "00001/000010001.jpg"
    assert c.captions[9] == "a red star 1 1" and c.urls[9] == "http://x/1/1"
    folder = tmp_path / "f" / "00000"
    for ending in (".txt", ".json"):
        (folder / "000000000").with_suffix(ending).unlink()
    (folder / "000000001.txt").write_bytes(b"caf\xe9")
    (folder / "000000002.txt").unlink()  # json tells
    (folder / "000000003.json").write_text("[1]")
    (folder / "000000004.txt").unlink()
    (tmp_path / "secret").write_text("root:x:0:0")
    (folder / "000000004.txt").symlink_to(tmp_path / "secret")
    (folder / "000000005.json").write_text('{"record_id": "own"}')
    (folder / "000000006.jpg").unlink()
    (folder / "000000007.txt").write_text("a" * (paths.TEXT_BYTES + 1))
    status, run = scan(tmp_path, spec, "--encoder", tiny, *WORDS)
    scores = corpus.load_scores(run)
    assert (
        status == 4
        and {"00000/000000002.jpg": "other", "own": "a red star 0 5"}.items()
        <= dict(zip(scores.ids, scores.captions, strict=True)).items()
    )
    assert [(m.rpartition("/")[2], r) for _, m, r in unread(run)] == [
        ("000000000.jpg", "no caption"),
        ("000000001.jpg", "caption is not UTF-8"),
        ("000000003.jpg", "metadata is not a JSON object"),
        ("000000004.jpg", "link leaves the folder"),
        ("000000006.json", "no image"),
        ("000000006.txt", "no image"),
        ("000000007.jpg", "caption cannot be read"),
    ]
    assert len(scores) == 10


def test_a_flat_folder_needs_no_captions(tmp_path, tiny, capsys):
    (tmp_path / "f").mkdir()
    for i in range(12):
        (tmp_path / "f" / f"{i}.png").write_bytes(picture(i))
    status, run = scan(tmp_path, tmp_path / "f", "--encoder", tiny, *WORDS)
    assert corpus.reopen_corpus(Run(run)).take([3]).captions == ()
    assert (
        status == 0
        and len(corpus.load_scores(run)) == 12
        and set(corpus.load_scores(run).captions) == {""}
    )
    pairs = inputs.read_pairs(registry.make("data", f"folder:path={tmp_path}/f,layout=flat"))
    assert (
        pairs.captions == ()
        and pairs.labels is None
        and pairs.ids[1] == "1.png"
        and pairs.ids[2] == "10.png"
    )
    assert scan(tmp_path, f"folder:path={tmp_path}/f,layout=classes", "--encoder", tiny)[0] == 2
    (tmp_path / "none").mkdir()
    assert scan(tmp_path, tmp_path / "none", "--encoder", tiny)[0] == 2
    err = capsys.readouterr().err
    assert "no images below" in err and "holds no class folders" in err and "Traceback" not in err


def test_what_is_kept_of_a_folder_is_a_list_of_its_files_and_shards_of_their_bytes(tmp_path, tiny):
    spec = classes(tmp_path / "f", 30)
    Image.open(io.BytesIO(picture(70))).save(tmp_path / "f" / "star" / "map.bmp")
    status, run = scan(
        tmp_path, spec, "--encoder", tiny, *WORDS, "--remove", "0.1", "--write", "shards"
    )
    kept_ids = (run / "keep.txt").read_text().split()
    assert (
        status == 0
        and len(kept_ids) == 28
        and notes(run)["written"] == 28
        and notes(run)["shards"] == 1
    )
    rows = parquet.read_table(run / "keep.parquet").to_pylist()
    assert [r["member"] for r in rows] == kept_ids and {r["shard"] for r in rows} == {
        f"{tmp_path}/f"
    }
    listed = [line.split("\t")[0] for line in (run / "keep.csv").read_text().splitlines()[1:]]
    assert [Path(p) for p in listed] == [tmp_path / "f" / k for k in kept_ids]
    with tarfile.open(run / "shards" / "00000.tar") as tar:
        images = [tar.extractfile(m).read() for m in tar if m.name.endswith(".png")]
    same_bytes = [
        i == (tmp_path / "f" / k).read_bytes() for i, k in zip(images, kept_ids, strict=True)
    ]
    assert same_bytes == [not k.endswith(".bmp") for k in kept_ids]
    cleaned = load_pairs(ShardSource(expand_paths(str(run / "shards")), 16))
    before = load_pairs(registry.make("data", spec)())
    rows_of = [before.ids.index(k) for k in kept_ids]
    same(cleaned, before.take(rows_of))


def test_a_run_is_another_when_a_class_is(tmp_path):
    method = registry.make("data", classes(tmp_path / "f", 6))
    before = verb.fingerprint(method.files())
    assert verb.fingerprint(method.files()) == before
    (tmp_path / "f" / "star").rename(tmp_path / "f" / "sun")
    assert verb.fingerprint(method.files()) != before


def test_a_table_whose_images_lie_elsewhere_is_refused_in_one_line(tmp_path, tiny, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for i in range(9):
        (tmp_path / "out" / f"{i}.png").write_bytes(picture(i))
    rows = [
        {
            "image": f"{tmp_path}/out/{i}.png" if i % 2 else f"../out/{i}.png",
            "caption": f"a star {i}",
        }
        for i in range(9)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "t.parquet")
    (tmp_path / "in" / "t.csv").write_text(
        "image,caption\n" + "".join(f"{r['image']},{r['caption']}\n" for r in rows)
    )
    (tmp_path / "in" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for kind in ("csv", "jsonl", "parquet"):
        table = tmp_path / "in" / f"t.{kind}"
        assert scan(tmp_path, table, "--encoder", tiny, *WORDS)[0] == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "lies outside" in x]
        assert f"'../out/0.png' lies outside {tmp_path}/in" in line
        assert "root=" in line and "row 1" in line
        spec = f"table:path={table},root={tmp_path},size=16"
        image = registry.make("data", f"image:path={tmp_path}/out/3.png")
        assert np.array_equal(
            load_pairs(registry.make("data", spec)()).images[3], inputs.read_pairs(image).images[0]
        )
