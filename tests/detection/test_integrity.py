"""Integrity: made-up shards with known changes, each verdict against what was done to the record; a
real sample.
"""

import csv
import hashlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from verbs.test_scan import DATA, NETWORK, scan, tar_of

from bezoar.data.files.metadata import parse_recorded
from bezoar.detection.reliability import integrity
from bezoar.detection.reliability.integrity import (
    ANOTHER,
    RECODED,
    SAME_BYTES,
    SIZES_FIT,
    UNCHECKED,
    UNTOLD,
    VERDICTS,
    Integrity,
)


def pixels(seed: int, width: int = 48, height: int = 32) -> np.ndarray:
    """A smooth picture (H, W, 3), so that storing it again changes little."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def stored(picture: np.ndarray, quality: int = 95) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return file.getvalue()


def slow_phash(picture: np.ndarray) -> str:
    """ImageHash's phash: a type-II DCT of 32 x 32 greys, its first 8 x 8 against their median."""
    grey = np.asarray(
        Image.fromarray(picture).convert("L").resize((32, 32), Image.Resampling.LANCZOS), float
    )
    n = np.arange(32)
    basis = [np.cos(math.pi * k * (2 * n + 1) / 64) for k in range(8)]
    low = np.array(
        [[4 * (grey * np.outer(basis[u], basis[v])).sum() for v in range(8)] for u in range(8)]
    )
    bits = "".join("1" if x > np.median(low) else "0" for x in low.ravel())
    return f"{int(bits, 2):016x}"


def facts(image: bytes, picture: np.ndarray, **more: object) -> bytes:
    height, width = picture.shape[:2]
    raw = {
        "url": "http://img.a.com/x.jpg",
        "status": "success",
        "sha256": hashlib.sha256(image).hexdigest(),
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
    }
    return json.dumps(raw | more).encode()


def compare(image: bytes, recorded: bytes) -> tuple[str, str]:
    read = parse_recorded(recorded)
    assert read is not None
    return integrity.compare_image(read, image)


def test_perceptual_hashes_are_those_of_the_slow_form():
    for seed in range(20):
        picture = pixels(seed)
        fast = integrity.perceptual_hash(picture.transpose(2, 0, 1))
        assert f"{fast:016x}" == slow_phash(picture)


def test_each_change_has_its_verdict():
    picture, other = pixels(1), pixels(2)
    image, recoded, replaced = stored(picture), stored(picture, 60), stored(other)
    scaled, cropped = stored(pixels(1, 24, 16)), stored(picture[:, :30])
    plain, hashed = facts(image, picture), facts(image, picture, phash=slow_phash(picture))
    assert compare(image, plain) == (SAME_BYTES, "")
    assert compare(recoded, hashed)[0] == RECODED and compare(scaled, hashed)[0] == RECODED
    assert compare(replaced, hashed)[0] == ANOTHER
    for changed in (recoded, replaced):  # sizes tell neither
        assert compare(changed, plain) == (
            UNTOLD,
            "other bytes, nothing else recorded that differs",
        )
    assert compare(scaled, plain) == (UNTOLD, "scaled: 24x16, recorded 48x32")
    assert compare(cropped, plain) == (UNTOLD, "cropped, or another picture: 30x32, recorded 48x32")
    larger = facts(b"x", picture, original_width=4800, original_height=3200)
    assert compare(image, larger)[1].startswith("scaled when it was downloaded")
    failed = facts(image, picture, status="failed_to_download")
    assert compare(image, failed) == (UNTOLD, "status failed_to_download, and an image is there")
    assert compare(image, facts(image, picture, sha256=None)) == (SIZES_FIT, "")
    assert compare(cropped, facts(image, picture, sha256="no hash"))[0] == UNTOLD
    assert compare(image, b"{}") == (UNCHECKED, "")
    md5 = facts(image, picture, sha256=None, md5=hashlib.md5(image).hexdigest().upper())
    assert compare(image, md5)[0] == SAME_BYTES
    assert compare(b"no image", hashed)[0] == UNTOLD


@pytest.mark.parametrize("text", ["[1]", "{", "null", "[" * 100_000])
def test_what_is_no_object_records_nothing(text):
    assert parse_recorded(text.encode()) is None


def test_wrong_types_record_nothing():
    values = {"sha256": 1, "width": "48", "height": 10**30, "phash": "xyz", "status": ["x"]}
    recorded = parse_recorded(json.dumps(values).encode())
    assert recorded == ({}, None, None, "", "")


def test_captions_tell_replaced_pictures_where_records_match():
    """Vectors of 400 matching pairs, 100 recoded ones, and 100 with another's picture; the rates
    are those that are stated.
    """
    draw = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(600, 64, generator=draw), dim=1)
    noise = torch.nn.functional.normalize(torch.randn(600, 64, generator=draw), dim=1)
    images = torch.nn.functional.normalize(texts + noise, dim=1)
    images[500:] = images[:100]
    verdicts = np.full(600, VERDICTS.index(SAME_BYTES), np.int8)
    verdicts[400:] = VERDICTS.index(UNTOLD)
    told = Integrity(verdicts, dict.fromkeys(range(400, 600), "other bytes"), np.ones(600, bool))
    integrity.tell_by_captions(told, images, texts)
    recoded, replaced = told.verdicts[400:500], told.verdicts[500:]
    assert (recoded == VERDICTS.index(RECODED)).sum() >= 95
    assert (replaced == VERDICTS.index(ANOTHER)).sum() >= 95
    assert (recoded == VERDICTS.index(ANOTHER)).sum() <= 4
    assert (replaced == VERDICTS.index(RECODED)).sum() <= 4
    assert told.evidence[599].startswith("captions fit as of other pictures; other bytes")
    few = Integrity(verdicts[350:].copy(), {}, np.ones(250, bool))
    few.verdicts[50:] = VERDICTS.index(UNTOLD)
    integrity.tell_by_captions(few, images[350:], texts[350:])  # too few match
    assert (few.verdicts[50:] == VERDICTS.index(UNTOLD)).all()


def test_a_scan_of_tampered_shards_tells_them_by_domain(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(40):
        picture = pixels(i)
        image = stored(picture)
        url = f"http://cdn.{'bad.org' if i % 4 == 0 else 'good.com'}/{i}.jpg"
        recorded = facts(image, picture, phash=slow_phash(picture), url=url)
        if i in (0, 4, 8, 12, 16):  # another picture; all of one domain
            image = stored(pixels(1000 + i))
        elif i in (1, 2, 3):
            image = stored(picture, 70)
        members |= {f"{i:03d}.jpg": image, f"{i:03d}.txt": b"a star", f"{i:03d}.json": recorded}
    tar_of(tmp_path / "0.tar", members)
    (tmp_path / "tiny.py").write_text(NETWORK)
    words = ("--encoder", tmp_path / "tiny.py", "--detector", "k_distance:k=4")
    status, run = scan(tmp_path / "runs", f"shards:path={tmp_path}/0.tar,size=16", *words)
    assert status == 0
    with (run / "integrity.csv").open(newline="") as file:
        rows = {row["domain"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["all", "bad.org", "good.com"]
    counts = (
        "records",
        "hashed",
        "same_bytes",
        "sizes_fit",
        "same_picture_recoded",
        "another_picture",
        "cannot_tell",
    )
    assert [int(rows["all"][c]) for c in counts] == [40, 40, 32, 0, 3, 5, 0]
    assert [int(rows["bad.org"][c]) for c in counts] == [10, 10, 5, 0, 0, 5, 0]
    z, n = 1.959963984540054, 10  # Wilson's interval of 5 in 10
    half = z * math.sqrt(0.25 / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert float(rows["bad.org"]["another_low"]) == pytest.approx(0.5 - half, abs=1e-4)
    with (run / "mismatches.csv").open(newline="") as file:
        listed = [(row["id"], row["verdict"]) for row in csv.DictReader(file)]
    another = [(f"0/{i:03d}", ANOTHER) for i in (0, 4, 8, 12, 16)]
    assert listed == another + [(f"0/{i:03d}", RECODED) for i in (1, 2, 3)]
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["metrics"]["integrity.another"]["value"] == 5 / 40
    page = (run / "report.html").read_text()
    assert "Of 40 recorded hashes 8 are not those of the stored files" in page and "bad.org" in page


@pytest.mark.skipif(not (DATA / "cc12m_sample").is_dir(), reason="no sample of CC12M")
def test_a_sample_of_cc12m_records_sizes_that_fit(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(NETWORK)
    words = ("--encoder", tmp_path / "tiny.py", "--detector", "duplicates")
    spec = f"shards:path={DATA}/cc12m_sample/*.tar,size=16"
    _, run = scan(tmp_path / "runs", spec, *words)
    notes = json.loads((run / "manifest.json").read_text())["notes"]
    assert notes["integrity"]["hashed"] == 0
    assert notes["integrity"]["counts"][SIZES_FIT] == notes["records"]
    assert notes["integrity"]["sentence"].startswith(
        "No hash is recorded; sizes or status do not fit in 0 of"
    )


def test_hashes_of_what_was_downloaded_are_said_to_check_nothing(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(12):
        picture = pixels(i)
        recorded = facts(b"before", picture, original_width=960, original_height=640)
        members |= {f"{i}.jpg": stored(picture), f"{i}.txt": b"a star", f"{i}.json": recorded}
    tar_of(tmp_path / "0.tar", members)
    (tmp_path / "tiny.py").write_text(NETWORK)
    words = ("--encoder", tmp_path / "tiny.py", "--detector", "k_distance:k=4")
    _, run = scan(tmp_path / "runs", f"shards:path={tmp_path}/0.tar,size=16", *words)
    sentence = json.loads((run / "manifest.json").read_text())["notes"]["integrity"]["sentence"]
    assert "can check a new download, not these shards" in sentence
