"""Image bombs: pixels decoded at once, scans and what images kept as they are unpack to are
bounded.
"""

import io
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from bezoar.data import decoding
from bezoar.data.decoding import Record, decode_records, gather_pairs
from bezoar.data.files import arrays, images
from bezoar.data.files.images import decode_image
from bezoar.data.files.metadata import parse_metadata
from bezoar.data.files.skipped import ReadReport, Unreadable
from bezoar.errors import UserError


def encode(side, kind="PNG", mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, kind, **options)
    return file.getvalue()


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded():
    progressive = encode(64, "JPEG", progressive=True)
    assert decode_image(progressive, 16).shape == (3, 16, 16)
    start = progressive.rindex(b"\xff\xda")
    scan = progressive[start:-2]
    bomb = progressive[:-2] + 20_000 * scan + b"\xff\xd9"
    before = time.process_time()
    with pytest.raises(Unreadable, match=r"too many scans: 200\d\d of 64x64 pixels"):
        decode_image(bomb, 16)
    assert time.process_time() - before < 1


def test_scans_are_counted_in_files_of_several_jpegs_too(tmp_path):
    file = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), c) for c in ("red", "blue")]
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:], progressive=True)
    film = file.getvalue()
    assert decode_image(film, None)[:, 9, 9].tolist() == [254, 0, 0]
    start = film.index(b"\xff\xda")
    scan = film[start : film.index(b"\xff\xd9")]
    bomb = film[:start] + 20_000 * scan + film[start:]
    with pytest.raises(Unreadable, match="too many scans: 200"):
        decode_image(bomb, 16)
    (tmp_path / "t.jpg").write_bytes(bomb)
    with pytest.raises(UserError, match="too many scans: 200"):
        arrays.load_array(str(tmp_path / "t.jpg"))


def segment(mark, content):
    return bytes((0xFF, mark)) + struct.pack(">H", len(content) + 2) + content


def chunk(name, content):
    return (
        struct.pack(">I4s", len(content), name)
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def with_parts(kind, count):
    """A picture with so many parts that hold no pixels."""
    plain = encode(64, kind)
    part, place = {
        "JPEG": (segment(0xE1, b"Exif\0\0a"), 2),
        "PNG": (chunk(b"tEXt", b"a\0b"), 33),
        "GIF": (b"!\xfe\1a\0", plain.find(b",")),
    }[kind]
    return plain[:place] + count * part + plain[place:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_a_picture_of_many_parts_is_refused_before_pillow_walks_through_them(kind):
    assert (decode_image(with_parts(kind, 50), None) == decode_image(encode(64, kind), None)).all()
    before = time.process_time()
    with pytest.raises(Unreadable, match="too many parts: 2049 or more"):
        decode_image(with_parts(kind, 400_000), 16)
    assert time.process_time() - before < 1
    cut = with_parts(kind, 50)[:300]  # no walker may fail where the decoder would
    with pytest.raises(Unreadable, match="not decodable"):
        decode_image(cut, 16)


def test_a_jpeg_whose_parts_are_large_or_filling_is_refused():
    plain = encode(64, "JPEG")
    for parts in (300 * segment(0xE1, b"Exif\0\0" + bytes(65_000)), bytes([255]) * 9999):
        with pytest.raises(Unreadable, match="too many parts"):
            decode_image(plain[:2] + parts + plain[2:], 16)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_many_strips_is_refused_by_its_directory(order):
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entries = struct.pack(f"{order}HHHII", 1, 273, 4, 100_000, 26)
    content = mark + struct.pack(f"{order}I", 8) + entries + bytes(4)
    with pytest.raises(Unreadable, match="too many parts: 100000 strips"):
        decode_image(content, 16)


def test_comments_and_headers_without_end_of_netpbm_are_refused_before_pillow_reads_them():
    pixels = b"7 " * 192
    for comments in (b"", b"# of a camera\n" * 50):
        image = decode_image(b"P3\n8 8\n255\n" + comments + pixels, None)
        assert (image == 7).all() and image.shape == (3, 8, 8)
        assert (decode_image(b"P6\n" + comments + b"8 8\n255\n" + bytes(192), None) == 0).all()
    before = time.process_time()
    with pytest.raises(Unreadable, match="too many parts: 2049 or more"):
        decode_image(b"P3\n8 8\n255\n" + b"#\n" * 1_000_000 + pixels, None)
    for filling in (b"#\n" * 1_000_000, b" " * 1_000_000, b"#" + bytes(9_000_000)):
        with pytest.raises(Unreadable, match="not decodable: Reached EOF while reading header"):
            decode_image(b"P6\n" + filling + b"\n8 8\n255\n" + bytes(192), None)
    assert time.process_time() - before < 3


def test_formats_that_pillow_decodes_in_python_are_bounded():
    small = b"P5\n16 16\n254\n" + bytes([127]) * 256
    assert decode_image(small, None)[:, 0, 0].tolist() == [128] * 3  # 127 of 254
    with pytest.raises(Unreadable, match="3000x3000 in a slow format"):
        decode_image(b"P5\n3000 3000\n254\n" + bytes(9_000_000), 16)


def test_no_more_pixels_than_allowed_are_decoded_at_once(monkeypatch):
    allowance = images._Allowance(100)
    most, lock = [0], threading.Lock()

    def claim(amount):
        with allowance.claimed(amount):
            with lock:
                most[0] = max(most[0], allowance.in_use)
            time.sleep(0.002)

    threads = [threading.Thread(target=claim, args=(a,)) for a in (40, 50, 60, 30, 20, 10) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert 60 <= most[0] <= 100 and allowance.in_use == 0
    claim(1000)  # more than there is: alone
    assert most[0] == 1000


def test_images_kept_as_they_are_may_not_unpack_without_bound(monkeypatch):
    monkeypatch.setattr(decoding, "FREE_BYTES", 1 << 20)
    flat = [Record(image=encode(400, mode="1"), ids=(str(i),), file="x.npz") for i in range(40)]
    with pytest.raises(UserError, match=r"x\.npz: images of \d+ bytes unpack to \d+; give size="):
        gather_pairs(flat, None, "x.npz")
    assert len(gather_pairs(flat, 64, "x.npz")) == 40


@pytest.mark.parametrize("size", [None, 8])
def test_large_images_come_in_order_though_a_task_leaves_some(monkeypatch, size):
    monkeypatch.setattr(decoding, "TASK_BYTES", 3 * 32**2 * 2)
    monkeypatch.setattr(decoding, "HELD_BYTES", 3 * 32**2 * 5)
    pixels = np.arange(100, dtype=np.uint8)[:, None, None, None] + np.zeros(
        (1, 32, 32, 3), np.uint8
    )
    records = []
    for i, image in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        records.append(Record(image=file.getvalue(), ids=(str(i),)))
    records[7] = Record(image=b"no image", ids=("7",))
    report = ReadReport()
    decoded = [
        (r.ids[0], int(image[0, 0, 0])) for r, image in decode_records(records, size, report)
    ]
    assert decoded == [(str(i), i) for i in range(100) if i != 7]
    assert len(report.skipped) == 1


def test_an_image_has_a_bounded_number_of_captions():
    many = b'{"captions": [' + b'"a",' * 800_000 + b'"a"]}'
    assert parse_metadata(many) == "more than 1000 captions: 800001"
    assert len(parse_metadata(b'{"captions": ["a", "b"]}').captions) == 2
