"""Image bombs: pixels decoded at once, scans and what images kept as they are unpack to are bounded."""

import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from bezoar.data import decoding
from bezoar.data.decoding import Record, decode_records, gather_pairs
from bezoar.data.files import images
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
    before = time.monotonic()
    with pytest.raises(Unreadable, match=r"too many scans: 200\d\d of 64x64 pixels"):
        decode_image(bomb, 16)
    assert time.monotonic() - before < 1


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
