"""What people type first, and what they see: endings, JSON, lists of runs, refusals before any
work, gates.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bezoar
from bezoar import Run, Scan, Settings, Train, UserError, cli, execute, registry
from bezoar.cli import exit_status, main
from bezoar.data.shards import write_shards
from bezoar.runs import estimates
from bezoar.runs.summary import first_sentences, read_summary
from bezoar.runs.verb import check_verb, load_verb, spec_of_path, verb_names

DATA = "scenes:count=160"
TINY = ("--network", "clip_small:width=4,dim=8", "--objective", "clip:epochs=1,batch=64")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A training, and a scan of its data by a detector that decides nothing."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", DATA, *TINY, "--runs", str(folder)]) == 0
    (train,) = folder.glob("train-*")
    words = ["scan", train.name, "--detector", "k_distance:k=4", "clip_score"]
    assert main([*words, "--runs", str(folder)]) == 0
    return folder


@pytest.fixture
def train(runs):
    return Run(next(runs.glob("train-*")))


@pytest.fixture
def scan(runs):
    found = [Run(path) for path in runs.glob("scan-*")]
    return next(run for run in found if "k_distance:k=4" in run.manifest["typed"]["detector"])


# Endings


def test_a_verb_ends_with_its_finding_few_figures_files_and_its_directory(runs, train, capsys):
    assert main(["train", DATA, *TINY, "--runs", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == train.verdict and lines[-1] == str(train.path)
    assert "files: encoder.safetensors, encoder.json" in lines
    assert f"page: {train.path / 'report.html'}" in lines
    assert 4 <= len(lines) <= 12


def test_json_is_short_and_flat_and_the_manifest_where_it_is_asked_for(runs, scan, capsys):
    words = ["show", scan.name, "--runs", str(runs)]
    assert main([*words, "--json"]) == 0
    short = json.loads(capsys.readouterr().out)
    assert short["verdict"] == scan.verdict and short["verb"] == "scan"
    assert short["files"]["keep.txt"] == str(scan.path / "keep.txt")
    assert short["page"] == str(scan.path / "report.html") and short["incomplete"] == []
    assert len(short["figures"]) <= 6 and "metrics" not in short
    assert main([*words, "--json", "short"]) == 0
    assert json.loads(capsys.readouterr().out) == short
    assert main([*words, "--json", "full"]) == 0
    assert json.loads(capsys.readouterr().out) == scan.manifest


def test_show_prints_every_metric_and_last_is_the_newest_run(runs, scan, capsys):
    os.utime(scan.path / "manifest.json")
    assert main(["show", "last", "--runs", str(runs)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{scan.name}: done") and scan.verdict in printed


def test_a_run_without_a_summary_gets_one(runs, train, capsys):
    (train.path / "summary.json").unlink()
    with pytest.raises(UserError, match="has no page yet"):
        _ = train.verdict
    assert main(["show", train.name, "--runs", str(runs)]) == 0
    assert read_summary(train.path) is not None and train.verdict in capsys.readouterr().out


def test_pages_open(runs, train, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda uri: opened.append(uri) or True)
    assert main(["show", train.name, "--open", "--runs", str(runs)]) == 0
    train.open()
    assert opened == [(train.path / "report.html").as_uri()] * 2


def test_no_more_than_three_sentences():
    text = first_sentences("A took 0.5 s. It did!", "Did it? Yes. No.")
    assert text == "A took 0.5 s. It did! Did it?"


# Lists


def test_runs_are_listed_with_what_was_asked_found_and_when(runs, train, scan, capsys):
    assert main(["runs", "--runs", str(runs), "--json"]) == 0
    listed = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    assert listed.keys() == {train.name, scan.name}
    assert listed[train.name]["of"] == DATA and listed[scan.name]["of"] == train.name
    assert listed[scan.name]["finding"] == scan.verdict and listed[scan.name]["when"]
    assert main(["runs", "--runs", str(runs)]) == 0
    assert train.name in capsys.readouterr().out


def test_runs_that_failed_or_are_spoilt_are_listed_as_they_are(tmp_path, capsys):
    assert main(["train", "scenes:count=20", "--runs", str(tmp_path)]) == 2
    (tmp_path / "scan-x").mkdir()
    (tmp_path / "scan-x" / "manifest.json").write_text("{}")
    capsys.readouterr()
    assert main(["runs", "--runs", str(tmp_path), "--json"]) == 0
    statuses = {row["status"] for row in json.loads(capsys.readouterr().out)}
    assert statuses == {"failed", "unreadable"}
    (tmp_path / "scan-x" / "manifest.json").write_text(
        json.dumps({"schema": 1, "verb": "scan", "status": "running", "typed": {"data": "d"}})
    )
    assert main(["runs", "--runs", str(tmp_path), "--json"]) == 0
    row = next(r for r in json.loads(capsys.readouterr().out) if r["run"] == "scan-x")
    assert (row["status"], row["of"]) == ("running", "d") and "not finished" in row["finding"]
    assert main(["scan", DATA, "--encoder", "nowhere", "--runs", str(tmp_path)]) == 2
    assert "there are: none" in capsys.readouterr().err, "a failed training offers no encoder"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_commands_and_options(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "scan" in script and "fail-on" in script and "completion" in script


def test_completion_works_in_bash(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out + (
        'COMP_WORDS=(bezoar scan --fail); COMP_CWORD=2; _bezoar; echo "${COMPREPLY[@]}"\n'
        'COMP_WORDS=(bezoar sca); COMP_CWORD=1; _bezoar; echo "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.split() == ["--fail-on", "scan"]


def test_a_folder_that_is_called_like_a_method_is_a_folder(tmp_path, monkeypatch):
    """Unless the method needs no field: then its name is what is meant."""
    monkeypatch.chdir(tmp_path)
    for name in ("shards", "scenes", "folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tar").touch()
    assert spec_of_path("data", "shards") == "shards:path=shards/*.tar"
    assert spec_of_path("data", "folder") == "shards:path=folder/*.tar"
    assert spec_of_path("data", "scenes") == "scenes"
    assert spec_of_path("data", "table") == "table", "no such file"


def test_dry_counts_records_trainings_and_minutes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    words = ["train", "scenes:count=20000", "--objective", "clip:epochs=7", "--dry", "--json"]
    assert main([*words, "--runs", str(tmp_path)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["records"] == 20000 and plan["trainings"] == 1 and 0.1 < plan["minutes"] < 10
    assert (
        main(["reproduce", "carlini2022/poisons", "--dry", "--json", "--runs", str(tmp_path)]) == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["trainings"] > 1 and plan["minutes"] > 1
    table = tmp_path / "t.csv"
    table.write_text("filepath,title\n" + "a.png,a star\n" * 70)
    assert main(["scan", str(table), "--dry", "--json", "--runs", str(tmp_path)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["records"] == 70 and plan["trainings"] == 1
    drawn = registry.make("data", DATA)()
    tars = write_shards(tmp_path / "tars", drawn, per_shard=10)
    assert main(["scan", *map(str, tars), "--dry", "--json", "--runs", str(tmp_path)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(tars) > estimates.COUNTED_TARS and plan["trainings"] == 1
    assert abs(plan["records"] - len(drawn)) < 0.2 * len(drawn)
    assert main(["train", str(tars[0]), "--dry", "--json", "--runs", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 10
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    words = ["audit", str(tmp_path / "weights"), "--data", str(table), "--dry", "--json"]
    assert main([*words, "--runs", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 70, "of the data, not of the weights"
    assert main(["train", "scenes:count=20000", "--dry", "--runs", str(tmp_path)]) == 0
    first, *fields = capsys.readouterr().out.splitlines()
    assert first.startswith("train: 20,000 records, 1 training, about ")
    assert "  data: scenes:count=20000" in fields and not any("None" in line for line in fields)


@pytest.mark.parametrize(
    "words, says",
    [
        (["scan", "nowhere-1"], "no file, folder or run 'nowhere-1'"),
        (["scan", DATA, "--detector", "dao:k=-4"], "detector 'dao': needs k >= 2"),
        (["train", DATA, "--objective", "clip:epochs=0"], "needs epochs >= 1"),
        (["reproduce", "matrix/detection", "--add", "detector", "nope"], "no detector 'nope'"),
        (["reproduce"], "name a paper"),
    ],
)
def test_dry_refuses_what_the_command_refuses(words, says, tmp_path, capsys):
    for dry in (["--dry"], ["--dry", "--json"], []):
        assert main([*words, *dry, "--runs", str(tmp_path)]) == 2
        printed = capsys.readouterr()
        assert says in printed.err.splitlines()[-1] and not printed.out
    assert not list(tmp_path.glob("scan-*"))


# Refusals come before torch, and before any work


@pytest.mark.parametrize(
    "words",
    [
        ["scan", "no/such/folder"],
        ["scan", "missing.tar"],
        ["scan", "missing.csv"],
        ["train", DATA, "--objective", "clap"],
        ["scan", DATA, "--detector", "dao", "--fail-on", "trigger"],
        ["scan"],
        ["nonsense"],
        ["show", "nowhere"],
    ],
)
def test_wrong_arguments_are_told_without_torch(words, tmp_path):
    code = (
        "import sys; from bezoar.cli import main; status = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules, 'torch'; sys.exit(status)"
    )
    if len(words) > 1:
        words = [*words, "--runs", str(tmp_path)]
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert time.monotonic() - start < 10  # a second on an idle machine
    assert not list(tmp_path.iterdir())


def test_a_method_is_shown_with_all_that_it_says(capsys):
    assert main(["list", "detector", "dao"]) == 0
    printed = capsys.readouterr().out
    assert "Huang" in printed and "Returns" not in printed.split("dao:")[0]
    about = cli.commands.describe_method("detector", "dao")
    assert all(f"      {f.name}: {f.type}" in printed for f in about.fields)
    assert main(["list", "detector", "dao", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["detector"]
    assert shown["name"] == "dao" and shown["text"] == about.text
    for words, says in {
        ("detector", "dap"): "did you mean dao",
        ("dao",): "did you mean `list detector dao`",
    }.items():
        assert main(["list", *words]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("scan {data} --reference clean-modle", "no file or folder of that name"),
        (
            "scan {data} --reference no/model.pth",
            "of that name; there is no folder no;",
        ),
        ("scan {data} --detector common_cause:reference=no.pth", "no file or folder of that name"),
        ("scan {data} --detector ./mien.py", "to read a detector from (did you mean ./mine.py?)"),
        ("scan {data} --detector ./empty/mine.py", "there is no folder ./empty"),
        ("scan {data} --detector ./broken.py", "broken.py is no Python source"),
        ("scan photo", "did you mean photos?"),
        ("scan ./photo", "no file or folder './photo' (did you mean ./photos?)"),
        ("scan folder:path=photo", "no folder of images 'photo' (did you mean photos?)"),
        ("poison {data} --trigger truk.png --target x", "no file (did you mean truck.png?)"),
        ("poison {data} --trigger file:path=q.png --target x", "this folder holds broken.py, mine"),
        ("audit weights:path=q.pth --data {data}", "'q.pth'; this folder holds"),
    ],
)
def test_a_path_that_is_wrong_is_told_with_what_is_there(
    words, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name, text in {"mine.py": "", "broken.py": "def (", "truck.png": ""}.items():
        (tmp_path / name).write_text(text)
    assert main(words.format(data="scenes:count=60").split()) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_the_command_alone_prints_help():
    done = subprocess.run([sys.executable, "-m", "bezoar"], capture_output=True, text=True)
    assert done.returncode == 0
    names = [*verb_names(), *cli.COMMANDS]
    assert all(f"\n  {name} " in done.stdout for name in names) and "More:" not in done.stdout


# Gates


def test_a_scan_by_an_encoder_that_never_saw_the_data_says_so_first_and_decides_nothing(
    runs, train, capsys
):
    words = ["scan", "scenes:count=96,seed=5", "--encoder", train.name, "--detector", "transplant"]
    assert main([*words, "--fail-on", "trigger", "--runs", str(runs)]) == 5
    errors = capsys.readouterr().err.splitlines()
    assert "not known to have been trained on these data" in errors[0]
    assert errors[-1].startswith("scan: --fail-on trigger: could not tell: this encoder")
    assert main([*words, "--runs", str(runs)]) == 0
    capsys.readouterr()
    assert main([*words, "--fail-on", "trigger", "--json", "--runs", str(runs)]) == 5
    short = json.loads(capsys.readouterr().out)
    assert short["exit"] == 5 and short["could_not_tell"]
    log = json.loads(Path(short["files"]["scan.sarif"]).read_text())["runs"][0]
    assert {r["level"] for r in log["results"]} == {"note"}
    assert not log["invocations"][0]["executionSuccessful"]


def test_the_encoder_of_the_data_decides(runs, train):
    words = ["scan", train.name, "--detector", "transplant", "--fail-on", "trigger"]
    assert main([*words, "--runs", str(runs)]) == 0
    words[1:2] = [DATA, "--encoder", train.name]
    assert main([*words, "--runs", str(runs)]) == 0


def test_exit_statuses_of_gates():
    raised = {"transplant.raised": {"value": 0.1}}
    none = {"transplant.raised": {"value": 0.0}}
    verb = load_verb("scan")

    def status(case, metrics, **notes):
        return exit_status(verb, case, {"metrics": metrics, "notes": notes})[0]

    assert status("never", none, untrained="x") == 0
    assert status("trigger", none) == 0 and status("trigger", raised) == 3
    assert status("trigger", raised, untrained="x") == 3
    assert status("trigger", none, untrained="x") == 5 and status("trigger", {}) == 5
    assert status("trigger", {}, incomplete=["detector transplant: no"]) == 5
    assert status("trigger", none, incomplete=["2 records"]) == 4
    audit = load_verb("audit")
    for words, expected in (("evidence", 3), ("no evidence", 0), ("no calibration", 5)):
        manifest = {"metrics": {}, "notes": {"words": words, "verdict": "v"}}
        assert exit_status(audit, "evidence", manifest)[0] == expected
    manifest["notes"] = {"words": "no evidence", "verdict": "v", "incomplete": ["audit x: no"]}
    assert exit_status(audit, "evidence", manifest)[0] == 5


# Python


def test_what_the_package_offers():
    assert {"Scan", "Run", "execute", "__version__"} <= set(dir(bezoar))
    assert bezoar.__version__ == "0.1.0"
    with pytest.raises(AttributeError, match=r"did you mean Scan\?"):
        _ = bezoar.Scann


def test_runs_in_python(train, scan):
    run = Run(str(scan.path))
    assert run == scan and run.metrics.keys() == scan.manifest["metrics"].keys()
    assert run.verdict in run._repr_html_().replace("&#x27;", "'")
    assert len(run.table("scores")) == 160
    with pytest.raises(UserError, match="it has: keep, scores"):
        run.table("score")
    with pytest.raises(UserError, match="not a run directory"):
        _ = Run("nowhere").metrics
    assert "not a run directory" in Run("nowhere")._repr_html_()


def test_one_detector_need_not_stand_in_a_tuple(runs, train, monkeypatch):
    settings = Settings(runs=str(runs), quiet=True)
    run = execute(Scan(train, detector="clip_score"), settings)
    assert list(run.manifest["ask"]["detector"][0]) and len(run.manifest["ask"]["detector"]) == 1
    monkeypatch.chdir(runs.parent)
    assert execute(Train(DATA, *TINY[1::2])).path.parent.name == "runs", "defaults without Settings"


@pytest.mark.parametrize(
    ("verb", "says"),
    [
        (Scan, "expected a verb such as Scan"),
        ("scan", "expected a verb such as Scan"),
        (Scan(3), "Scan: data takes a spec, a path, a Run, a verb or a configured method; got 3"),
        (Scan(DATA, remove="much"), "Scan: remove must be float; got 'much'"),
        (Scan(DATA, write="tars"), "Scan: write must be one of keep-list, shards; got 'tars'"),
        (Scan(DATA, detector=(Train,)), "Scan: detector takes a spec"),
    ],
)
def test_what_a_verb_cannot_take_is_told(verb, says):
    with pytest.raises(UserError) as error:
        execute(verb, Settings(quiet=True))
    assert str(error.value).startswith(says)


def test_a_verb_that_is_right_stays_as_it_is():
    verb = Scan(DATA, "tower", ("dao", "lid"))
    assert check_verb(verb) is verb
    assert dataclasses.replace(verb, detector="dao") != check_verb(Scan(DATA, "tower", "dao"))
    assert cli.COMMANDS.keys() >= {"list", "runs", "show", "verify", "completion"}


def test_training_on_a_scan_says_that_nothing_is_left_out(tmp_path, capsys):
    runs = ["--runs", str(tmp_path)]
    recipe = ["--network", "clip_small:width=8", "--objective", "clip:epochs=1,batch=32"]
    assert main(["train", "scenes:count=64", *recipe, *runs]) == 0
    encoder = capsys.readouterr().out.splitlines()[-1]
    words = ["scan", "scenes:count=64", "--encoder", encoder, "--detector", "k_distance"]
    assert main([*words, *runs]) == 0
    scan = Path(capsys.readouterr().out.splitlines()[-1])
    assert main(["train", str(scan), *recipe, *runs]) == 0
    assert f"add --keep {scan.name}" in capsys.readouterr().err
    assert main(["train", "scenes:count=64", "--keep", scan.name, *recipe, *runs]) == 0
    assert "--keep" not in capsys.readouterr().err
