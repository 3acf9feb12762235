"""Pages are self-contained, escaped and complete, and they never make a run fail."""

import html
import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bezoar import cli
from bezoar.evaluation.scores import Measure
from bezoar.reports import metric_names, page, pictures
from bezoar.reports.page import execute
from bezoar.reports.run_page import RunView
from bezoar.reports.sections import scan, train
from bezoar.runs import inputs
from bezoar.runs.run import Run
from bezoar.runs.verb import Settings
from bezoar.verbs.demo import Demo

HOSTILE = """</style></svg><script>alert('x')</script><img src=x onerror="alert(1)"> $\\frac{1}{$ {{ 7*7 }}"""
VERBS = {"demo", "poison", "train", "evaluate", "scan"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and a page of each verb of the demo, as small as possible."""
    folder = tmp_path_factory.mktemp("work") / "runs"
    execute(
        Demo(count=300, test=60, epochs=1, poisons=12, victims=2),
        Settings(folder, device="cpu", quiet=True),
    )
    return folder


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    """The same runs, to be damaged."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


class ParsedPage(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def runs_of(folder: Path, verb: str) -> list[Run]:
    return [Run(p) for p in sorted(folder.glob(f"{verb}-*"))]


def read_page(run: Run) -> str:
    return (run.path / "report.html").read_text(encoding="utf-8")


def test_every_run_has_a_page_that_needs_nothing_else(runs: Path) -> None:
    every_run = [Run(p) for p in sorted(runs.glob("*-*"))]
    assert {r.verb for r in every_run} == VERBS
    for run in every_run:
        text = read_page(run)
        seen = ParsedPage(text)
        assert text.startswith("<!doctype html>")
        assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(seen.tags)
        assert "could not be made" not in text, run.name
        assert not re.search(r"https?:|@import|url\((?!data:image/png;base64,|#)", text), run.name
        for tag, name, value in seen.attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action"):
                assert value.startswith("#") or re.fullmatch(r"\.\./[\w-]+/report\.html", value), (
                    tag,
                    name,
                    value,
                )
                assert value.startswith("#") or (run.path / value).is_file()
        assert "default-src 'none'" in text


def test_a_standalone_page_has_no_links_and_names_no_folder(runs: Path, tmp_path: Path) -> None:
    moved = tmp_path / "some where" / "archive"
    shutil.copytree(runs, moved)
    run = runs_of(moved, "demo")[0]
    assert str(moved) in page.render_page(run) and "../train-" in page.render_page(run)
    text = page.write_standalone_page(run, tmp_path / "page.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in text and "../train-" not in text and "bezoar demo" in text


def test_ids_of_a_page_are_unique(runs: Path) -> None:
    for run in runs_of(runs, "demo"):
        ids = [v for _, k, v in ParsedPage(read_page(run)).attributes if k == "id"]
        assert ids and len(ids) == len(set(ids))


def test_every_metric_stands_with_value_interval_and_n(runs: Path) -> None:
    for run in [Run(p) for p in sorted(runs.glob("*-*"))]:
        rows = re.findall(r"<tr title=.*?</tr>", read_page(run), re.DOTALL)
        assert len(rows) == len(run.manifest["metrics"])
        for row, (key, m) in zip(rows, run.manifest["metrics"].items(), strict=True):
            text = ParsedPage(row).text
            unit = metric_names.label_and_unit(key)[1]
            assert key in text and m["how"] in text and f"{m['n']:,}" in text
            assert metric_names.format_value(m["value"], unit) in text
            assert metric_names.format_interval(Measure(**m), unit) in text


def test_the_demo_tells_its_whole_story(runs: Path) -> None:
    run = runs_of(runs, "demo")[0]
    text = ParsedPage(read_page(run)).text
    for title in (
        "1 · Clean data",
        "2 · The poison",
        "3 · The attack",
        "4 · The scan",
        "5 · After repair",
    ):
        assert title in text
    for name in run.manifest["parents"]:
        assert f'href="../{name}/report.html"' in read_page(run)


def test_poisoned_artefacts_say_so(runs: Path) -> None:
    clean = run_named(runs, runs_of(runs, "demo")[0].manifest["notes"]["trained"]["clean"])
    poisoned = run_named(runs, runs_of(runs, "demo")[0].manifest["notes"]["trained"]["poisoned"])
    assert 'class="warning"' in read_page(poisoned) and 'class="warning"' not in read_page(clean)
    assert all('class="warning"' in read_page(r) for r in runs_of(runs, "poison"))


def run_named(folder: Path, name: str) -> Run:
    return Run(folder / name)


def test_the_printed_command_asks_the_same_question(
    runs: Path, capsys: pytest.CaptureFixture
) -> None:
    for run in [Run(p) for p in sorted(runs.glob("*-*"))]:
        words = shlex.split(page.shell_command(run))
        assert words[0] == "bezoar" and "--seed" in words
        assert cli.main([*words[1:], "--runs", str(runs), "--dry"]) == 0
        capsys.readouterr()
        assert cli.main([*words[1:], "--runs", str(runs), "--device", "cpu"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(run.path)


def test_hostile_text_is_text(copy: Path) -> None:
    for run in runs_of(copy, "poison"):
        lines = (run.path / "plan.jsonl").read_text().splitlines()
        edits = [json.dumps(json.loads(line) | {"caption": HOSTILE}) for line in lines[1:]]
        (run.path / "plan.jsonl").write_text("\n".join([lines[0], *edits]))
    for run in runs_of(copy, "scan"):
        ranked = [
            r | {"caption": HOSTILE} for r in json.loads((run.path / "ranked.json").read_text())
        ]
        (run.path / "ranked.json").write_text(json.dumps(ranked))
    for run in [Run(p) for p in copy.glob("*-*")]:
        manifest = run.manifest
        manifest["goal"] = [g | {"target": HOSTILE, "how": HOSTILE} for g in manifest["goal"]]
        manifest["error"] = HOSTILE
        for m in manifest["metrics"].values():
            m["how"] = HOSTILE
        manifest["parents"].append("../../etc" + HOSTILE)
        (run.path / "manifest.json").write_text(json.dumps(manifest))
    for run in [Run(p) for p in copy.glob("*-*")]:
        text = page.write_page(run).read_text(encoding="utf-8")
        seen = ParsedPage(text)
        assert "script" not in seen.tags and "img" not in seen.tags
        assert text.count("</style>") == 1 and "49" not in re.findall(r"\$ (\S+)", text)
        assert not [
            v for _, k, v in seen.attributes if k.startswith("on") or (k == "href" and "etc" in v)
        ]
        assert "alert(&#39;x&#39;)" in text


def test_a_missing_file_costs_a_section_and_not_the_page(copy: Path) -> None:
    for path in copy.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            path.unlink()
    for run in [Run(p) for p in copy.glob("*-*")]:
        assert "All figures" in page.write_page(run).read_text(encoding="utf-8")
    assert any("could not be made" in read_page(r) for r in runs_of(copy, "train"))
    lonely = runs_of(copy, "evaluate")[0]
    for other in copy.glob("*-*"):
        if other != lonely.path:
            shutil.rmtree(other)
    assert "no longer there" in page.write_page(lonely).read_text(encoding="utf-8")


def test_failed_and_unfinished_runs_have_pages(copy: Path) -> None:
    for verb in sorted(VERBS):
        run = runs_of(copy, verb)[0]
        fields = {
            k: run.manifest[k]
            for k in ("schema", "verb", "ask", "typed", "parents", "started", "bezoar")
        }
        for status in ("running", "failed"):
            manifest = {**fields, "status": status, "goal": [], "metrics": {}}
            (run.path / "manifest.json").write_text(json.dumps(manifest))
            assert status in ParsedPage(page.write_page(run).read_text(encoding="utf-8")).text


def test_a_verb_without_sections_has_a_page(copy: Path) -> None:
    run = runs_of(copy, "scan")[0]
    (run.path / "manifest.json").write_text(json.dumps(run.manifest | {"verb": "weigh"}))
    text = page.write_page(run).read_text(encoding="utf-8")
    assert "AUROC" in text and "All figures" in text


def test_rendering_again_gives_the_same_bytes(runs: Path) -> None:
    for verb in VERBS:
        run = runs_of(runs, verb)[0]
        assert page.render_page(run) == read_page(run)
    assert not list(runs.glob("*/*.tmp"))


def test_pictures_are_the_records_that_training_reads(runs: Path) -> None:
    poisoned = run_named(runs, runs_of(runs, "demo")[0].manifest["notes"]["trained"]["poisoned"])
    parts = inputs.open_dataset(poisoned)
    whole = parts.pairs
    some = whole.ids[::7][::-1]
    records = pictures.take_records(parts, (*some, "nobody"))
    rows = [whole.ids.index(k) for k in some]
    assert records.ids == some and torch.equal(records.images, whole.images[rows])
    assert records.captions == tuple(whole.captions[i] for i in rows)


def test_the_ledger_is_counted_over_the_right_records(runs: Path) -> None:
    for run in runs_of(runs, "train"):
        pairs = inputs.open_dataset(run).pairs
        keep = run.manifest["ask"]["keep"]
        keep_list = set(pairs.ids)
        if keep:
            keep_list = set((runs / keep["run"] / "keep.txt").read_text().split("\n"))
        assert train.trained_ids(RunView(run)) == [k for k in pairs.ids if k in keep_list]


def test_the_title_of_a_page_is_its_finding(runs: Path) -> None:
    for run in [Run(p) for p in runs.glob("*-*")]:
        text = read_page(run)
        title = html.unescape(re.search("<title>(.*)</title>", text)[1])
        headline = html.unescape(re.search("<h1>(.*)</h1>", text)[1])
        assert title == f"{headline} · {run.name}" and "not finished" not in title


def test_inputs_are_named_by_what_they_are_and_many_are_folded(copy: Path) -> None:
    train_run, scan_run = runs_of(copy, "train")[-1], runs_of(copy, "scan")[0]
    groups = page.group_parents(scan_run)
    assert list(groups) == ["data"]
    assert [link.name for link in groups["data"]] == scan_run.manifest["parents"]
    many = scan_run.manifest | {"parents": [f"train-{i}" for i in range(40)]}
    (scan_run.path / "manifest.json").write_text(json.dumps(many))
    ((role, links),) = page.group_parents(scan_run).items()
    assert role == "train run" and len(links) == 40
    assert "no longer there" in links[0].headline and not links[0].href
    assert "<summary>40 runs</summary>" in page.render_page(scan_run)
    assert page.parent_link(scan_run, train_run.name).href == f"../{train_run.name}/report.html"


def test_whatever_a_section_raises_costs_that_section_alone(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(view: RunView) -> None:
        raise ImportError("the user's own method needs <something>")

    monkeypatch.setattr(scan, "contribution_section", fail)
    text = page.write_page(runs_of(copy, "scan")[0]).read_text(encoding="utf-8")
    assert text.count("could not be made") == 1 and "own method needs &lt;something&gt;" in text
    assert "What each detector adds" in text and "Most suspicious records" in text


def test_a_page_that_cannot_be_made_shows_the_figures(copy: Path) -> None:
    run = runs_of(copy, "train")[0]
    manifest = run.manifest
    manifest["notes"]["records"] = "many"
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    text = page.write_page(run).read_text(encoding="utf-8")
    assert "Only figures are shown" in text and "All figures" in text and "Final loss" in text


@pytest.mark.browser
def test_a_browser_shows_the_page(runs: Path, tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((p for p in map(shutil.which, names) if p), None)
    if browser is None:
        pytest.skip(f"no browser among {', '.join(names)}")
    flags = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path}/u",
    ]
    for verb in sorted(VERBS):
        run, picture = runs_of(runs, verb)[0], tmp_path / f"{verb}.png"
        address = (run.path / "report.html").resolve().as_uri()
        command = [
            *flags,
            f"--screenshot={picture}",
            "--window-size=1100,2400",
            "--enable-logging=stderr",
            address,
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in result.stderr, result.stderr
        pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
        assert pixels.shape == (2400, 1100, 3)
        assert (
            len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
        )  # text, charts, pictures: not a blank page
        margins = np.concatenate([pixels[:, :20].reshape(-1, 3), pixels[:, -20:].reshape(-1, 3)])
        assert len(np.unique(margins, axis=0)) == 1  # nothing runs out of the page at either side
