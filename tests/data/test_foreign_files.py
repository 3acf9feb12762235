"""Files as other people's programs leave them: read with the right values, or named."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_files import add_members, encode, random_picture, tar_of
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from bezoar import cli
from bezoar.data.distinct_ids import DistinctIds
from bezoar.data.files.arrays import load_array
from bezoar.data.files.images import decode_image
from bezoar.data.files.skipped import Unreadable
from bezoar.data.pairs import Pairs, load_pairs
from bezoar.data.sources.shards import copy_shard
from bezoar.detection.corpus.assembly import _rename_doubles
from bezoar.errors import UserError
from bezoar.registry import make
from bezoar.runs.verb import spec_of_path


def record(key: str, seed: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", random_picture(seed)), (f"{key}.txt", f"caption of {key}".encode())]


def read(spec: str) -> Pairs:
    return load_pairs(make("data", spec)())


def reasons(pairs: Pairs) -> dict[str, str]:
    assert pairs.report is not None
    return {s.member: s.reason.partition(":")[0] for s in pairs.report.skipped}


# Tars


@pytest.mark.parametrize("name", ["v1.0", "a.b.c", "dir.d/x.y z", ".hidden", "7.5"])
def test_keys_end_at_the_last_dot(tmp_path: Path, name: str) -> None:
    pairs = read(f"shards:{tar_of(tmp_path / 't.tar', record(name) + record('z'))},size=16")
    assert pairs.ids == (f"t/{name}", "t/z") and not reasons(pairs)
    assert pairs.captions == (f"caption of {name}", "caption of z")


def test_members_that_describe_a_record_are_no_records(tmp_path: Path) -> None:
    members = [
        ("a.alt.png", random_picture()),
        ("a.cls", b"3"),
        ("a.png", random_picture()),
        ("a.seg.png", random_picture()),
        ("a.txt", b"first"),
        ("a.npy", b""),
        ("b.png", random_picture(1)),
        ("b.txt", b"second"),
        ("b.0.png", random_picture(2)),
        ("b.0.txt", b"third"),
        ("README.md", b"about"),
        ("._b.png", b"resource fork"),
        ("c.cls", b"1"),
        ("c.png", random_picture(4)),
        ("c.txt", b"fourth"),
    ]
    pairs = read(f"shards:{tar_of(tmp_path / 't.tar', members)},size=16")
    assert dict(zip(pairs.ids, pairs.captions, strict=True)) == {
        "t/a": "first",
        "t/b": "second",
        "t/b.0": "third",
        "t/c": "fourth",
    }
    assert not reasons(pairs)


def test_members_that_belong_to_nothing_are_named(tmp_path: Path) -> None:
    members = [
        *record("a"),
        ("photo.heic", b"ftyp"),
        ("photo.txt", b"of a photo"),
        ("only.jxl", b"\xff\n"),
        ("sound.mp3", b""),
        ("lonely.a.png", random_picture()),
        ("words.b.txt", b"words"),
        ("NOTES", b""),
    ]
    pairs = read(f"shards:{tar_of(tmp_path / 't.tar', members)},size=16")
    assert pairs.ids == ("t/a",) and reasons(pairs) == {
        "photo": "image of a format that is not read",
        "only": "image of a format that is not read",
        "sound.mp3": "neither image nor text by its name",
        "NOTES": "neither image nor text by its name",
        "lonely.a": "no caption",
        "words.b": "no image",
    }


def test_members_that_stand_apart_are_put_together(tmp_path: Path) -> None:
    first, second = zip(*(record(key, i) for i, key in enumerate(("a", "b.1", "c"))), strict=True)
    labels = [(f"{key}.json", b'{"class": "dog"}') for key in ("a", "b.1", "c")]
    path = tar_of(tmp_path / "t.tar", [*first, *labels, *second, *record("d", 3)])
    pairs = read(f"shards:{path},size=16")
    # those whose members stand side by side come first
    assert pairs.ids == ("t/d", "t/a", "t/b.1", "t/c") and not reasons(pairs)
    assert pairs.captions == tuple(f"caption of {k}" for k in ("d", "a", "b.1", "c"))
    assert pairs.labels is not None and pairs.labels.tolist() == [-1, 0, 0, 0]
    stored = make("data", f"shards:{path},size=16,load=stream")().load_records()
    assert (stored.take(range(4)).images == pairs.images).all()
    with tarfile.open(path) as tar:
        offset = tar.getmember("b.1.png").offset_data
    copy_shard(path, tmp_path / "copy.tar", {offset})
    assert read(f"shards:{tmp_path}/copy.tar,size=16").ids == ("copy/b.1",)


def test_records_behind_an_end_mark_are_read(tmp_path: Path) -> None:
    parts = [
        tar_of(tmp_path / f"{key}.tar", record(key, i)).read_bytes() for i, key in enumerate("abc")
    ]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    pairs = read(f"shards:{tmp_path}/all.tar,size=16")
    assert pairs.ids == ("all/a", "all/b", "all/c") and not reasons(pairs)
    (tmp_path / "junk.tar").write_bytes(parts[0] + b"no tar at all" * 100)
    pairs = read(f"shards:{tmp_path}/junk.tar,size=16")
    assert pairs.ids == ("junk/a",) and reasons(pairs) == {"": "broken tar"}


@pytest.mark.parametrize(("ending", "mode"), [("gz", "w:gz"), ("bz2", "w:bz2"), ("xz", "w:xz")])
def test_packed_tars_are_refused_by_their_content(tmp_path: Path, ending: str, mode: Any) -> None:
    for name in (f"a.tar.{ending}", "misnamed.tar"):
        with tarfile.open(tmp_path / name, mode) as tar:
            tar.addfile(tarfile.TarInfo("a.txt"))
        with pytest.raises(UserError, match=r"is packed with .*unpack it to a \.tar first"):
            read(spec_of_path("data", str(tmp_path / name)))
    (tmp_path / "misnamed.tar").unlink()
    with pytest.raises(UserError, match=r"a\.tar\.\w+ must be unpacked first"):
        read(f"shards:{tmp_path}")


def test_zstd_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(99))
    with pytest.raises(UserError, match="packed with zstd"):
        read(spec_of_path("data", f"{tmp_path}/a.tar.zst"))


# Ids


def test_ids_are_made_distinct_in_one_way() -> None:
    ids = ["a", "a", "a~2", "b", "a", "a~2", "a~2~2", "b~2", "c~2", "a~9"]
    distinct = DistinctIds()
    new = list(map(distinct.claim, ids))
    assert len(set(new)) == len(ids)
    assert new[:5] == ["a", "a~2", "a~2~2", "b", "a~3"] and new[-2:] == ["c~2", "a~9"]
    blocks = [pa.array(ids[:3], pa.large_string()), pa.array(ids[3:], pa.large_string())]
    renamed = _rename_doubles(lambda: blocks)
    assert [renamed.get(i, key) for i, key in enumerate(ids)] == new


# Tables


def table(folder: Path, name: str, content: str | bytes) -> str:
    (folder / "a.png").write_bytes(random_picture())
    (folder / "b.png").write_bytes(random_picture(1))
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return f"table:{folder}/{name},size=16"


@pytest.mark.parametrize(("name", "cut"), [("t.csv", ","), ("t.tsv", "\t")])
def test_captions_that_begin_with_a_quote(tmp_path: Path, name: str, cut: str) -> None:
    rows = [
        ("a.png", '"Hello" he said'),
        ("b.png", '"never closed'),
        ("a.png", '"""quoted"" as it should be"'),
        ("b.png", '"over\ntwo lines"'),
        ("a.png", 'the 12" record'),
        ("b.png", f'"one{cut} two"'),
    ]
    spec = table(tmp_path, name, "".join(f"{a}{cut}{b}\n" for a, b in [("image", "text"), *rows]))
    pairs = read(spec)
    assert pairs.captions == (
        '"Hello" he said',
        '"never closed',
        '"quoted" as it should be',
        "over\ntwo lines",
        'the 12" record',
        f"one{cut} two",
    )
    assert not reasons(pairs)


def test_rows_of_another_shape_are_named_with_their_line(tmp_path: Path) -> None:
    text = (
        'image,text\r\na.png,"two\r\nlines"\r\n\r\na.png,one,two\r\nb.png,well,\r\n'
        '"a.png"x,y,z\r\nb.png,"end"\r\n'
    )
    pairs = read(table(tmp_path, "t.csv", text))
    assert pairs.captions == ("two\r\nlines", "well", "end") and pairs.report is not None
    assert [(s.member, s.reason.rpartition("; ")[2]) for s in pairs.report.skipped] == [
        ("row 2", "line 5"),
        ("row 4", "line 7"),
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_text_of_two_bytes_a_character_is_refused(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(UserError, match="it is UTF-16 or UTF-32; save it as UTF-8"):
        read(table(tmp_path, "t.csv", "image,text\na.png,caf\u00e9\n".encode(encoding)))


def test_a_byte_order_mark_is_no_text_and_latin_1_is_named(tmp_path: Path) -> None:
    for name, text in (
        ("t.csv", "image,text\na.png,caf\u00e9\n"),
        ("t.jsonl", '{"image": "a.png", "text": "caf\u00e9"}\n'),
    ):
        assert read(table(tmp_path, name, text.encode("utf-8-sig"))).captions == ("caf\u00e9",)
    pairs = read(table(tmp_path, "t.csv", b"image,text\na.png,caf\xe9\nb.png,tea\n"))
    assert pairs.captions == ("tea",) and list(reasons(pairs).values()) == ["caption is not UTF-8"]


def test_columns_of_other_names_are_found_or_told(tmp_path: Path) -> None:
    pairs = read(table(tmp_path, "t.csv", "Image, TEXT \na.png,a red star\n"))
    assert pairs.captions == ("a red star",)
    spec = table(tmp_path, "t.csv", "image,alt_text\na.png,a red star on a wall\n")
    with pytest.raises(UserError, match=r"no column title or .*it has: alt_text; is caption=alt_"):
        read(spec)
    assert read(f"{spec},caption=alt_text").captions == ("a red star on a wall",)
    assert read(f"{spec},caption=no").captions == ()
    assert read(table(tmp_path, "t.csv", "image,label\na.png,golden retriever\n")).captions == ()
    with pytest.raises(UserError, match=r"no column filepath .*it has: picture, text"):
        read(table(tmp_path, "t.csv", "picture,text\na.png,x\n"))


def test_lists_and_bytes_as_captions(tmp_path: Path) -> None:
    cells = [["one", "two", " "], ["three"], "four", [], {"en": "five"}, [6]]
    lines = (json.dumps({"image": "a.png", "id": f"r{i}", "text": c}) for i, c in enumerate(cells))
    pairs = read(table(tmp_path, "t.jsonl", "\n".join(lines)))
    assert dict(zip(pairs.ids, pairs.captions, strict=True)) == {
        "r0#0": "one",
        "r0#1": "two",
        "r1": "three",
        "r2": "four",
    }
    why = [s.reason for s in pairs.report.skipped] if pairs.report else []
    assert why == ["no caption", "caption is not text: dict", "caption is not text: int"]
    rows = {"image": ["a.png", "b.png"], "text": [b"caf\xc3\xa9", b"\xff"]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    pairs = read(f"table:{tmp_path}/t.parquet,size=16")
    assert pairs.captions == ("caf\u00e9",)
    assert list(reasons(pairs).values()) == ["caption is not UTF-8"]
    lists = {"image": ["a.png", "b.png"], "text": [["a", " ", "b"], []], "key": ["r0", "r1"]}
    pq.write_table(pa.table(lists), tmp_path / "t.parquet")
    pairs = read(f"table:{tmp_path}/t.parquet,size=16")
    assert dict(zip(pairs.ids, pairs.captions, strict=True)) == {"r0#0": "a", "r0#1": "b"}
    assert list(reasons(pairs).values()) == ["no caption"]


def test_parquet_as_img2dataset_writes_it(tmp_path: Path) -> None:
    columns = {
        "url": ["http://x/0", "http://x/1", "http://x/2"],
        "caption": ["a dog", "a cat", "a bird"],
        "key": ["000000000", "000000001", "000000002"],
        "status": ["success", "failed_to_download", "success"],
        "width": [16, None, 16],
        "jpg": [random_picture(), None, random_picture(2)],
    }
    pq.write_table(pa.table(columns), tmp_path / "00000.parquet")
    pairs = read(f"table:{tmp_path},size=16")
    assert pairs.ids == ("000000000", "000000002") and pairs.captions == ("a dog", "a bird")
    assert list(reasons(pairs).values()) == ["no image"]


# Paths


@pytest.mark.parametrize(
    "name", ["a,b", "a[1]", "a{b,c}", "a{0..3}", "a b", "a:b", "(a)", "a=b", "a#b", "100%"]
)
def test_paths_may_hold_any_legal_character(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    tar_of(folder / f"{name}.tar", record("k"))
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(random_picture())
    table(folder, f"{name}.csv", "image,text\na.png,star\n")
    monkeypatch.chdir(tmp_path)
    for start in (str(tmp_path / name), name):
        for path in (f"{start}/{name}.tar", f"{start}/{name}.csv", start, f"{start}/images"):
            method = make("data", spec_of_path("data", path))
            assert len(load_pairs(method())) == 1, path


# Images


# EXIF that says: turn to the right, in a number of 32 bits.
LONG_TURN = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHII", 0x0112, 4, 1, 6) + bytes(4)


def raw_profile(exif: bytes) -> PngInfo:
    """EXIF as ImageMagick writes it into a PNG."""
    info = PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n")
    return info


def decode(content: bytes) -> list[int]:
    """The colour of an image that has only one."""
    pixels = decode_image(content, None)
    assert pixels.dtype == np.uint8 and (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0].tolist()


def flat(mode: str, colour: Any) -> Image.Image:
    return Image.new(mode, (16, 16), colour)


def test_modes_of_pixels() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value, expected in ((0, 0), (257, 1), (128 * 257, 128), (65535, 255), (200, 1)):
            grey = Image.fromarray(np.full((16, 16), value, np.uint16))
            assert decode(encode(grey)) == [expected] * 3
        pgm = b"P5 16 16 65535 " + np.full(256, 128 * 257, ">u2").tobytes()
        assert decode(pgm) == [128] * 3
        assert decode(encode(flat("1", 1))) == [255] * 3
        assert decode(encode(flat("LA", (90, 10)))) == [90] * 3
        assert decode(encode(flat("RGBA", (10, 20, 30, 0)))) == [10, 20, 30]
        palette = flat("P", 1)
        palette.putpalette([0, 0, 0, 10, 20, 30])
        for transparent in (1, b"\x00\x80"):
            assert decode(encode(palette, transparency=transparent)) == [10, 20, 30]
        cmyk = decode(encode(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100))
        assert np.abs(np.array(cmyk) - [255, 0, 0]).max() <= 2


def test_greys_of_tiffs_whose_range_or_direction_pillow_drops_are_refused() -> None:
    for tags, match in (
        ([(258, 16), (262, 0)], "in which white is 0"),
        ([(258, 32)], "whole numbers of an unknown range"),
        ([(258, 32), (339, 2)], "whole numbers of an unknown range"),
        ([(258, 16), (339, 2)], "whole numbers of an unknown range"),
        ([(258, 12)], "whole numbers of an unknown range"),
        ([(258, 32), (339, 3), (262, 0)], "in which white is 0"),
    ):
        with pytest.raises(Unreadable, match=match):
            decode_image(tiff(*tags), 16)
    assert decode(tiff((262, 0))) == [255] * 3, "8 bits are turned round"


def test_floats_are_scaled_or_refused() -> None:
    def pfm(value: float) -> bytes:
        return b"Pf\n16 16\n-1.0\n" + np.full(256, value, "<f4").tobytes()

    assert decode(pfm(0.5)) == [128] * 3 and decode(pfm(1.0)) == [255] * 3
    for value in (2.0, -0.1, float("nan")):
        with pytest.raises(Unreadable, match="floating-point pixels beyond"):
            decode_image(pfm(value), None)


def test_a_tar_whose_headers_are_applied_to_all_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    for count, is_read in ((60, True), (1000, False)):
        records = {f"a{i}": "b" for i in range(count)}
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=records) as tar:
            add_members(tar, record("a"))
        if is_read:
            assert read(f"shards:{path},size=16").ids == ("t/a",)
        else:
            with pytest.raises(UserError, match="more than 64 records of all members"):
                read(f"shards:{path},size=16")


def test_a_name_of_thousands_of_parts_is_named(tmp_path: Path) -> None:
    long = [("a." * 2000 + f"{i}.png", b"x") for i in range(100)]
    path = tar_of(tmp_path / "t.tar", [*record("a"), *long])
    pairs = read(f"shards:{path},size=16")
    assert pairs.ids == ("t/a",) and set(reasons(pairs).values()) == {"unsafe name"}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [None, 16])
def test_pictures_are_turned_as_their_exif_says(orientation: int, size: int | None) -> None:
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = 255, (255, 0, 0), (0, 0, 255)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert (decode_image(content, size).transpose(1, 2, 0) == upright).all()


@pytest.mark.parametrize(
    "where", [{"exif": b"Exif\0\0" + LONG_TURN}, {"pnginfo": raw_profile(b"Exif\0\0" + LONG_TURN)}]
)
def test_exif_may_be_of_32_bits_or_in_a_text(where: dict[str, Any], tmp_path: Path) -> None:
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[0, 0] = 255
    content = encode(Image.fromarray(stored), **where)
    turned = np.rot90(stored, -1).transpose(2, 0, 1)
    assert (decode_image(content, None) == turned).all()
    (tmp_path / "t.png").write_bytes(content)
    assert (load_array(str(tmp_path / "t.png")) == turned).all(), "a trigger is as its file says"


def xmp(orientation: object, form: str = 'tiff:Orientation="{}"') -> bytes:
    """What editors write beside EXIF, or in its place."""
    inner = form.format(orientation)
    return f"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description {inner}/></x:xmpmeta>".encode()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("exif", "stated", "turns"),
    [(None, 1, 0), (None, 3, 2), (None, 6, 3), (None, 0, 0), (None, 9, 0), (1, 6, 0), (3, 6, 2)],
)
@pytest.mark.parametrize(
    "form", ['tiff:Orientation="{}"', "><tiff:Orientation>{}</tiff:Orientation>"]
)
def test_pictures_are_turned_as_their_xmp_says_where_exif_says_nothing(
    format: str, exif: int | None, stated: int, turns: int, form: str
) -> None:
    pixels = np.zeros((24, 16, 3), np.uint8)
    pixels[:8] = 240
    text, tags = xmp(stated, form), {0x0112: exif} if exif else {}
    info, of_exif = PngInfo(), Image.Exif()
    info.add_itxt("XML:com.adobe.xmp", text.decode())
    of_exif.update(tags)
    options = {"PNG": {"pnginfo": info}, "TIFF": {"tiffinfo": {700: text, **tags}}}
    file, lossless = io.BytesIO(), {"lossless": True} if format == "WEBP" else {}
    both = options.get(format, {"xmp": text}) | ({"exif": of_exif} if exif else {})
    Image.fromarray(pixels).save(file, format, **both, **lossless)
    image = decode_image(file.getvalue(), None).transpose(1, 2, 0).astype(int)
    upright = np.rot90(pixels, turns)
    assert image.shape == upright.shape and abs(image - upright).max() <= 2


def test_broken_exif_says_nothing() -> None:
    content = encode(flat("RGB", (1, 2, 3)), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(content) == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\xff\x0a" + bytes(99), "JPEG XL is not read; JPEG, PNG, WEBP, BMP, PPM, GIF, TIFF are"),
        (b"\0\0\0 ftypavif" + bytes(99), "AVIF, HEIC or a video is not read"),
        (b"<html>", "no image format that is known"),
    ],
)
def test_formats_that_are_not_read_are_named(content: bytes, match: str) -> None:
    with pytest.raises(Unreadable, match=match):
        decode_image(content, 16)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow writes no AVIF")
def test_avif_is_named_wherever_an_image_is_read(tmp_path: Path) -> None:
    """Its decoder takes the memory that the video stream inside asks for: it is refused, in one
    line.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    avif, png = encode(Image.fromarray(pixels), "AVIF"), encode(Image.fromarray(pixels))
    for name, content in (("a.png", png), ("b.avif", avif), ("c.jpg", avif)):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).with_suffix(".txt").write_text("a star")
    report = load_pairs(make("data", f"folder:path={tmp_path},size=16")()).report
    assert report is not None and report.read == 1
    assert {s.member: s.reason.partition(";")[0] for s in report.skipped} == {
        "b.avif": "image of a format that is not read: avif",
        "c.jpg": "not decodable: AVIF, HEIC or a video is not read",
    }
    (tmp_path / "t.png").write_bytes(avif)
    for spec in ("file", "blend:alpha=.5", "sticker"):
        name, _, rest = spec.partition(":")
        field = {"file": "path", "blend": "pattern", "sticker": "image"}[name]
        trigger = f"{name}:{field}={tmp_path}/t.png{',' if rest else ''}{rest}"
        with pytest.raises(
            UserError, match=r"t.png: AVIF, HEIC or a video is not read; PNG, JPEG are"
        ):
            make("trigger", trigger)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["a"])


def test_gif_and_tiff_are_read_within_the_bounds_of_other_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for compression in ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate"):
            content = encode(picture, "TIFF", compression=compression)
            assert (decode_image(content, None).transpose(1, 2, 0) == pixels).all()
        assert decode(encode(Image.fromarray(np.full((16, 16), 128 * 257, np.uint16)), "TIFF")) == (
            [128] * 3
        )
        frames = [flat("P", 7), flat("P", 9)]
        for frame in frames:
            frame.putpalette([n for i in range(256) for n in (i, 10, 20)])
        film = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert decode(film) == [7, 10, 20], "the first picture of a film"
    (tmp_path / "a.gif").write_bytes(film)
    (tmp_path / "b.tif").write_bytes(content)
    assert read(f"folder:{tmp_path},size=16").ids == ("a.gif", "b.tif")
    path = tar_of(tmp_path / "t.tar", [("a.gif", film), ("a.txt", b"a film")])
    assert read(f"shards:{path},size=16").captions == ("a film",)


def tiff(*tags: tuple[int, int]) -> bytes:
    """A grey TIFF of 16 x 16 pixels, with other tags beside its own."""
    plain = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: 256}
    entries = sorted((plain | dict(tags)).items())
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    head = b"II*\0" + struct.pack("<I", 8 + 256) + bytes(256)
    return head + struct.pack("<H", len(entries)) + directory + bytes(4)


def test_a_tiff_unpacks_to_no_more_than_its_pixels() -> None:
    assert decode(tiff()) == [0] * 3
    tiles = [(322, 1 << 15), (323, 1 << 15), (324, 8), (325, 256), (259, 8)]
    for tags, match in (
        (tiles, "too many pixels: tiles of 32768x32768"),
        ([(256, 10_000), (257, 10_000)], "too many pixels: 10000x10000"),
        ([(259, 7)], "TIFF with compression jpeg is not read"),
        ([(322, 0), (323, 1 << 31)], "too many pixels: tiles of"),
    ):
        with pytest.raises(Unreadable, match=match):
            decode_image(tiff(*tags), 16)


def test_jfif_is_jpeg(tmp_path: Path) -> None:
    jpeg = encode(flat("RGB", (9, 9, 9)), "JPEG")
    for name in ("a.jfif", "b.JPE"):
        (tmp_path / name).write_bytes(jpeg)
    (tmp_path / "c.heic").write_bytes(jpeg)
    pairs = read(f"folder:{tmp_path},size=16")
    assert pairs.ids == ("a.jfif", "b.JPE")
    assert reasons(pairs) == {"c.heic": "image of a format that is not read"}
    path = tar_of(tmp_path / "t.tar", [("a.jfif", jpeg), ("a.txt", b"grey")])
    assert read(f"shards:{path},size=16").captions == ("grey",)


# Pipes


@pytest.mark.parametrize("words", ["--help", "scan --help", "list", "list data"])
def test_nobody_reads(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "bezoar", *words.split()]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert done.returncode == 141 and not done.stderr


def test_a_text_that_many_rows_share_is_no_longer_than_a_caption_can_be(tmp_path):
    numbers = pa.array([0] * 299 + [1], pa.int32())
    captions = pa.DictionaryArray.from_arrays(numbers, ["a star " * 3000, "a star"])
    table = pa.table({"image": pa.array([random_picture()] * 300), "caption": captions})
    pq.write_table(table, tmp_path / "t.parquet")
    pairs = load_pairs(make("data", f"table:path={tmp_path / 't.parquet'},size=16")())
    assert list(pairs.captions) == ["a star"]
    assert str(pairs.report) == "1 read, 299 skipped (299 text too large)"
