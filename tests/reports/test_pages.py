"""Pages are self-contained, escaped and complete, and they never make a run fail."""

import html
import json
import os
import re
import shlex
import shutil
import subprocess
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bezoar import cli, registry
from bezoar.evaluation.scores import Measure
from bezoar.reports import heat_maps, metric_names, page, pictures
from bezoar.reports.page import execute
from bezoar.reports.run_page import RunView, build_page
from bezoar.reports.sections import evaluate, repair, reproduce, scan, train
from bezoar.runs import inputs, tables
from bezoar.runs.run import SCHEMA, Run
from bezoar.runs.verb import Settings
from bezoar.verbs.demo import Demo

HOSTILE = """</style></svg><script>alert('x')</script><img src=x onerror="alert(1)"> $\\frac{1}{$ {{ 7*7 }}"""  # noqa: E501
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
    paths = sorted(folder.glob(f"{verb}-*"), key=lambda p: (p / "manifest.json").stat().st_mtime_ns)
    return [Run(p) for p in paths]


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


def test_the_next_scale_keeps_the_rest_of_the_question(tmp_path: Path) -> None:
    typed = {"paper": ["matrix/detection"], "scale": "smoke", "add": ["detector", "./mine.py"]}
    path = tmp_path / "runs" / "reproduce-0"
    path.mkdir(parents=True)
    manifest = {"schema": SCHEMA, "verb": "reproduce", "ask": {"seed": 0}, "typed": typed}
    (path / "manifest.json").write_text(json.dumps(manifest))
    added = "--add detector ./mine.py"
    table = {"name": "matrix/detection", "claims": [{"verdict": "undecided"}]}
    view = SimpleNamespace(
        run=Run(path), tables=[table], notes={"scale": "smoke"}, manifest=manifest
    )
    (step,) = reproduce.next_steps(view)
    assert step.command == f"bezoar reproduce matrix/detection {added}", "small is the default"
    view.notes["scale"] = "gpu"
    typed["scale"] = "gpu"
    path.joinpath("manifest.json").write_text(json.dumps(manifest))
    view.run = Run(path)
    (step, _) = reproduce.next_steps(view)
    assert step.command == f"bezoar reproduce matrix/detection --scale gpu {added} --seed 1"


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
        headline = html.unescape(re.search("<h1[^>]*>(.*)</h1>", text)[1])
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


def test_every_command_of_what_to_do_now_parses(runs: Path, capsys: pytest.CaptureFixture) -> None:
    commands = []
    for run in [Run(p) for p in sorted(runs.glob("*-*"))]:
        commands += [step.command for step in build_page(run).steps if step.command]
        assert ("What to do now" in read_page(run)) == bool(build_page(run).steps)
    assert any(" --keep scan-" in command for command in commands)
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "bezoar" and "--runs" not in words
        assert cli.main([*words[1:], "--runs", str(runs), "--dry"]) == 0, command
        capsys.readouterr()


def test_a_command_names_a_folder_of_runs_that_is_not_the_usual_one(copy: Path) -> None:
    moved = copy.rename(copy.parent / "my runs")
    steps = build_page(runs_of(moved, "scan")[0]).steps
    assert steps[1].command.endswith(f" --runs '{moved}'")


def test_code_between_backticks_is_set_as_code() -> None:
    assert page.mark_code("`a<b>`, c") == "<code>a&lt;b&gt;</code>, c"
    assert page.mark_code("`a`, c", breaks=True) == "<code>a</code>,<wbr> c"
    assert page.mark_code("5` of <b>") == "5` of &lt;b&gt;"


def test_no_page_shows_backticks(runs: Path) -> None:
    for run in [Run(p) for p in sorted(runs.glob("*-*"))]:
        assert "`" not in ParsedPage(read_page(run)).text, run.name


def test_inputs_that_are_no_runs_are_named_as_they_were_typed(runs: Path) -> None:
    run = runs_of(runs, "train")[0]
    assert page.typed_inputs(run)["objective"] == run.manifest["typed"]["objective"]
    assert "<dt>objective</dt>" in read_page(run)
    assert "data" not in page.typed_inputs(runs_of(runs, "scan")[0]), "a run, which has a link"


def test_rankings_that_cannot_be_told_from_chance_are_not_drawn(runs: Path) -> None:
    view = scan.ScanView(runs_of(runs, "scan")[0])
    names = list(view.scores.detectors)
    half = Measure(0.5, 9, 0.4, 0.6, "")
    view.measures |= {f"{name}.auroc": half for name in names} | {"auroc": half}
    assert [part.kind for part in scan.ranking_section(view).parts] == ["text"]
    view.measures["auroc"] = view.measures[f"{names[0]}.auroc"] = Measure(0.9, 9, 0.8, 1.0, "")
    chart = scan.ranking_section(view).parts[0]
    assert chart.note.endswith(f"cannot be told from chance: {', '.join(names[1:])}.")


def test_records_of_several_triggers_are_shown_in_turn(runs: Path) -> None:
    view = scan.ScanView(runs_of(runs, "scan")[0])
    ids, order = view.scores.ids, view.order.tolist()
    first, second = ([ids[row] for row in order[start : start + 3]] for start in (0, 10))
    view.notes["detector_notes"] = {"common_cause": {"causes": [{"clearest": first}]}}
    assert [r.row for r in view.worst(8)] == order[:8]
    view.notes["detector_notes"]["transplant"] = {"triggers": [{"clearest": [*second, "gone"]}]}
    shown = view.worst(8)
    assert [r.rank for r in shown] == [1, 11, 2, 12, 3, 13, 4, 5]
    assert [order[r.rank - 1] for r in shown] == [r.row for r in shown]


def test_differences_that_are_no_more_than_noise_are_not_drawn() -> None:
    before = np.random.default_rng(0).normal(size=200).astype(np.float32)
    noise = np.random.default_rng(1).normal(size=200).astype(np.float32)
    assert not evaluate.differ(before, before + noise - noise.mean())
    assert evaluate.differ(before, before + noise + 1) and not evaluate.differ(before, before)


def cell_of(name: str, value: float) -> dict:
    return {"name": name, "rate": True, "measure": Measure(value, 9, 0, 1, "").json()}


def test_no_other_repair_is_offered_where_all_were_used(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "repair-all"
    run.mkdir(parents=True)
    metrics = {
        f"{stage}.attack_success": Measure(0.9, 9, 0.8, 1, "").json()
        for stage in ("before", "after")
    }
    manifest = {"schema": 1, "verb": "repair", "status": "done", "ask": {}, "metrics": metrics}
    repairs = registry.method_names("repair")
    for used, offered in ((repairs[1:], True), (repairs, False)):
        (run / "manifest.json").write_text(json.dumps(manifest | {"notes": {"repairs": used}}))
        view = repair.RepairView(Run(run))
        view.head = ""
        steps = repair.next_steps(view)
        assert any("Try another repair" in step.text for step in steps) == offered
        assert "Audit what is left" in steps[-1].text


def test_tables_and_pages_agree_on_what_is_a_rate() -> None:
    shares = {
        "poisons",
        "auroc",
        "shadows_auroc",
        "average_precision",
        "place",
        "p_value",
    }  # but no counts
    for name, (_, unit) in metric_names.TERMS.items():
        is_rate = not name.startswith(tables.NOT_RATES)
        assert is_rate == (unit == metric_names.RATE or name in shares), name


def test_a_table_without_claims_says_its_numbers() -> None:
    rows = [
        {"name": n, "curve": c, "cells": [cell_of("AUROC", v)]}
        for n, c, v in (("dao", "patch", 0.5), ("lid", "patch", 0.75), ("dao", "warp", 0.25))
    ]
    table = {"title": "M: Detectors", "grid": "AUROC", "rows": rows}
    finding = reproduce.table_finding(table)
    assert (
        finding
        == "Detectors: highest AUROC by lid for patch (75.0\u00a0%); dao for warp (25.0\u00a0%)."
    )
    rows = [
        {"name": n, "curve": c, "cells": [cell_of("ASR after", v)]}
        for n, c, v in (("prune", "patch", 0.5), ("unlearn", "patch", 0.25), ("prune", "warp", 0.0))
    ]
    repairs = {"title": "Repairs", "grid": "ASR after", "rows": rows}
    best = "unlearn for patch (25.0\u00a0%); prune for warp (0.0\u00a0%)"
    assert reproduce.table_finding(repairs) == f"Repairs: lowest ASR after by {best}."
    alone = "ASR after 50.0\u00a0% for patch, 0.0\u00a0% for warp"
    assert reproduce.table_finding(repairs | {"rows": rows[::2]}) == f"Repairs: {alone}."
    finding = reproduce.table_finding(table | {"grid": ""})
    assert finding == "Detectors: AUROC from 25.0\u00a0% (dao) to 75.0\u00a0% (lid)."


def test_all_heat_maps_have_one_direction_and_a_legend() -> None:
    shades = [heat_maps.depth(v) for v in (-1, 0, 0.2, 0.9, 1, 2)]
    assert shades == sorted(shades) and shades[0] == shades[1] and shades[-1] == shades[-2]
    svg = heat_maps.draw_heat_map(["a"], ["b"], np.array([[0.5]]), ("rows", "columns"))
    assert all(f"{n} %" in svg for n in (0, 25, 50, 75, 100))


@pytest.mark.parametrize(
    ("names", "verdicts", "expected"),
    [
        (["a/x"], ["contradicted"] * 2, "a/x: 2 of 2 claims contradicted."),
        (["a/x", "a/y"], ["undecided", "confirmed"], "a: 1 of 2 claims confirmed, 1 undecided."),
        (["a/x", "b/y"], ["confirmed"], "1 of 1 claim confirmed."),
    ],
)
def test_a_table_of_claims_has_its_name_and_result_in_the_title(names, verdicts, expected):
    claims = [{"verdict": verdict} for verdict in verdicts]
    tables = [{"name": name, "claims": claims if i == 0 else []} for i, name in enumerate(names)]
    view = SimpleNamespace(tables=tables, notes={"scale": "small"})
    assert reproduce.headline(view) == expected


WIDTHS = (1280, 390)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
STORED = Path(__file__).parent / "pictures"  # made anew by BEZOAR_STORE_PICTURES=1 make browser
SMALLER = 10  # times than a page, so that a font's edges and a figure's last digit do not show
LOOKS = ("light", "dark")
TOLERANCE = 6  # of 255, on average


def take_picture(address: str, folder: Path, width: int, dark: bool) -> np.ndarray:
    """A page as a browser shows it, in pixels; narrower than its least window, in a frame."""
    browser = next((p for p in map(shutil.which, BROWSERS) if p), None)
    if browser is None:
        pytest.skip(f"no browser among {', '.join(BROWSERS)}")
    picture, frame = folder / "page.png", folder / "frame.html"
    frame.write_text(
        f"<body style='margin:0'><iframe src='{address}' style='border:0' width={width} "
        "height=2400>"
    )
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *(f"--user-data-dir={folder}/u", f"--screenshot={picture}", "--enable-logging=stderr"),
        *(f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1280,2400"),
        frame.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in result.stderr, result.stderr
    return np.asarray(Image.open(picture).convert("RGB")).astype(int)[:, :width]


def describe_browser() -> str:
    """The browser and its font: pages look otherwise with others."""
    browser = next(p for p in map(shutil.which, BROWSERS) if p)
    fonts = shutil.which("fc-match")
    commands = [[browser, "--version"], *([[fonts, "sans-serif"]] if fonts else [])]
    return "".join(subprocess.run(c, capture_output=True, text=True).stdout for c in commands)


def compare_with_stored(shown: np.ndarray, name: str) -> None:
    """A page looks as it did when its picture was stored, seen from far, by the same browser."""
    made_by = STORED / "browser.txt"
    small = Image.fromarray(shown.astype(np.uint8)).reduce(SMALLER).quantize(32).convert("RGB")
    path = STORED / f"{name}.png"
    if os.environ.get("BEZOAR_STORE_PICTURES"):
        STORED.mkdir(exist_ok=True)
        small.quantize(32).save(path, optimize=True)
        made_by.write_text(describe_browser())
    if made_by.read_text() != describe_browser():
        warnings.warn(f"{name} is not compared: the stored picture is of {made_by}", stacklevel=2)
        return
    stored = np.asarray(Image.open(path).convert("RGB")).astype(int)
    difference = np.abs(np.asarray(small).astype(int) - stored).mean()
    assert difference < TOLERANCE, f"{name} looks otherwise than {path}: {difference:.1f}"


@pytest.mark.browser
@pytest.mark.parametrize("verb", sorted(VERBS))
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_look_as_they_did_and_alike_by_day_and_by_night(
    runs: Path, tmp_path: Path, verb: str, width: int
) -> None:
    """Nothing runs out at either side; light and dark have their ink in the same places, and other
    colours.
    """
    address = (runs_of(runs, verb)[0].path / "report.html").resolve().as_uri()
    pictures_of = {look: take_picture(address, tmp_path, width, look == "dark") for look in LOOKS}
    inks = []
    for look, shown in pictures_of.items():
        paper = shown[2000, 4]
        assert shown.shape == (2400, width, 3)
        assert paper.max() < 60 if look == "dark" else paper.min() > 200
        edges = np.concatenate([shown[:, :12], shown[:, -12:]], axis=1)
        assert (edges == paper).all(), look
        inks.append(np.abs(shown - paper).max(-1) > 40)
        compare_with_stored(shown, f"{verb}-{width}-{look}")
    assert (inks[0] & inks[1]).sum() > 0.5 * (inks[0] | inks[1]).sum()
