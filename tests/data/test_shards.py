"""Shards: streaming webdataset tars, hostile ones too, and writing them."""

import io
import itertools
import json
import tarfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_files import add_members, random_picture, tar_of
from PIL import Image

from bezoar.data import decoding
from bezoar.data.decoding import Record
from bezoar.data.files import images, paths, skipped
from bezoar.data.files.images import decode_image
from bezoar.data.files.paths import expand_paths
from bezoar.data.files.skipped import Unreadable
from bezoar.data.label_sets import distinct_names, resize
from bezoar.data.pairs import Pairs, load_pairs
from bezoar.data.shards import write_shards
from bezoar.data.sources.shards import ShardSource
from bezoar.errors import UserError
from bezoar.registry import make, spec

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")


def record(
    key: str, seed: int = 0, caption: bytes = b"a caption", **metadata: Any
) -> list[tuple[str, bytes]]:
    """The members of one good record."""
    members = [(f"{key}.png", random_picture(seed)), (f"{key}.txt", caption)]
    return [*members, (f"{key}.json", json.dumps(metadata).encode())] if metadata else members


def reasons(source: ShardSource) -> list[tuple[str, str]]:
    """(member, what comes before the colon of the reason) of everything that was skipped."""
    return [(s.member, s.reason.partition(":")[0]) for s in source.report.skipped]


@needs_data
def test_flickr8k_val_against_tarfile_and_pil() -> None:
    path = DATA / "flickr8k" / "val-00000.tar"
    source = ShardSource((path,), size=128, limit=20)
    pairs = load_pairs(source)
    with tarfile.open(path) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()[:60]}  # type: ignore[union-attr]
    for i in range(20):
        key = f"{i:09d}"
        plain = np.asarray(Image.open(io.BytesIO(files[key + ".jpg"])).convert("RGB")).transpose(
            2, 0, 1
        )
        assert np.array_equal(pairs.images[i].numpy(), plain)  # 128 px as stored: no resizing
        assert pairs.captions[i] == files[key + ".txt"].decode().strip()
        assert pairs.ids[i] == f"val-00000/{key}"
    assert pairs.labels is None and pairs.classes == () and pairs.report is source.report
    assert str(pairs.report) == "20 read, 0 skipped"


@needs_data
def test_all_captions_share_the_image() -> None:
    path = str(DATA / "flickr8k" / "val-00000.tar")
    pairs = load_pairs(make("data", f"shards:path={path},captions=all,size=32,limit=12")())
    assert pairs.ids[:6] == (
        *(f"val-00000/000000000#{i}" for i in range(5)),
        "val-00000/000000001#0",
    )
    assert len(set(pairs.captions[:5])) == 5
    assert torch.equal(pairs.images[0], pairs.images[4]) and not torch.equal(
        pairs.images[0], pairs.images[5]
    )


@needs_data
def test_classes_and_labels_of_ucm() -> None:
    method = make("data", f"shards:path={DATA}/ucm_captions/val-*.tar,size=32")
    assert make("data", spec(method)) == method and all(p.is_file() for p in method.files())
    source = method()
    pairs = load_pairs(source)
    assert len(pairs) == 210 and len(pairs.classes) == 21 and pairs.classes[7] == "forest"
    assert (
        pairs.labels is not None and int(pairs.labels[0]) == 4 and pairs.classes[4] == "buildings"
    )
    assert source.ids == pairs.ids and len(source) == 210


@needs_data
def test_a_real_cc12m_shard() -> None:
    pairs = load_pairs(ShardSource(expand_paths(str(DATA / "cc12m_sample" / "*.tar"))))
    assert (
        pairs.report is not None
        and len(pairs) == pairs.report.read == 32
        and not pairs.report.skipped
    )
    assert pairs.captions[0] == "Red Square is a city square in Moscow, Russia."


@needs_data
def test_ids_do_not_depend_on_order_and_results_not_on_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = expand_paths(f"{DATA}/ucm_captions/{{val-00000,train-00001}}.tar")
    one, two = load_pairs(ShardSource(paths, 16)), load_pairs(ShardSource(paths[::-1], 16))
    assert one.ids != two.ids and sorted(one.ids) == sorted(two.ids)
    where = {key: row for row, key in enumerate(two.ids)}
    assert torch.equal(one.images, two.take([where[k] for k in one.ids]).images)
    monkeypatch.setattr(decoding, "thread_count", lambda: 3)
    again = load_pairs(ShardSource(paths, 16))
    assert again.ids == one.ids and torch.equal(again.images, one.images)


def test_batches_are_whole_and_limited(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [m for i in range(10) for m in record(f"{i}", i)])
    source = ShardSource((path,), 16)
    assert [len(b) for b in source.batches(4)] == [4, 4, 2]
    assert [len(b) for b in ShardSource((path,), 16, limit=5).batches(4)] == [4, 1]
    assert len(ShardSource((path,), 16, limit=5)) == 5


def test_shards_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        paths.append(tar_of(tmp_path / folder / "0.tar", record("k")))
    assert load_pairs(ShardSource(tuple(paths))).ids == ("x/0/k", "y/0/k")
    with pytest.raises(UserError, match="named twice"):
        load_pairs(ShardSource((paths[0], paths[0])))


def test_files_are_told_apart_by_their_endings_where_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert paths.distinct_stems([Path("a.csv"), Path("a.parquet")]) == ("a.csv", "a.parquet")
    assert paths.distinct_stems([Path("x/a.tar"), Path("y/a.tar")]) == ("x/a", "y/a")
    monkeypatch.chdir(tmp_path)
    for twice in (
        [Path("a.tar"), tmp_path / "a.tar"],
        [Path("a.tar"), Path("a.tar"), Path("b.tar")],
    ):
        with pytest.raises(UserError, match=r"named twice among \d, such as .*a\.tar"):
            paths.distinct_stems(twice)


def test_hostile_members_are_named(tmp_path: Path) -> None:
    bomb = random_picture().replace((16).to_bytes(4, "big") * 2, (60_000).to_bytes(4, "big") * 2, 1)
    jpeg = random_picture(side=64, name="JPEG")
    members = [
        *record("good"),
        ("tiny.png", random_picture(side=1)),
        ("tiny.txt", b"one pixel"),
        ("noise.jpg", b"no image at all"),
        ("noise.txt", b"text"),
        ("half.jpg", jpeg[: len(jpeg) // 2]),
        ("half.txt", b"half a file"),
        ("bomb.png", bomb),
        ("bomb.txt", b"3.6 gigapixels"),
        *record("latin", caption=b"caf\xe9"),
        *record("empty", caption=b"  "),
        ("lonely.txt", b"no image"),
        *record("../../up"),
        *record("/etc/top"),
        *record("a\nb"),
        *record("good", 5),
        *record("worse", label=10**9),
        *record("bool", label=True),
        *record("half_a_character", caption=b"", caption_=1),
        ("deep.png", random_picture()),
        ("deep.json", b"[" * 100_000),
        ("list.png", random_picture()),
        ("list.json", b"[]"),
        *record("pickle", seed=3),
        ("pickle.pkl", b"\x80\x04."),
        ("two.png", random_picture()),
        ("two.webp", random_picture(name="WEBP")),
        ("two.txt", b"two images"),
        ("ico.png", random_picture(name="ICO")),
        ("ico.txt", b"another format"),
    ]
    source = ShardSource((tar_of(tmp_path / "hostile.tar", members),), 16)
    pairs = load_pairs(source)
    assert pairs.ids == ("hostile/good", "hostile/good~2", "hostile/pickle")
    assert source.report.read == 3 and [s.member for s in source.report.renamed] == ["good"]
    assert set(reasons(source)) == {
        ("tiny", "smaller than 8 pixels a side"),
        ("noise", "not decodable"),
        ("half", "not decodable"),
        ("bomb", "not decodable"),
        ("latin", "caption is not UTF-8"),
        ("empty", "no caption"),
        ("lonely", "no image"),
        ("worse", "label is not a number from 0 to 99999"),
        ("bool", "label is not a number from 0 to 99999"),
        ("half_a_character", "no caption"),
        ("deep", "metadata is not JSON"),
        ("list", "metadata is not a JSON object"),
        ("two", "several images of one key"),
        ("ico", "not decodable"),
        ("../../up.png", "unsafe name"),
        ("../../up.txt", "unsafe name"),
        ("/etc/top.png", "unsafe name"),
        ("/etc/top.txt", "unsafe name"),
        (r"'a\nb.png'", "unsafe name"),
        (r"'a\nb.txt'", "unsafe name"),
    }
    assert "18" not in str(source.report).partition("(")[0] and not list(tmp_path.glob("**/*.pkl"))


def test_pixel_bound_below_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "IMAGE_PIXELS", 255)
    with pytest.raises(Unreadable, match="too many pixels: 16x16"):
        decode_image(random_picture(), 8)


def test_links_are_not_followed_and_large_members_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_members(tar, record("ok"))
        tar.addfile(_member("l.png", tarfile.SYMTYPE, "secret.txt"))
        tar.addfile(_member("h.txt", tarfile.LNKTYPE, "ok.txt"))
        tar.addfile(_member("f.txt", tarfile.FIFOTYPE))
        big = _member("big.txt", tarfile.REGTYPE)
        big.size = paths.TEXT_BYTES + 1
        tar.addfile(big, io.BytesIO(bytes(big.size)))
    source = ShardSource((tmp_path / "a.tar",), 16)
    assert load_pairs(source).ids == ("a/ok",)
    link = "not a regular file"
    assert reasons(source) == [
        ("l.png", link),
        ("h.txt", link),
        ("f.txt", link),
        ("big.txt", "too large"),
    ]


def _member(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, link
    return header


@pytest.mark.parametrize("where", ["data", "header", "boundary"])
def test_truncated_tar_is_read_up_to_the_break_and_named(tmp_path: Path, where: str) -> None:
    whole = tar_of(tmp_path / "t.tar", [m for i in range(6) for m in record(f"{i}", i)])
    with tarfile.open(whole) as tar:
        last = tar.getmembers()[-2]
    cut = {"data": last.offset_data + 100, "header": last.offset + 100, "boundary": last.offset}[
        where
    ]
    whole.write_bytes(whole.read_bytes()[:cut])
    source = ShardSource((whole,), 16)
    pairs = load_pairs(source)
    assert "t/4" in (*pairs.ids, *(f"t/{m}" for m, _ in reasons(source))) and 4 <= len(pairs) <= 5
    assert pairs.ids[:4] == ("t/0", "t/1", "t/2", "t/3")
    assert reasons(source)[-1] == ("", "broken tar") and source.report.skipped[-1].file == str(
        whole
    )


def test_overwritten_header_does_not_end_the_tar_quietly(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "t.tar", [m for i in range(6) for m in record(f"{i}", i)])
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[6].offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 512] = b"\xff" * 512
    path.write_bytes(content)
    source = ShardSource((path,), 16)
    assert len(load_pairs(source)) == 2 and reasons(source) == [
        ("2", "record cut off where the tar breaks"),
        ("", "broken tar"),
    ]


def test_pax_header_cannot_ask_for_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    path = tar_of(tmp_path / "t.tar", [*record("a"), *record("b"), *record("c")])
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[4].offset
    path.write_bytes(path.read_bytes()[:offset] + header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    source = ShardSource((path,), 16)
    tracemalloc.start()
    assert load_pairs(source).ids == ("t/a",) and reasons(source)[-1] == ("", "broken tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * paths.FILE_BYTES


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header as it is written, of any size that base 256 can spell."""
    tar_header = tarfile.TarInfo(name)
    tar_header.type, tar_header.size = kind, size
    return tar_header.tobuf(tarfile.GNU_FORMAT)


def extended(content: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A header before a header, and its content."""
    return header("more", len(content), kind) + content + bytes(-len(content) % 512)


HOSTILE = {
    "size below zero": header("c.png", -512),
    "other member below zero": header("c.bin", -512),
    "PAX size that points back": extended(b"14 size=-2048\n")
    + header("c.png", 3)
    + b"abc".ljust(512),
    "PAX size at its own header": extended(b"13 size=-512\n")
    + header("c.png", 3)
    + b"abc".ljust(512),
    "PAX length of 5000 digits": extended(b"1" * 5000 + b" a=b\n") + header("c.png", 3),
    "megabytes of digits": extended(b"1" * (2 << 20)) + header("c.png", 3),
    "sparse map": extended(b"22 GNU.sparse.map=a,b\n") + header("c.png", 512) + bytes(512),
    "long chain": extended(b"name\0", tarfile.GNUTYPE_LONGNAME) * 3000 + header("c.png", 3),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_end_a_tar_by_name_and_soon(tmp_path: Path, name: str) -> None:
    path = tar_of(tmp_path / "t.tar", [*record("a"), *record("b")])
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    path.write_bytes(path.read_bytes()[:end] + HOSTILE[name] + bytes(1024))
    start, source = time.process_time(), ShardSource((path,), 16)
    items = list(itertools.islice(source.records(), 10))
    assert time.process_time() - start < 5 and len(items) <= 3
    assert isinstance(items[0], Record) and items[0].ids == ("t/a",)
    assert isinstance(items[-1], skipped.Skipped) and items[-1].reason.startswith("broken tar")
    path.write_bytes(HOSTILE[name] + bytes(1024))
    with pytest.raises(UserError, match=r"t\.tar") as error:
        load_pairs(ShardSource((path,), 16))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"this is not a tar" * 100, bytes(10240)])
def test_not_a_tar_or_nothing_in_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar") as error:
        load_pairs(ShardSource((path,)))
    assert "\n" not in str(error.value)


def test_a_shard_that_yields_nothing_is_an_error_after_what_came_before(tmp_path: Path) -> None:
    good = tar_of(tmp_path / "0.tar", record("a"))
    bad = tar_of(tmp_path / "1.tar", [("x.txt", b"no image")])
    assert len(load_pairs(ShardSource((good, bad), 16, limit=1))) == 1
    with pytest.raises(UserError, match=r"1\.tar.*no image"):
        load_pairs(ShardSource((good, bad), 16))


def test_labels_from_class_names_alone_and_conflicts(tmp_path: Path) -> None:
    names = {"a": "dog", "b": "cat", "c": None}
    one = tar_of(
        tmp_path / "0.tar", [m for k, c in names.items() for m in record(k, **{"class": c})]
    )
    pairs = load_pairs(ShardSource((one,), 16))
    assert (
        pairs.classes == ("cat", "dog")
        and pairs.labels is not None
        and pairs.labels.tolist() == [1, 0, -1]
    )
    two = tar_of(
        tmp_path / "1.tar",
        [*record("a", label=3, **{"class": "x"}), *record("b", label=3, **{"class": "y"})],
    )
    with pytest.raises(UserError, match="label 3 is 'x' and also 'y'"):
        load_pairs(ShardSource((two,), 16))
    three = tar_of(tmp_path / "2.tar", [*record("a", label=5), *record("b", label=-1)])
    bare = load_pairs(ShardSource((three,), 16))
    assert bare.classes == () and bare.labels is not None and bare.labels.tolist() == [5, -1]


def test_a_class_exists_only_where_a_record_names_it(tmp_path: Path) -> None:
    facts = {"a": (700, "x"), "b": (100, "y"), "c": (700, ""), "d": (300, ""), "e": (None, None)}
    members = [
        member
        for key, (label, name) in facts.items()
        for member in record(key, label=label, **{"class": name})
    ]
    pairs = load_pairs(ShardSource((tar_of(tmp_path / "0.tar", members),), 16))
    assert pairs.labels is not None and pairs.classes == ("y", "x")
    assert pairs.labels.tolist() == [1, 0, 1, -1, -1]  # label 300 has no name


def test_classes_of_one_name_stay_apart(tmp_path: Path) -> None:
    members = [
        member
        for key, label in {"a": 134, "b": 517}.items()
        for member in record(key, label=label, **{"class": "crane"})
    ]
    pairs = load_pairs(ShardSource((tar_of(tmp_path / "0.tar", members),), 16))
    assert pairs.labels is not None and pairs.labels.tolist() == [0, 1]
    assert pairs.classes == ("crane", "crane (2)")
    taken = ("maillot", "maillot (2)", "maillot", "crane")
    assert distinct_names(taken) == ("maillot", "maillot (2)", "maillot (3)", "crane")
    assert distinct_names(("a", "a", "a")) == ("a", "a (2)", "a (3)")


def test_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "MAX_PATHS", 1000)
    for i in range(12):
        tar_of(tmp_path / f"{i:05d}.tar", record("a"))
    everything = [p.name for p in expand_paths(f"{tmp_path}/{{00000..00011}}.tar")]
    assert everything == [f"{i:05d}.tar" for i in range(12)]
    assert (
        [p.name for p in expand_paths(f"{tmp_path}/*.tar")]
        == [p.name for p in expand_paths(str(tmp_path))]
        == everything
    )
    for text, match in (
        (f"{tmp_path}/{{00010..00013}}.tar", "2 of 4 are missing, the first is .*00012"),
        (f"{tmp_path}/none-*.tar", "no such"),
        (f"{tmp_path}/{{0..2.tar", "nbalanced"),
        (f"{tmp_path}/{{0..9999999}}.tar", "more than"),
    ):
        with pytest.raises(UserError, match=match):
            expand_paths(text)


def example(count: int = 25) -> Pairs:
    pixels = torch.from_numpy(
        np.random.default_rng(1).integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)
    )
    labels = torch.arange(count) % 3 - 1
    captions = tuple(f"number {i}, é" for i in range(count))
    return Pairs(pixels, captions, labels, tuple(f"some/{i}" for i in range(count)), ("cat", "dog"))


def test_written_shards_are_exact_and_deterministic(tmp_path: Path) -> None:
    pairs = example()
    written = write_shards(tmp_path / "one", pairs, per_shard=10)
    assert [p.name for p in written] == ["00000.tar", "00001.tar", "00002.tar"]
    again = write_shards(tmp_path / "two", pairs.batches(7), per_shard=10)
    assert [p.read_bytes() for p in written] == [p.read_bytes() for p in again]
    assert {p.suffix for p in (tmp_path / "one").iterdir()} == {".tar"}
    back = load_pairs(ShardSource(tuple(written), 16))
    assert (
        torch.equal(back.images, pairs.images)
        and back.ids == pairs.ids
        and back.captions == pairs.captions
    )
    assert (
        back.labels is not None
        and pairs.labels is not None
        and torch.equal(back.labels, pairs.labels)
    )
    assert back.classes == pairs.classes
    with pytest.raises(UserError, match="already"):
        write_shards(tmp_path / "one", pairs)


def test_written_as_jpeg_and_refusals(tmp_path: Path) -> None:
    pairs = example(3)
    back = load_pairs(ShardSource(tuple(write_shards(tmp_path / "j", pairs, format="jpeg:90")), 16))
    assert back.ids == pairs.ids and not torch.equal(back.images, pairs.images)
    for text in ("gif", "png:3", "jpeg:", "jpeg:0", "jpeg:101", "jpeg:x"):
        with pytest.raises(UserError, match="jpeg"):
            write_shards(tmp_path / "k", pairs, format=text)
    with pytest.raises(UserError, match="captions"):
        write_shards(tmp_path / "k", Pairs(pairs.images, ids=pairs.ids))


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    pairs = example(4)
    path = write_shards(tmp_path, pairs)[0]
    samples = list(wds.WebDataset(str(path), shardshuffle=False).decode("rgb8"))
    assert [s["txt"] for s in samples] == list(pairs.captions) and [s["__key__"] for s in samples][
        1
    ] == "000000001"
    assert np.array_equal(samples[2]["png"], pairs.images[2].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("width", "height"), [(64, 64), (100, 64), (64, 100), (33, 47)])
def test_resize_is_shorter_side_then_centre_crop(width: int, height: int) -> None:
    blob = random_picture(side=width, height=height)
    ours = decode_image(blob, 32).astype(int)
    image = Image.open(io.BytesIO(blob))
    left, upper = (width - min(width, height)) // 2, (height - min(width, height)) // 2
    crop = image.crop((left, upper, left + min(width, height), upper + min(width, height)))
    plain = np.asarray(crop.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(ours, plain)
    batched = resize(torch.from_numpy(decode_image(blob, None).copy())[None], 32)[0].numpy()
    assert np.abs(batched.astype(int) - plain).max() <= 1


def test_reports_add_up_and_travel(tmp_path: Path) -> None:
    first = load_pairs(
        ShardSource((tar_of(tmp_path / "a.tar", [*record("a"), ("b.txt", b"x")]),), 16)
    )
    second = load_pairs(ShardSource((tar_of(tmp_path / "c.tar", record("a")),), 16))
    both = Pairs.concat([first, second, first.take([0])])
    assert both.report is not None and both.report.read == 2 and len(both.report.skipped) == 1
    assert (
        first.take([0]).report is first.report
        and str(first.report) == "1 read, 1 skipped (1 no image)"
    )
