"""The inputs of ../shared/cases, on which bezoar was once wrong, with the right values."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bezoar import registry
from bezoar.cli import main
from bezoar.data.pairs import Pairs, load_pairs

MAKER = Path(__file__).parents[2] / "shared" / "cases" / "make.py"
RECORDS = 60  # of every input that is made of photographs
NETWORK = '''"""Colours of a coarse grid, and words. Made for tests."""

import torch
from torch import nn

from bezoar.encoders.encoder import Encoder, Preprocess, WordTokenizer
from bezoar.registry import method

WORDS = ("dog", "man", "woman", "girl", "red", "white", "black", "running", "street", "grass")


@method
class Tiny:
    def __call__(self, size, vocabulary):
        torch.manual_seed(0)
        image = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 24))
        words = nn.EmbeddingBag(len(WORDS) + 1, 24)
        return Encoder(image, Preprocess(16), words, WordTokenizer(WORDS), {"network": "tiny"})
'''

pytestmark = pytest.mark.skipif(
    not MAKER.is_file(), reason=f"no inputs can be made: {MAKER} is not there"
)


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs of make.py that are made of photographs; the others are made where
    they are asked for.
    """
    maker = load_maker()
    folder = tmp_path_factory.mktemp("cases")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        photos = maker.photos(RECORDS)
        for make in (maker.tars, maker.tables, maker.grey16):
            make(photos)
    return folder


def load_maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_cases", MAKER)
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    return maker


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, Path]]:
    """Run a verb: its exit status, its manifest and its folder."""

    def run(*words: object) -> tuple[int, Any, Path]:
        before = set(tmp_path.glob("runs/*-*"))
        status = main([*map(str, words), "--runs", str(tmp_path / "runs")])
        err = capsys.readouterr().err
        assert status in (0, 4), err
        (folder,) = set(tmp_path.glob("runs/*-*")) - before
        return status, json.loads((folder / "manifest.json").read_text()), folder

    (tmp_path / "tiny.py").write_text(NETWORK)
    return run


def read(spec: str) -> Pairs:
    return load_pairs(registry.make("data", f"{spec},size=32")())


def scan_words(tmp_path: Path) -> tuple[object, ...]:
    return ("--encoder", tmp_path / "tiny.py", "--detector", "k_distance:k=4", "--workers", 1)


def keys() -> list[str]:
    return [key for key, _, _ in load_maker().photos(RECORDS)]


def test_keys_with_dots_hide_nothing(cases: Path, tmp_path: Path, ask: Any) -> None:
    pairs = read(f"shards:{cases}/dots.tar")
    expected = [f"dots/img {k} v2.{i}" if i % 3 == 0 else f"dots/{k}" for i, k in enumerate(keys())]
    assert list(pairs.ids) == expected
    assert pairs.captions == tuple(c for _, _, c in load_maker().photos(RECORDS))
    assert pairs.report is not None and not pairs.report.skipped
    status, manifest, folder = ask(
        "scan", cases / "dots.tar", *scan_words(tmp_path), "--remove", 0, "--write", "shards"
    )
    assert status == 0 and manifest["notes"]["records"] == RECORDS
    assert sorted((folder / "keep.txt").read_text().splitlines()) == sorted(expected)
    assert read(f"shards:{folder}/shards/*.tar").captions == pairs.captions


def test_broken_images_and_empty_captions_are_each_named(cases: Path) -> None:
    report = read(f"shards:{cases}/bad.tar").report
    assert report is not None and report.read == 32
    named = {s.member: s.reason.partition(":")[0] for s in report.skipped}
    expected = {
        key: "no caption" if i % 5 == 1 else "not decodable"
        for i, key in enumerate(keys())
        if i % 3 == 0 or i % 5 == 1
    }
    assert named == expected and len(report.skipped) == 28


def test_repeated_ids_lose_nothing_and_are_the_same_everywhere(
    cases: Path, tmp_path: Path, ask: Any
) -> None:
    pairs = read(f"table:{cases}/coco.csv")
    expected = [f"{1000 + i}{end}" for i in range(RECORDS) for end in ("", "~2", "~3")]
    assert list(pairs.ids) == expected and len(set(pairs.captions)) == 3 * RECORDS
    assert pairs.report is not None and len(pairs.report.renamed) == 2 * RECORDS
    assert "120 under another id" in str(pairs.report)
    _, manifest, folder = ask("scan", cases / "coco.csv", *scan_words(tmp_path), "--remove", 0)
    assert manifest["notes"]["records"] == 3 * RECORDS
    assert sorted((folder / "keep.txt").read_text().splitlines()) == sorted(expected)
    _, manifest, _ = ask(
        "train",
        f"table:path={cases}/coco.csv,size=32",
        "--keep",
        folder,
        "--objective",
        "clip:epochs=1",
    )
    assert manifest["notes"]["records"] == 3 * RECORDS


def test_rows_with_more_cells_than_the_header_are_named(
    cases: Path, tmp_path: Path, ask: Any
) -> None:
    path = cases / "unquoted.csv"
    lines = path.read_text().splitlines()[1:]
    wide = [i for i, line in enumerate(lines) if line.count(",") > 1]
    pairs = read(f"table:{path}")
    assert pairs.report is not None and len(wide) >= 30
    assert pairs.captions == tuple(
        line.partition(",")[2].strip() for i, line in enumerate(lines) if i not in wide
    )
    assert [s.member for s in pairs.report.skipped] == [f"row {i + 1}" for i in wide]
    assert all(
        s.reason.startswith("more cells than the header: ") and s.reason.endswith(f"; line {i + 2}")
        for i, s in zip(wide, pairs.report.skipped, strict=True)
    )
    assert ask("scan", path, *scan_words(tmp_path))[0] == 4


def test_16_bit_greys_are_scaled(cases: Path) -> None:
    grey, coloured = read(f"folder:{cases}/grey16"), read(f"table:{cases}/nfd.csv")
    assert len(grey) == RECORDS
    weights = np.array([0.299, 0.587, 0.114])
    for i in range(0, RECORDS, 2):
        luminance = np.tensordot(weights, coloured.images[i].numpy(), 1)
        channels = grey.images[i].numpy()
        assert (channels == channels[0]).all()
        # the colours were scaled down while they were decoded
        assert np.abs(channels[0] - luminance).mean() < 6
