"""Records that a verb left out: named in its notes, counted in its last lines, exit status 4."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_files import encode, tar_of
from PIL import Image

from bezoar import registry
from bezoar.cli import main
from bezoar.data.files import skipped
from bezoar.data.files.skipped import ReadReport, Skipped
from bezoar.runs import reading
from bezoar.runs.inputs import load_records

CLASSES = ("star", "disc")
RECORDS = 140  # of which repairs hold 50 apart


def write_tar(path: Path, bad: int) -> Path:
    """RECORDS of two classes; the images of the first `bad` are torn."""
    members: dict[str, bytes] = {}
    for row in range(RECORDS):
        pixels = np.full((32, 32, 3), 200 if row % 2 else 30, np.uint8)
        pixels[row % 32, row // 32] = 255
        content = encode(Image.fromarray(pixels))
        name = CLASSES[row % 2]
        members |= {
            f"{row:04d}.png": content[:40] if row < bad else content,
            f"{row:04d}.txt": f"a {name}".encode(),
            f"{row:04d}.json": json.dumps({"label": row % 2, "class": name}).encode(),
        }
    return tar_of(path, members)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tars")
    good, bad = write_tar(folder / "good.tar", 0), write_tar(folder / "bad.tar", 5)
    return f"shards:path={good},size=32", f"shards:path={bad},size=32"


def test_every_verb_that_leaves_records_out_says_so(
    tars: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good, bad = tars
    runs = ["--runs", str(tmp_path / "runs")]

    def ask(*words: str) -> tuple[int, Path, str]:
        status = main([*words, *runs])
        streams = capsys.readouterr()
        assert status in (0, 4), streams.err
        return status, Path(streams.out.splitlines()[-1]), (streams.err.splitlines() or [""])[-1]

    def manifest(run: Path) -> dict[str, dict[str, object]]:
        content: dict[str, dict[str, object]] = json.loads((run / "manifest.json").read_text())
        return content

    objective = ["--objective", "clip:epochs=1,batch=8", "--network", "clip_small:width=8"]
    status, encoder, _ = ask("train", good, *objective)
    assert status == 0 and "incomplete" not in manifest(encoder)["notes"]
    assert ask("evaluate", str(encoder), good, "--probe", "zero_shot")[0] == 0
    attack = ["--poison", "backdoor:count=2", "--trigger", "patch:size=4", "--target", "star"]
    Image.new("RGB", (32, 32), "red").save(tmp_path / "star.png")
    reference = [
        "--reference",
        str(tmp_path / "star.png"),
        "--attack",
        "badencoder:epochs=1,batch=16",
    ]
    repair = "finetune:objective=(clip:epochs=1,batch=8)"
    cases = (
        ["poison", bad, *attack],
        ["train", bad, *objective],
        ["evaluate", str(encoder), bad, "--probe", "zero_shot"],
        ["repair", str(encoder), "--data", bad, "--test", good, "--held", ".4", "--repair", repair],
        ["check", str(encoder), bad, "--clean", good, "--check", "scale_up", "--rate", ".1"],
        ["inject", str(encoder), "--data", bad, "--target", "star", *reference],
        ["calibrate", str(encoder), "--data", bad, "--audit", "whitening"],
        ["survive", bad, "--trigger", "patch:size=4", "--encoder", str(encoder)],
    )
    for words in cases:
        status, run, last = ask(*words)
        assert status == 4, words
        assert f"5 records or files were left out, beside {RECORDS - 5} that were read" in last
        (line,) = manifest(run)["notes"]["incomplete"]  # type: ignore[misc]
        assert last == f"{words[0]}: {line}"
        if words[0] != "calibrate":  # the audits that it runs have read the records
            assert len(manifest(run)["notes"]["reading"]["skipped"]) == 5  # type: ignore[index]
        assert ask(*words)[0] == 4  # of a run that was done before, too
    status, _, last = ask("scan", bad, "--encoder", str(encoder), "--detector", "duplicates")
    assert status == 4 and last.startswith("scan: 5 records or files could not be read")
    monkeypatch.setattr(skipped, "NAMED", 2)  # of millions, the first are named and all are counted
    scan = ("scan", bad, "--encoder", str(encoder), "--detector", "duplicates", "--fresh")
    status, run, again = ask(*scan)
    assert status == 4 and again == last
    named = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [member for _, member, _ in named] == ["0000", "0001", ""]
    assert named[2][2] == "3 more: not decodable"
    assert manifest(run)["notes"]["reading"]["reasons"] == {"not decodable": 5}  # type: ignore[index]


def test_a_verb_in_a_verb_has_a_collection_of_its_own(tars: tuple[str, str]) -> None:
    good, bad = (registry.make("data", spec) for spec in tars)
    with reading.collect_reports() as outer:
        load_records(good)
        with reading.collect_reports() as inner:
            load_records(bad)
            load_records(bad)  # out of memory: it counts all the same
        load_records(good)
    assert list(outer) == [registry.spec(good)] and list(inner) == [registry.spec(bad)]
    load_records(bad)  # outside of any verb
    assert reading.incomplete_notes(outer, {}, []) == {}
    notes = reading.incomplete_notes(inner, {"incomplete": ["audit x: y"]}, [])
    assert notes["incomplete"][0] == "audit x: y" and len(notes["incomplete"]) == 2
    child = SimpleNamespace(manifest={"notes": {"incomplete": ["of a child"]}})
    assert reading.incomplete_notes({}, {}, [child]) == {"incomplete": ["of a child"]}
    counted = {"reading": {"unread": 1}, "incomplete": ["1 record"]}  # as a scan counts, once
    assert reading.incomplete_notes({}, counted, [child]) == {"incomplete": ["1 record"]}
    report = ReadReport(3)
    report.leave_out(Skipped("a.tar", "b", "no caption"))
    told = (
        "1 records or files were left out, beside 3 that were read (1 no caption); the first: "
        "a.tar b: no caption"
    )
    assert reading.describe_report(report) == told
    for number in range(skipped.NAMED + 5):
        report.leave_out(Skipped("a.tar", str(number), "no image: x"))
        report.rename(Skipped("a.tar", str(number), "an id"))
    both = report.merge([report])
    assert len(both.skipped) == len(both.renamed) == skipped.NAMED
    assert str(both).startswith(
        f"6 read, {2 * skipped.NAMED + 12} skipped ({2 * skipped.NAMED + 10} no image, 2 no c"
    )
    notes = report.notes()
    assert len(notes["skipped"]) == skipped.LISTED and notes["renamed"] == skipped.NAMED + 5
