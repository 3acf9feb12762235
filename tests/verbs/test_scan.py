"""Scans: any corpus, cut into units that are embedded by themselves; what is bad in it is named,
the rest is scanned.
"""

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_files import tar_of
from PIL import Image

from bezoar import registry
from bezoar.cli import main
from bezoar.data.files import parquet, tables
from bezoar.data.files.paths import expand_paths
from bezoar.data.pairs import load_pairs
from bezoar.data.shards import write_shards
from bezoar.data.sources.shards import ShardSource
from bezoar.data.sources.table import TableImages
from bezoar.detection.corpus import assembly, columns, corpus, units
from bezoar.errors import UserError
from bezoar.runs import inputs
from bezoar.runs.execute import resolve_inputs
from bezoar.runs.run import Run
from bezoar.runs.verb import Settings
from bezoar.verbs.scan import Scan

DATA = Path(__file__).parents[3] / "shared" / "data"
NETWORK = '''"""Colours in a coarse grid, and words; NaN of a white image. Made for tests."""

import os
import time

import torch
from torch import nn

from bezoar.encoders.encoder import Encoder, Preprocess, WordTokenizer
from bezoar.registry import method

WORDS = tuple("red blue green star cross the a over wall square brown orange".split())


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.map = nn.AdaptiveAvgPool2d(4), nn.Linear(48, 24)

    def forward(self, x):
        time.sleep(float(os.environ.get("PAUSE", 0)))
        if abs(float(x[0, 0, 0, 0]) - float(os.environ.get("DEADLY", 9))) < 1e-4:
            os.kill(os.getpid(), 9)
        flat = self.pool(x).flatten(1)
        return torch.where(flat.amin(1, keepdim=True) > 1.9, torch.nan, self.map(flat))


@method
class Tiny:
    def __call__(self, size, vocabulary):
        torch.manual_seed(0)
        bag, words = nn.EmbeddingBag(len(WORDS) + 1, 24), WordTokenizer(WORDS)
        return Encoder(Image(), Preprocess(16), bag, words, {"network": "tiny"})
'''


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(NETWORK)
    return path


def picture(seed: int = 0, side: int = 16, white: bool = False) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(np.full_like(pixels, 255) if white else pixels).save(out, "PNG")
    return out.getvalue()


def records(keys: range, **more: bytes) -> dict[str, bytes]:
    """Good records, then other members."""
    out: dict[str, bytes] = {}
    for i in keys:
        out |= {
            f"{i:05d}.png": picture(i),
            f"{i:05d}.txt": b"a red star",
            f"{i:05d}.json": b'{"url": "http://x/%d"}' % i,
        }
    return out | more


def scan(runs: Path, *words: object, workers: int = 1) -> tuple[int, Path]:
    """Run `bezoar scan`: its exit status and its run."""
    before = set(runs.glob("scan-*"))
    status = main(["scan", *map(str, words), "--runs", str(runs), "--workers", str(workers)])
    folders = [p for p in runs.glob("scan-*") if p not in before] or sorted(
        before, key=lambda p: p.stat().st_mtime
    )
    return status, folders[-1] if folders else runs


def contents(folder: Path) -> dict[str, bytes]:
    """What a scan wrote that must not depend on who did the work."""
    return {
        p.name: p.read_bytes()
        for p in [*folder.glob("vectors/*"), folder / "keep.txt", folder / "ranked.json"]
    }


def notes(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["notes"]


def unread(folder: Path) -> list[tuple[str, str, str]]:
    """(file name, member, reason up to its colon) of everything that was not read."""
    lines = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    return [(Path(f).name, m, r.partition(":")[0]) for f, m, r in lines]


def shards(folder: Path, count: int = 3, each: int = 20) -> str:
    folder.mkdir()
    for i in range(count):
        tar_of(folder / f"{i:05d}.tar", records(range(i * each, (i + 1) * each)))
    return f"shards:path={folder}/{{00000..{count - 1:05d}}}.tar,size=16"


# shards


def test_shards_give_what_memory_gives(tmp_path, tiny):
    spec = shards(tmp_path / "s")
    status, folder = scan(
        tmp_path, spec, "--encoder", tiny, "--detector", "k_distance:k=4", "clip_score"
    )
    assert status == 0 and not (folder / "skipped.jsonl").exists()
    whole = load_pairs(registry.make("data", spec)())
    encoder = inputs.load_encoder(registry.make("network", str(tiny)), "cpu")
    plain, c = encoder.embed(whole), corpus.reopen_corpus(Run(folder))
    assert (
        tuple(c.ids) == whole.ids
        and tuple(c.captions) == whole.captions
        and list(c.urls)[7] == "http://x/7"
    )
    assert torch.allclose(c.embedded.images, plain.images, atol=1e-6) and torch.allclose(
        c.embedded.texts, plain.texts, atol=1e-6
    )
    rows = [41, 3, 3, 59]
    assert torch.equal(c.take(rows).images, whole.take(rows).images)
    assert torch.equal(torch.cat([b.images for b in c.batches(7)]), whole.images)
    scanned = corpus.load_scores(folder)
    assert list(scanned.ids) == list(whole.ids) and set(scanned.detectors) == {
        "k_distance",
        "clip_score",
    }
    again = registry.make("detector", "k_distance:k=4")(encoder, whole)
    assert torch.allclose(
        scanned.detectors["k_distance"].values, again.select(whole.ids).values, atol=1e-5
    )
    assert scanned.places[25] == f"{tmp_path}/s/00001.tar 00025"


MINE = """
import torch
from bezoar.registry import method
from bezoar.evaluation.scores import Scores
@method
class Mine:
    decides = True

    def __call__(self, encoder, source):
        e = encoder.embed(source)
        odd = torch.tensor([i.endswith("7") for i in e.ids])
        return Scores(e.ids, torch.zeros(len(e.ids)), raised=odd)
"""


def test_what_a_detector_raises_comes_first_and_is_kept(tmp_path, tiny):
    (tmp_path / "mine.py").write_text(MINE)
    spec = shards(tmp_path / "s")
    status, folder = scan(
        tmp_path,
        spec,
        "--encoder",
        tiny,
        "--detector",
        tmp_path / "mine.py",
        "clip_score",
        "--remove",
        0.1,
    )
    scanned = corpus.load_scores(folder)
    (name,) = scanned.detectors.keys() - {"clip_score"}
    raised = scanned.detectors[name].raised
    assert status == 0 and int(raised.sum()) == 6 and scanned.detectors["clip_score"].raised is None
    assert set(scanned.merged.ranking()[:6].tolist()) == set(raised.nonzero()[:, 0].tolist())
    assert len((folder / "keep.txt").read_text().splitlines()) == 54
    assert Run(folder).metric(f"{name}.raised").value == 0.1 and notes(folder)[
        "seconds"
    ].keys() == {name, "clip_score"}
    page = (folder / "report.html").read_text()
    assert "Seconds" in page and f"{name} found a trigger in 6 of 60 records." in page
    assert notes(folder)["verdict"].startswith(
        f"{name} found a trigger in 6 records; keep.txt leaves out the 6 most"
    )
    words = (spec, "--encoder", tiny, "--fail-on", "trigger", "--detector")
    assert scan(tmp_path, *words, tmp_path / "mine.py", "clip_score")[0] == 3
    assert scan(tmp_path, *words, "clip_score")[0] == 2  # it would pass whatever there is
    rows = list(csv.DictReader((folder / "removed.csv").open()))
    assert [row["why"] for row in rows] == [f"raised by {name}"] * 6
    log = json.loads((folder / "scan.sarif").read_text())["runs"][0]
    assert len(log["results"]) == 6 and {r["level"] for r in log["results"]} == {"error"}
    few = (spec, "--encoder", tiny, "--detector", tmp_path / "mine.py", "--remove", 0.02)
    _, small = scan(tmp_path / "few", *few)
    assert len((small / "keep.txt").read_text().splitlines()) == 54, "all that are raised leave"
    assert notes(small)["removed"] == 6


def test_two_workers_and_none_write_the_same_files(tmp_path, tiny):
    spec, files = shards(tmp_path / "s"), []
    torch.set_num_threads(1)
    for workers in (1, 2):
        words = (spec, "--encoder", tiny, "--detector", "k_distance:k=4")
        status, folder = scan(tmp_path / f"runs{workers}", *words, workers=workers)
        assert status == 0
        files.append(contents(folder))
    assert files[0] == files[1] and len(files[0]) > 8


@pytest.mark.slow
def test_ray_gives_what_one_machine_gives(tmp_path, tiny):
    pytest.importorskip("ray", reason="Ray is not installed")
    spec, files = shards(tmp_path / "s"), []
    torch.set_num_threads(1)
    for name, more in (("one", ()), ("ray", ("--ray",))):
        status, folder = scan(
            tmp_path / name,
            spec,
            "--encoder",
            tiny,
            "--detector",
            "k_distance:k=4",
            *more,
            workers=2,
        )
        assert status == 0
        files.append(contents(folder))
    assert files[0] == files[1] and len(files[0]) > 8


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_scan_that_is_stopped_goes_on_with_the_shard_it_was_in(tmp_path, tiny, how):
    spec, runs = shards(tmp_path / "s", 5), tmp_path / "runs"
    words = [
        "scan",
        spec,
        "--encoder",
        str(tiny),
        "--detector",
        "k_distance:k=4",
        "--runs",
        str(runs),
        "--workers",
        "1",
    ]
    # A process that was started in the background ignores Ctrl-C, and so would its children.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"from bezoar.cli import main; import sys; sys.exit(main({words!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL, env={**os.environ, "PAUSE": "0.3"}
    )
    start = time.monotonic()
    while (
        len(list(runs.glob(".embeddings/*/vectors/*.json"))) < 2 and time.monotonic() - start < 120
    ):
        time.sleep(0.02)
    process.send_signal(how)
    assert process.wait(60) == (130 if how == signal.SIGINT else -9)
    (folder,) = runs.glob("scan-*")
    assert json.loads((folder / "manifest.json").read_text())["status"] == (
        "interrupted" if how == signal.SIGINT else "running"
    )
    done = {p.name: p.stat().st_ino for p in runs.glob(".embeddings/*/vectors/0*.json")}
    assert 2 <= len(done) < 5
    embedded = []
    original = units.embed_unit

    def watched(source, unit, *rest):
        embedded.append(unit.number)
        original(source, unit, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "embed_unit", watched)
        status, again = scan(runs, *words[1:6])
    assert status == 0 and again == folder and embedded == list(range(len(done), 5))
    assert not list(runs.rglob("*.tmp")) and len(corpus.load_scores(folder)) == 100
    _, fresh = scan(tmp_path / "other", *words[1:6])
    for name in ("ranked.json", "keep.txt", "vectors/images.npy", "vectors/id.utf8"):
        assert (fresh / name).read_bytes() == (folder / name).read_bytes()


def test_what_is_bad_in_shards_is_named_and_the_rest_is_scanned(
    tmp_path, tiny, capsys, monkeypatch
):
    bomb = picture().replace((16).to_bytes(4, "big") * 2, (60_000).to_bytes(4, "big") * 2, 1)
    bad = records(
        range(4),
        **{
            "latin.png": picture(90),
            "latin.txt": b"caf\xe9",
            "empty.png": picture(91),
            "empty.txt": b" ",
            "white.png": picture(92, white=True),
            "white.txt": b"a cross",
            "bomb.png": bomb,
            "bomb.txt": b"much",
            "../up.png": picture(93),
            "../up.txt": b"outside",
            "named.png": picture(94),
            "named.txt": b"a star",
            "named.json": b'{"record_id": "two\\nlines"}',
            "twin.png": picture(95),
            "twin.txt": b"a",
            "twin.json": b'{"record_id": "good/00000"}',
        },
    )
    folder = tmp_path / "s"
    folder.mkdir()
    tar_of(folder / "good.tar", records(range(30)))
    tar_of(folder / "bad.tar", bad)
    whole = tar_of(folder / "cut.tar", records(range(6))).read_bytes()
    (folder / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "none.tar").write_bytes(b"this is no tar" * 100)
    tar_of(folder / "gone.tar", records(range(3)))
    with tarfile.open(folder / "links.tar", "w") as tar:
        for kind, name in (
            (tarfile.SYMTYPE, "a.png"),
            (tarfile.LNKTYPE, "b.png"),
            (tarfile.CHRTYPE, "c.png"),
        ):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/passwd"
            tar.addfile(header)
    cut = ShardSource.units

    def vanishing(source):
        source_units = cut(source)
        (folder / "gone.tar").unlink()
        return source_units

    monkeypatch.setattr(ShardSource, "units", vanishing)
    words = (f"shards:path={folder},size=16", "--encoder", tiny, "--detector", "k_distance:k=4")
    status, run = scan(tmp_path / "runs", *words)
    assert status == 4
    skipped = unread(run)
    assert {
        ("bad.tar", "latin", "caption is not UTF-8"),
        ("bad.tar", "empty", "no caption"),
        ("bad.tar", "bomb", "not decodable"),
        ("bad.tar", "white", "NaN or infinite vector of its image"),
        ("bad.tar", "named", "unsafe id"),
        ("bad.tar", "../up.png", "unsafe name"),
        ("good.tar", "00000", "id seen before"),
        ("cut.tar", "", "broken tar"),
        ("links.tar", "a.png", "not a regular file"),
        ("links.tar", "b.png", "not a regular file"),
        ("links.tar", "c.png", "not a regular file"),
    } <= set(skipped)
    assert {f for f, m, _ in skipped if not m} == {"none.tar", "gone.tar", "links.tar", "cut.tar"}
    scanned = corpus.load_scores(run)
    assert (
        len(scanned) == 30 + 5 + sum(i.startswith("cut/") for i in scanned.ids)
        and 1 <= len(scanned) - 35 <= 3
    )
    assert {"good/00000", "good/00000~2", "bad/00003"} <= set(scanned.ids) and len(
        set(scanned.ids)
    ) == len(scanned)
    run_notes = notes(run)
    assert (
        run_notes["records"] == len(scanned)
        and len(run_notes["incomplete"]) == 2
        and run_notes["reading"]["unread"] == len(skipped) - 1
    )
    err = capsys.readouterr().err
    assert "could not be read" in err and "skipped.jsonl" in err and "Traceback" not in err
    assert scan(
        tmp_path / "runs",
        f"shards:path={folder},size=16",
        "--encoder",
        tiny,
        "--detector",
        "k_distance:k=4",
    )[0] in (
        2,
        4,
    )


def test_a_detector_that_cannot_work_says_so_and_the_others_go_on(tmp_path, tiny, capsys):
    spec = shards(tmp_path / "s", 1, 10)
    status, run = scan(
        tmp_path, spec, "--encoder", tiny, "--detector", "k_distance:k=16", "clip_score"
    )
    assert status == 4 and set(corpus.load_scores(run).detectors) == {"clip_score"}
    lines = [line for line in capsys.readouterr().err.splitlines() if "k_distance" in line]
    assert (
        len(set(lines)) == 1
        and "16" in lines[0]
        and notes(run)["incomplete"] == [lines[0].removeprefix("scan: ")]
    )
    assert scan(tmp_path, spec, "--encoder", tiny, "--detector", "k_distance:k=16")[0] == 2


def test_where_all_detectors_refuse_what_could_not_be_read_is_still_named(tmp_path, tiny, capsys):
    folder = tmp_path / "f" / "a"
    folder.mkdir(parents=True)
    for i in range(6):
        (folder / f"{i}.png").write_bytes(picture(i))
    (folder / "broken.png").write_bytes(b"broken")
    words = ("--encoder", tiny, "--detector", "k_distance:k=16", "k_distance:k=32")
    status, run = scan(tmp_path, tmp_path / "f", *words)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("bezoar:")]
    assert status == 2 and "k=16" in line and "k=32" in line
    assert "1 records or files could not be read, beside 6 that were: 1 not decodable" in line
    assert unread(run) == [("f", "a/broken.png", "not decodable")]


def test_identical_images_and_one_detector_twice(tmp_path, tiny):
    tar_of(
        tmp_path / "a.tar",
        [
            (f"{i}.{e}", c)
            for i in range(40)
            for e, c in (("png", picture(1)), ("txt", b"a red star"))
        ],
    )
    detectors = [
        "k_distance:k=4",
        "k_distance:k=8",
        "slof:k=4",
        "dao:k=4",
        "clip_score",
        "duplicates",
    ]
    status, run = scan(tmp_path, tmp_path / "a.tar", "--encoder", tiny, "--detector", *detectors)
    names = set(corpus.load_scores(run).detectors)
    assert status == 0 and {"slof", "dao", "clip_score", "duplicates"} < names
    assert sum(n.startswith("k_distance:") for n in names) == 2


def test_a_shard_that_vanishes_after_it_was_embedded_stops_only_who_needs_its_images(
    tmp_path, tiny, monkeypatch
):
    spec, original = shards(tmp_path / "s", 2), corpus.assemble

    def vanishing(*arguments):
        original(*arguments)
        (tmp_path / "s" / "00001.tar").unlink()

    monkeypatch.setattr(corpus, "assemble", vanishing)
    status, run = scan(
        tmp_path, spec, "--encoder", tiny, "--detector", "duplicates", "k_distance:k=4"
    )
    (line,) = notes(run)["incomplete"]
    assert status == 4 and set(corpus.load_scores(run).detectors) == {"k_distance"}
    assert (
        line.startswith("detector duplicates: ")
        and "00001.tar" in line
        and "can no longer be read" in line
    )


def test_a_worker_that_dies_costs_its_unit_alone(tmp_path, tiny, monkeypatch):
    spec = shards(tmp_path / "s", 3)
    red = np.random.default_rng(20).integers(0, 256, (16, 16, 3), dtype=np.uint8)[0, 0, 0]
    monkeypatch.setenv(
        "DEADLY", str((red / 255 - 0.5) / 0.25)
    )  # the first pixel of the second shard
    status, run = scan(tmp_path, spec, "--encoder", tiny, "--detector", "k_distance:k=4", workers=2)
    assert status == 4 and unread(run) == [
        ("00001.tar", "", "a worker ended with status -9; was memory short?")
    ]
    assert {k.partition("/")[0] for k in corpus.load_scores(run).ids} == {"00000", "00002"}


# what is kept


def test_cleaned_shards_hold_the_same_bytes_and_lists_name_them(tmp_path, tiny):
    spec = shards(tmp_path / "s")
    status, run = scan(
        tmp_path,
        spec,
        "--encoder",
        tiny,
        "--detector",
        "k_distance:k=4",
        "--remove",
        "0.1",
        "--write",
        "shards",
    )
    keep_list = (run / "keep.txt").read_text().split()
    assert (
        status == 0
        and len(keep_list) == 54
        and notes(run)["written"] == 54
        and notes(run)["shards"] == 3
    )
    rows = pq.read_table(run / "keep.parquet").to_pylist()
    assert [r["id"] for r in rows] == keep_list and rows[0]["url"].startswith("http://x/")
    for path in sorted((tmp_path / "s").glob("*.tar")):
        with tarfile.open(path) as old, tarfile.open(run / "shards" / path.name) as new:
            held = {m.name: old.extractfile(m).read() for m in old}
            for member in new:
                assert new.extractfile(member).read() == held[member.name]
            names = {Path(m).stem for m in new.getnames()}
        assert names == {r["member"] for r in rows if r["shard"] == str(path)}
    assert load_pairs(ShardSource(expand_paths(str(run / "shards")), 16)).ids == tuple(keep_list)


def test_cleaned_shards_of_folders_and_names_that_read_alike_are_all_there(tmp_path, tiny):
    for i, name in enumerate(("a_b/c", "a/b_c", "q/c")):
        (tmp_path / name).parent.mkdir(parents=True)
        tar_of(tmp_path / f"{name}.tar", records(range(10 * i, 10 * i + 10)))
    words = (
        f"shards:path={tmp_path}/*/*.tar,size=16",
        "--encoder",
        tiny,
        "--detector",
        "k_distance:k=4",
    )
    status, run = scan(tmp_path / "runs", *words, "--write", "shards", "--remove", "0")
    assert status == 0 and notes(run)["written"] == 30
    assert len(load_pairs(ShardSource(expand_paths(str(run / "shards")), 16))) == 30


def test_an_image_stays_only_with_all_its_captions(tmp_path, tiny):
    lines = [
        json.dumps({"captions": [f"a {w} star" for w in ("red", "blue", "green")]}).encode()
        for _ in range(20)
    ]
    tar_of(
        tmp_path / "a.tar",
        [
            (f"{i:02d}.{e}", c)
            for i, t in enumerate(lines)
            for e, c in (("png", picture(i)), ("json", t))
        ],
    )
    words = [
        f"shards:path={tmp_path}/a.tar,size=16,captions=all",
        "--encoder",
        tiny,
        "--detector",
        "clip_score",
    ]
    status, run = scan(tmp_path, *words, "--remove", "0.05", "--write", "shards")
    with_all = {
        k.partition("#")[0] for k in load_pairs(ShardSource((run / "shards" / "a.tar",), 16)).ids
    }
    gone = {k.partition("#")[0] for k in corpus.load_scores(run).ids} - with_all
    keep_list = (run / "keep.txt").read_text().split()
    worst = json.loads((run / "ranked.json").read_text())[:3]
    assert (
        status == 0 and len(keep_list) == 57 and gone == {r["id"].partition("#")[0] for r in worst}
    )


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_a_poisoned_plan_over_real_shards_is_measured(tmp_path, tiny):
    data = f"shards:path={DATA}/ucm_captions/val-00000.tar,size=32"
    words = [
        "poison",
        data,
        "--poison",
        "backdoor:count=12",
        "--trigger",
        "patch:size=8",
        "--target",
        "beach",
    ]
    assert main([*words, "--runs", str(tmp_path)]) == 0
    (poison,) = tmp_path.glob("poison-*")
    status, run = scan(
        tmp_path,
        poison.name,
        "--encoder",
        tiny,
        "--detector",
        "k_distance:k=4",
        "clip_score",
        "--write",
        "shards",
    )
    manifest = json.loads((run / "manifest.json").read_text())
    assert status == 0 and {"auroc", "clip_score.auroc", "poisons_removed"} <= set(
        manifest["metrics"]
    )
    assert manifest["parents"] == [poison.name] and manifest["notes"]["written"] == 204
    parts, c = inputs.open_dataset(Run(poison)), corpus.reopen_corpus(Run(run))
    assert torch.equal(c.take([0, 100]).images, parts.pairs.take([0, 100]).images) and len(c) == 210


# tables


def images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(picture(i))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_are_streamed_and_read_anywhere(tmp_path, tiny, kind, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_ROWS", 7)
    images(tmp_path / "i", 12)
    rows = [
        {"filepath": f"i/{n % 12}.png", "title": f'a red star,\n"{n}"\té', "url": f"http://x/{n}"}
        for n in range(24)
    ]
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    elif kind == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)))
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            out = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            out.writeheader()
            out.writerows(rows)
    status, run = scan(
        tmp_path,
        path,
        "--encoder",
        tiny,
        "--detector",
        "k_distance:k=4",
        "duplicates",
        "--remove",
        "0.25",
    )
    scanned, c = corpus.load_scores(run), corpus.reopen_corpus(Run(run))
    assert (
        status == 0
        and len(scanned) == 24
        and scanned.ids[13] == "i/1.png#14"
        and scanned.captions[3] == rows[3]["title"]
    )
    whole = load_pairs(registry.make("data", f"table:path={path}")())
    assert tuple(scanned.ids) == whole.ids and torch.equal(
        c.take([20, 1]).images, whole.take([20, 1]).images
    )
    with (run / "keep.csv").open(newline="") as file:
        rows_left = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows_left) == 18 and all(Path(r["filepath"]).is_file() for r in rows_left)
    assert {r["title"] for r in rows_left} == {
        scanned.captions[i] for i in scanned.merged.ranking()[6:]
    }


def test_images_inside_parquet_as_hugging_face_holds_them(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(parquet, "BATCH_ROWS", 4)
    rows = [
        {"image": {"bytes": picture(i), "path": f"{i}.png"}, "text": f"a {i}", "id": i}
        for i in range(20)
    ]
    rows[5]["image"]["bytes"], rows[6]["image"] = b"no image", None
    for part in range(2):
        table = pa.Table.from_pylist(rows[10 * part : 10 * part + 10])
        pq.write_table(table, tmp_path / f"p{part}.parquet", row_group_size=3)
    status, run = scan(
        tmp_path,
        f"table:path={tmp_path}/p*.parquet,size=16",
        "--encoder",
        tiny,
        "--detector",
        "k_distance:k=4",
    )
    c = corpus.reopen_corpus(Run(run))
    assert status == 4 and unread(run) == [
        ("p0.parquet", "row 6", "not decodable"),
        ("p0.parquet", "row 7", "no image"),
    ]
    assert list(c.ids) == [str(i) for i in range(20) if i not in (5, 6)]
    plain = [np.asarray(Image.open(io.BytesIO(picture(i)))).transpose(2, 0, 1) for i in (19, 0, 12)]
    assert np.array_equal(c.take([17, 0, 10]).images.numpy(), np.stack(plain))
    assert not (run / "keep.csv").exists() and c.place_of(17) == f"{tmp_path}/p1.parquet row 10"


@pytest.mark.parametrize("workers", [1, 2])
def test_names_that_are_not_utf8_are_spelt_out(tmp_path, tiny, workers):
    """Shards, a table, and a folder of classes, below a directory of such a name."""
    root = tmp_path / os.fsdecode(b"r\xff")
    for label in ("cat", "dog"):
        images(root / "f" / label, 6)
    tar_of(root / "a.tar", records(range(10)))
    tar_of(root / os.fsdecode(b"b\xff.tar"), records(range(10, 20)))
    images(root, 12)
    (root / "t.csv").write_text("filepath,title\n" + "".join(f"{i}.png,a {i}\n" for i in range(12)))
    rest = ("--encoder", tiny, "--detector", "k_distance:k=4", "--remove", "0", "--write", "shards")
    for spec, count in (
        (f"shards:path={root},size=16", 20),
        (f"table:path={root}/t.csv,size=16", 12),
        (f"{root}/f", 12),
    ):
        status, run = scan(tmp_path / "runs", spec, *rest, workers=workers)
        assert status == 0 and len(corpus.load_scores(run)) == count
        assert load_pairs(ShardSource(expand_paths(str(run / "shards")), 16)).captions
        manifest = Run(run).manifest
        assert (
            os.fsdecode(b"\xff") in manifest["typed"]["data"]
            and manifest["notes"]["written"] == count
        )
        assert (run / "report.html").exists()
        if (run / "keep.csv").exists():
            with (run / "keep.csv").open(errors="surrogateescape") as file:
                assert all(
                    Path(r["filepath"]).is_file() for r in csv.DictReader(file, delimiter="\t")
                )
        if count == 20:
            assert "b\\udcff/00010" in corpus.load_scores(run).ids


def test_a_class_whose_name_is_not_utf8_is_poisoned_around(tmp_path, capsys):
    for label in (b"cat", b"dog", b"z\xff"):
        images(tmp_path / "f" / os.fsdecode(label), 6)
    words = [
        "poison",
        f"folder:path={tmp_path}/f,size=16",
        "--poison",
        "backdoor:count=2",
        "--trigger",
        "patch:size=4",
    ]
    words += ["--target", "dog", "--runs", str(tmp_path / "runs")]
    assert main([*words, "--json", "full"]) == 4  # the images of the class that no text can name
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["status"] == "done" and manifest["notes"]["classes"] == [
        "cat",
        "dog",
        os.fsdecode(b"z\xff"),
    ]
    (run,) = (tmp_path / "runs").iterdir()
    assert main(["verify", str(run), "--runs", str(tmp_path / "runs")]) == 0


def test_a_broken_table_is_named_and_the_others_are_scanned(tmp_path, tiny):
    table = pa.table({"image": [picture(i) for i in range(20)], "text": ["a"] * 20})
    pq.write_table(table, tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    pq.write_table(
        table.rename_columns(["image", "caption"]), tmp_path / "c.parquet", store_schema=False
    )
    (tmp_path / "c.parquet").write_bytes(
        (tmp_path / "c.parquet").read_bytes().replace(b"caption", b"cap\xffion")
    )
    twice = pa.Table.from_arrays(
        [table["image"], table["text"], table["image"]], names=["image", "text", "image"]
    )
    pq.write_table(twice, tmp_path / "d.parquet")
    days = pa.array([2**31 - 1, *range(19)], pa.int32()).cast(pa.date32())
    pq.write_table(table.append_column("id", days), tmp_path / "e.parquet")
    images(tmp_path / "i", 3)
    lines = ["filepath,title", *(f"i/{i}.png,{i}" for i in range(3)), 'i/0.png,"a stray quote']
    (tmp_path / "f.csv").write_text("\n".join(lines) + "\n")
    spec = (
        f"table:path={tmp_path}/{{a.parquet,b.parquet,c.parquet,d.parquet,e.parquet,f.csv}},size=16"
    )
    status, run = scan(tmp_path / "runs", spec, "--encoder", tiny, "--detector", "k_distance:k=4")
    assert status == 4 and len(corpus.load_scores(run)) == 20 + 19 + 4
    assert [(f, m) for f, m, _ in unread(run)] == [
        ("b.parquet", ""),
        ("c.parquet", ""),
        ("d.parquet", ""),
        ("e.parquet", "row 1"),
    ]


def test_a_table_of_paths_and_bytes_leaves_no_list_of_paths(tmp_path, tiny):
    images(tmp_path, 1)
    cells = [
        {"bytes": None, "path": "0.png"},
        *({"bytes": picture(i), "path": None} for i in range(1, 12)),
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(
        pa.table({"image": pa.array(cells, kind), "text": ["a"] * 12}), tmp_path / "t.parquet"
    )
    words = (
        f"table:path={tmp_path}/t.parquet,size=16",
        "--encoder",
        tiny,
        "--detector",
        "k_distance:k=4",
    )
    status, run = scan(tmp_path / "runs", *words, "--remove", "0")
    assert status == 0 and len(corpus.load_scores(run)) == 12 and not (run / "keep.csv").exists()


def test_rows_that_share_one_large_cell_do_not_fill_the_memory(tmp_path):
    """A dictionary of one entry of 4 MiB, and 256 rows that point at it: 1 GiB unpacked, 4 MiB on
    disk.
    """
    cell = pa.array([os.urandom(4 << 20)], pa.binary())
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), cell)
    table = pa.table({"image": shared, "caption": ["a"] * 256})
    pq.write_table(
        table, tmp_path / "t.parquet", store_schema=False, dictionary_pagesize_limit=1 << 30
    )
    batches = list(parquet.read_batches(tmp_path / "t.parquet", ["image", "caption"]))
    assert max(b.nbytes for b in batches) < 40 << 20 and sum(map(len, batches)) == 256
    assert len(next(parquet.read_batches(tmp_path / "t.parquet", ["caption"]))) == 256, (
        "what is not read costs nothing"
    )
    pq.write_table(
        pa.table({"image": pa.array([[b"a", b"b"]] * 3), "text": ["a"] * 3}),
        tmp_path / "lists.parquet",
    )
    with pytest.raises(UserError, match=r"column image\.list\.element holds lists"):
        list(parquet.read_batches(tmp_path / "lists.parquet", ["image", "text"]))
    assert len(next(parquet.read_batches(tmp_path / "lists.parquet", ["text"]))) == 3
    with pytest.raises(UserError, match="unpacks to more than"):
        list(registry.make("data", f"table:path={tmp_path}/t.parquet")().records())
    pq.write_table(table.slice(0, 20), tmp_path / "few.parquet")
    cells = TableImages(registry.make("data", f"table:path={tmp_path}/few.parquet")(), [])
    assert cells.read(0, 3, 4 << 20) == cells.read(0, 4, 4 << 20) == cell[0].as_py()
    assert sum(len(c) for _, block in cells.blocks for c in block.values()) <= 2 * (
        parquet.MAX_HELD_BYTES + (4 << 20)
    )


def test_rows_of_a_small_table_are_unpacked_once_in_whatever_order_they_are_asked(
    tmp_path, monkeypatch
):
    images = [os.urandom(64) for _ in range(400)]
    pq.write_table(pa.table({"image": images, "caption": ["a"] * 400}), tmp_path / "t.parquet")
    cells, read = (
        TableImages(registry.make("data", f"table:path={tmp_path}/t.parquet")(), []),
        [],
    )
    unpack = cells._read_block
    monkeypatch.setattr(cells, "_read_block", lambda *at: read.append(at) or unpack(*at))
    for row in np.random.default_rng(0).permutation(400).tolist():
        assert cells.read(0, row, 64) == images[row]
    assert len(read) == 2


def test_a_table_reads_nothing_outside_its_root(tmp_path, tiny):
    images(tmp_path / "in" / "i", 8)
    images(tmp_path / "out", 2)
    outside = ["../out/0.png", str(tmp_path / "out" / "1.png"), "i/../../out/0.png"]
    outside += ["https://x.org/a.png", "/dev/zero", "i/gone.png"]
    inside = [f"i/{n}.png" for n in range(6)] + [
        "i/../i/6.png",
        str(tmp_path / "in" / "i" / "7.png"),
    ]
    (tmp_path / "in" / "t.csv").write_text(
        "image,caption\n" + "".join(f"{p},a star\n" for p in outside + inside)
    )
    status, run = scan(
        tmp_path, tmp_path / "in" / "t.csv", "--encoder", tiny, "--detector", "k_distance:k=4"
    )
    assert status == 4 and len(corpus.load_scores(run)) == 8
    reasons = ["path leaves the root"] * 3 + [
        "not a local path",
        "path leaves the root",
        "no such file",
    ]
    assert [r for _, _, r in unread(run)] == reasons
    spec = f"table:path={tmp_path}/in/t.csv,root={tmp_path}"
    assert len(load_pairs(registry.make("data", spec)())) == 11
    (tmp_path / "in" / "odd.csv").write_text("picture,caption\na.png,hello\n")
    assert scan(tmp_path, tmp_path / "in" / "odd.csv", "--encoder", tiny)[0] == 2


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=6), st.text(max_size=12)), min_size=1, max_size=25
    ),
    st.integers(1, 9),
    st.sampled_from(["csv", "jsonl", "parquet"]),
)
def test_blocks_of_a_table_are_the_table(tmp_path_factory, rows, size, kind):
    rows = [(f"i{a}", b.replace("\r", "")) for a, b in rows]
    rows = [(a.replace("\r", "").replace("\0", ""), b.replace("\0", "")) for a, b in rows]
    path = tmp_path_factory.mktemp("t") / f"t.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("image", "caption"), *rows])
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"image": a, "caption": b}) for a, b in rows))
    else:
        pq.write_table(
            pa.table({"image": [a for a, _ in rows], "caption": [b for _, b in rows]}),
            path,
            row_group_size=4,
        )
    whole = list(tables.read_rows(path))
    assert [(r["image"], r["caption"]) for _, r in whole] == rows
    assert [
        r for place in tables.cut_blocks(path, size) for r in tables.read_rows(path, place)
    ] == whole


# ready embeddings


def ready(
    folder: Path, counts: tuple[int, ...] = (300, 200), width: int = 16, texts: bool = True
) -> np.ndarray:
    """clip-retrieval's layout."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((sum(counts), width)).astype(np.float16)
    start = 0
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for i, n in enumerate(counts):
        np.save(folder / "img_emb" / f"img_emb_{i}.npy", z[start : start + n])
        if texts:
            np.save(
                folder / "text_emb" / f"text_emb_{i}.npy", z[start : start + n] + np.float16(0.1)
            )
        keys = [f"{k:09d}" for k in range(start, start + n)]
        facts = {
            "key": keys,
            "caption": [f"caption {k}" for k in keys],
            "url": [f"http://x/{k}" for k in keys],
        }
        pq.write_table(
            pa.table(facts), folder / "metadata" / f"metadata_{i}.parquet", row_group_size=64
        )
        start += n
    return z


def test_ready_embeddings_need_no_encoder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bezoar.data.sources.embeddings.UNIT_ROWS", 128)
    monkeypatch.setattr("bezoar.data.sources.embeddings.BLOCK_ROWS", 50)
    z = ready(tmp_path / "e")
    status, run = scan(tmp_path, tmp_path / "e", "--detector", "k_distance:k=4", "clip_score")
    assert status == 0
    c, scanned = corpus.reopen_corpus(Run(run)), corpus.load_scores(run)
    expected = torch.nn.functional.normalize(torch.from_numpy(z.astype(np.float32)), dim=1)
    assert torch.allclose(c.embedded.images, expected, atol=1e-6) and len(scanned) == 500
    assert scanned.ids[321] == "000000321" and scanned.captions[321] == "caption 000000321"
    assert (
        scanned.places[321] == f"{tmp_path}/e/img_emb/img_emb_1.npy row 21"
        and list(c.urls)[2] == "http://x/000000002"
    )
    distance = torch.cdist(expected.double(), expected.double())
    near = registry.make("detector", "k_distance:k=4,pool=500")(corpus.Vectors(), c).values
    assert torch.allclose(near.double(), distance.sort(1).values[:, 4], atol=1e-5)
    status, run = scan(tmp_path, tmp_path / "e", "--detector", "duplicates", "k_distance:k=4")
    assert status == 4 and "no images" in notes(run)["incomplete"][0]
    assert scan(tmp_path, tmp_path / "e", "--detector", "transplant", "duplicates")[0] == 2
    assert scan(tmp_path, tmp_path / "e", "--encoder", "resnet", "--detector", "k_distance")[0] == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"), [("img_emb_00.npy", "are both number 0"), ("extra.npy", "ends in no number")]
)
def test_no_file_of_ready_embeddings_is_left_out_without_a_word(tmp_path, capsys, name, says):
    ready(tmp_path / "e", (100,))
    np.save(tmp_path / "e" / "img_emb" / name, np.ones((7, 16), "f4"))
    assert (
        main(
            [
                "scan",
                str(tmp_path / "e"),
                "--detector",
                "k_distance",
                "--runs",
                str(tmp_path / "runs"),
            ]
        )
        == 2
    )
    assert says in capsys.readouterr().err


def test_a_changed_list_of_trusted_records_is_another_question(tmp_path, capsys):
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(200, 8)).astype("f4"))
    words = (
        tmp_path / "v.npy",
        "--detector",
        "k_distance:k=2",
        "--trusted",
        tmp_path / "clean.txt",
    )
    folders = []
    for count in (100, 120, 120):
        (tmp_path / "clean.txt").write_text("\n".join(f"v/{i}" for i in range(count)))
        status, run = scan(tmp_path / "runs", *words)
        assert status == 0
        folders.append(run)
    assert folders[0] != folders[1] == folders[2]
    (tmp_path / "clean.txt").unlink()
    assert main(["scan", *map(str, words), "--runs", str(tmp_path / "runs")]) == 2
    assert "no list of clean records" in capsys.readouterr().err
    fields = {f.name for f in dataclasses.fields(Scan)}
    assert set(resolve_inputs(Scan(str(tmp_path / "v.npy")), Settings())[1]) == fields | {
        "verb",
        "seed",
        "version",
    }, "as ever"


def test_ready_embeddings_that_are_bad_are_set_aside_by_name(tmp_path, capsys):
    folder = tmp_path / "e"
    z = ready(folder, (100,) * 6)
    z[3] = np.nan
    z[4] = 0
    np.save(folder / "img_emb" / "img_emb_0.npy", z[:100])
    np.save(
        folder / "img_emb" / "img_emb_1.npy", np.array([{"a": 1}] * 100, object), allow_pickle=True
    )
    whole = (folder / "img_emb" / "img_emb_2.npy").read_bytes()
    (folder / "img_emb" / "img_emb_2.npy").write_bytes(whole[:-10])
    (folder / "img_emb" / "img_emb_3.npy").write_bytes(
        whole.replace(b"(100, 16)", b"(9" + b"0" * 4 + b", 1)")
    )
    np.save(folder / "text_emb" / "text_emb_4.npy", z[:7])
    (folder / "metadata" / "metadata_5.parquet").write_bytes(b"PAR1 nothing PAR1")
    status, run = scan(tmp_path, folder, "--detector", "k_distance:k=4")
    assert status == 4 and len(corpus.load_scores(run)) == 98
    skipped = unread(run)
    assert [t[1:] for t in skipped[:2]] == [
        ("row 3", "NaN or infinite vector of its image"),
        ("row 4", "zero vector of its image"),
    ]
    assert [f for f, *_ in skipped[2:]] == [f"img_emb_{i}.npy" for i in range(1, 6)]
    lines = (run / "skipped.jsonl").read_text().splitlines()[2:]
    for line, says in zip(
        lines, ("pickle", "bytes", "header asks", "is of shape", "parquet"), strict=True
    ):
        assert says in line
    for bad in ("img_emb_1", "img_emb_2", "img_emb_3"):
        assert (
            scan(tmp_path, folder / "img_emb" / f"{bad}.npy", "--detector", "k_distance:k=4")[0]
            == 2
        )
    assert "Traceback" not in capsys.readouterr().err


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.text(max_size=9), max_size=5), max_size=6))
def test_mapped_texts_are_what_was_written(tmp_path_factory, blocks):
    folder = tmp_path_factory.mktemp("t")
    with columns.write_texts(folder, "x") as out:
        for block in blocks:
            out.append(pa.array(["cut off", *block], pa.large_string()).slice(1))
    flat = [t for b in blocks for t in b]
    held = columns.map_texts(folder, "x")
    assert list(held) == flat and [held[i] for i in range(len(flat))] == flat
    assert list(held.take(np.arange(len(flat))[::-1])) == flat[::-1]


def test_ids_that_clash_get_names_that_do_not():
    blocks = [pa.array(ids) for ids in (["a", "b", "a"], ["a~2", "a", "c", "b"])]
    assert assembly._rename_doubles(lambda: blocks) == {2: "a~2", 3: "a~2~2", 4: "a~3", 6: "b~2"}


def test_a_run_is_scanned_as_it_was_trained_on(tmp_path, tiny):
    written = write_shards(
        tmp_path / "w", load_pairs(registry.make("data", "scenes:count=60")()), per_shard=25
    )
    status, run = scan(
        tmp_path,
        "scenes:count=60",
        "--encoder",
        tiny,
        "--detector",
        "k_distance:k=4",
        "--write",
        "shards",
    )
    status2, run2 = scan(
        tmp_path,
        f"shards:path={tmp_path}/w,size=32",
        "--encoder",
        tiny,
        "--detector",
        "k_distance:k=4",
    )
    one, two = corpus.load_scores(run), corpus.load_scores(run2)
    assert status == status2 == 0 and len(written) == 3 and list(one.ids) == list(two.ids)
    assert torch.allclose(one.merged.values, two.merged.values, atol=1e-5)
    assert set(load_pairs(ShardSource(expand_paths(str(run / "shards")), 32)).ids) == set(
        (run / "keep.txt").read_text().split()
    )


def test_what_could_not_be_read_is_said_again_by_a_scan_that_is_at_hand(tmp_path, tiny, capsys):
    (tmp_path / "f" / "a").mkdir(parents=True)
    for i in range(20):
        (tmp_path / "f" / "a" / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "f" / "a" / "broken.png").write_bytes(b"broken")
    (tmp_path / "f" / "a" / "notes.txt").write_bytes(b"notes")
    for _ in range(2):
        status, run = scan(
            tmp_path, tmp_path / "f", "--encoder", tiny, "--detector", "k_distance:k=4"
        )
        streams = capsys.readouterr()
        assert (
            status == 4 and "scan: 2 records or files could not be read, beside 20" in streams.err
        )
        assert (
            "The keep-list leaves out the 1 most suspicious of 20 records" in streams.out
            and "metric" not in streams.out
        )
        assert (
            "1 not decodable, 1 not an image by its name; see skipped.jsonl."
            in (run / "report.html").read_text()
        )
    manifests = [
        ("f", "a/broken.png", "not decodable"),
        ("f", "a/notes.txt", "not an image by its name"),
    ]
    assert sorted(unread(run)) == manifests


def test_an_encoder_of_poisoned_data_does_not_make_other_data_poisoned(tmp_path, capsys):
    words = [
        "poison",
        "scenes:count=300",
        "--poison",
        "backdoor:count=9",
        "--trigger",
        "patch",
        "--target",
        "striped star",
    ]
    assert main([*words, "--runs", str(tmp_path)]) == 0
    assert (
        main(["train", "poison-", "--objective", "clip:epochs=1,batch=64", "--runs", str(tmp_path)])
        == 0
    )
    plan = next(tmp_path.glob("poison-*"))
    train = next(tmp_path.glob("train-*"))
    status, run = scan(
        tmp_path, "scenes:count=60,seed=9", "--encoder", train.name, "--detector", "k_distance:k=4"
    )
    page, manifest = (
        (run / "report.html").read_text(),
        json.loads((run / "manifest.json").read_text()),
    )
    assert (
        status == 0
        and manifest["goal"] == []
        and not manifest["metrics"]
        and "poisoned on purpose" not in page
    )
    assert inputs.poison_run(Run(run)) is None and inputs.poison_run(Run(train)) == Run(plan)
    status, other = scan(tmp_path, train.name, "--detector", "k_distance:k=4")
    assert (
        json.loads((other / "manifest.json").read_text())["goal"]
        and "poisoned on purpose" in (other / "report.html").read_text()
    )


def test_records_are_pooled_by_their_source(tmp_path, tiny, capsys):
    """By the metadata's uploader, the domains of URLs, a table; what was taken is said, and the
    table is on the page.
    """
    (tmp_path / "in").mkdir()
    for shard in range(2):
        members: dict[str, bytes] = {}
        for i in range(shard * 60, shard * 60 + 60):
            metadata = {"url": f"http://img{i}.site{i % 5}.com/{i}", "uploader": f"u{i % 3}\n"}
            members |= {
                f"{i:05d}.png": picture(i),
                f"{i:05d}.txt": b"a red star" if i % 5 else b"a blue cross over the wall",
                f"{i:05d}.json": json.dumps(metadata).encode(),
            }
        tar_of(tmp_path / "in" / f"{shard}.tar", members)
    lines = ["id,source"] + [f"{i // 60}/{i:05d},=cell{i % 4}" for i in range(100)]
    (tmp_path / "origin.csv").write_text("\n".join(lines))
    data = f"shards:path={tmp_path}/in/*.tar,size=16"
    expected = {
        "auto": {"u0\\n": 40, "u1\\n": 40, "u2\\n": 40},
        "domain": {f"site{i}.com": 24 for i in range(5)},
        "shard": {f"{tmp_path}/in/{i}.tar": 60 for i in range(2)},
        str(tmp_path / "origin.csv"): {f"=cell{i}": 25 for i in range(4)},
    }
    for wanted, counts in expected.items():
        options = ("--encoder", f"{tiny}", "--detector", "k_distance:k=3", "--sources", wanted)
        _, run = scan(tmp_path / f"runs{len(wanted)}", data, *options)
        with (run / "sources.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        # A spreadsheet would run a cell that begins with =; it is quoted.
        assert {row["source"].removeprefix("'"): int(row["records"]) for row in rows} == counts
        assert all(0 <= float(row["q"]) <= 1 for row in rows)
        assert notes(run)["sources"]["tested"] == len(counts)
        assert f"of {len(counts)} sources" in notes(run)["verdict"]
        page = (run / "report.html").read_text()
        suspects = [row["source"] for row in rows if row["verdict"]]
        assert "sources.csv" in page and all(name[:50] in page for name in suspects)
    c = corpus.reopen_corpus(Run(run))
    assert c.origins[4] == "u1\n"
    _, run = scan(
        tmp_path / "none",
        data,
        "--encoder",
        f"{tiny}",
        "--detector",
        "k_distance:k=3",
        "--sources",
        "none",
    )
    assert not (run / "sources.csv").exists() and "sources" not in notes(run)
    for wanted, says in (("folder", "no record says so"), ("x.csv", "no such file")):
        status, _ = scan(tmp_path / "none", data, "--encoder", f"{tiny}", "--sources", wanted)
        assert status == 2 and says in capsys.readouterr().err
    key = f"shards:path={tmp_path}/in/*.tar,size=16,source=url"
    _, run = scan(
        tmp_path / "key",
        key,
        "--encoder",
        f"{tiny}",
        "--detector",
        "k_distance:k=3",
        "--sources",
        "metadata",
    )
    assert corpus.reopen_corpus(Run(run)).origins[4] == "http://img4.site4.com/4"
