"""Every verb as its user runs it, on small embedded data; bad input; cut-off runs."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
from made_files import tar_of

from bezoar.cli import main
from bezoar.detection.corpus.corpus import load_scores
from bezoar.evaluation.scores import Measure
from bezoar.runs.devices import find_commit

DATA = "scenes:count=600"


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def ask(capsys, runs, *words):
    """Run a command with --json; the manifest."""
    assert main([*map(str, words), "--runs", str(runs), "--json", "full"]) == 0
    out = capsys.readouterr().out
    return json.loads(out, parse_constant=pytest.fail)  # JSON has no Infinity


def name(runs, manifest):
    return next(
        p.parent.name for p in runs.glob("*/manifest.json") if json.loads(p.read_text()) == manifest
    )


@pytest.fixture
def poison(runs, capsys):
    return ask(
        capsys,
        runs,
        "poison",
        DATA,
        "--poison",
        "backdoor:count=30",
        "--trigger",
        "patch:size=6",
        "--target",
        "striped star",
    )


@pytest.fixture
def train(runs, poison, capsys):
    return ask(capsys, runs, "train", name(runs, poison), "--objective", "clip:epochs=2,batch=64")


def test_poison_then_verify(runs, poison, capsys):
    assert poison["status"] == "done" and poison["metrics"]["poisons"]["value"] == 30
    assert poison["goal"][0]["target"] == "striped star" and poison["notes"]["poisoned"] is True
    run = name(runs, poison)
    assert main(["verify", run, "--runs", str(runs)]) == 0
    plan = runs / run / "plan.jsonl"
    text = plan.read_text()
    lines = text.splitlines()
    for field, forged in (
        ("caption", "a forged caption"),
        ("after", "0" * 16),
        ("id", "scenes-0-train-0000599x"),
    ):
        edit = json.loads(lines[3]) | {field: forged}
        plan.write_text("\n".join([*lines[:3], json.dumps(edit), *lines[4:]]))
        assert main(["verify", run, "--runs", str(runs)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and edit["id"] in message
    plan.write_text(text)


def test_train_says_what_it_drew_and_marks_its_weights(runs, train):
    assert train["metrics"]["poison_exposures"]["value"] > 30
    head = json.loads((runs / name(runs, train) / "encoder.json").read_text())
    assert (
        head["poisoned"] is True and head["plan"] and head["goals"][0]["target"] == "striped star"
    )
    assert set(train["outputs"]) >= {"encoder.json", "encoder.safetensors", "ledger.safetensors"}
    assert not (runs / name(runs, train) / "checkpoint.safetensors").exists()


def test_evaluate_learns_the_trigger_from_the_parents(runs, train, capsys):
    evaluation = ask(capsys, runs, "evaluate", name(runs, train), "scenes:count=200,split=test")
    assert {"clean_accuracy", "attack_success", "attack_success_all", "z_std", "z_var"} <= set(
        evaluation["metrics"]
    )
    for m in evaluation["metrics"].values():
        assert Measure(**m).low <= m["value"] <= Measure(**m).high and m["n"] > 0 and m["how"]


def test_scan_ranks_writes_a_keep_list_and_train_takes_it(runs, train, capsys):
    scan = ask(
        capsys,
        runs,
        "scan",
        name(runs, train),
        "--detector",
        "transplant",
        "clip_score",
        "--remove",
        "0.1",
    )
    folder = runs / name(runs, scan)
    keep_list = (folder / "keep.txt").read_text().split()
    assert len(keep_list) == 540 and len(load_scores(folder)) == 600
    assert {"auroc", "transplant.auroc", "precision_at_n", "fpr_at_95_tpr"} <= set(scan["metrics"])
    again = ask(
        capsys,
        runs,
        "train",
        scan["parents"][0],
        "--keep",
        folder.name,
        "--objective",
        "clip:epochs=1,batch=64",
    )
    assert again["notes"]["records"] == 540


def test_the_same_question_has_one_answer_and_the_same_bits(runs, train, tmp_path, capsys):
    from safetensors.torch import load_file

    first = load_file(runs / name(runs, train) / "encoder.safetensors")
    poison = ask(
        capsys,
        tmp_path,
        "poison",
        DATA,
        "--poison",
        "backdoor:count=30",
        "--trigger",
        "patch:size=6",
        "--target",
        "striped star",
    )
    assert (tmp_path / name(tmp_path, poison) / "plan.jsonl").read_bytes() == (
        runs / name(tmp_path, poison) / "plan.jsonl"
    ).read_bytes()
    other = ask(
        capsys, tmp_path, "train", name(tmp_path, poison), "--objective", "clip:epochs=2,batch=64"
    )
    second = load_file(tmp_path / name(tmp_path, other) / "encoder.safetensors")
    assert name(tmp_path, other) == name(runs, train)
    assert all((first[k] == second[k]).all() for k in first)
    assert {k: v["sha256"] for k, v in train["outputs"].items()} == {
        k: v["sha256"] for k, v in other["outputs"].items()
    }


def test_another_seed_is_another_question(runs, poison, capsys):
    other = ask(
        capsys,
        runs,
        "poison",
        DATA,
        "--poison",
        "backdoor:count=30",
        "--trigger",
        "patch:size=6",
        "--target",
        "striped star",
        "--seed",
        "1",
    )
    assert name(runs, other) != name(runs, poison)


def test_the_commit_is_that_of_this_code_or_none(tmp_path):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    code = tmp_path / "package" / "code.py"
    code.parent.mkdir()
    code.write_text("x = 1")
    assert find_commit(code) == {}
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "somebody's own")
    assert find_commit(code) == {}, "it lies in a repository that does not track it"
    git("add", ".")
    git("commit", "-q", "-m", "ours")
    assert len(find_commit(code)["commit"]) == 40 and find_commit(code)["dirty"] is False
    code.write_text("x = 2")
    assert find_commit(code)["dirty"] is True


def test_a_fresh_training_forgets_what_another_attempt_kept(runs, poison, train, capsys):
    (runs / name(runs, train) / "checkpoint.safetensors").write_bytes(b"of another attempt")
    again = ask(
        capsys,
        runs,
        "train",
        name(runs, poison),
        "--objective",
        "clip:epochs=2,batch=64",
        "--fresh",
    )
    assert again["outputs"] == train["outputs"]


def test_runs_that_lie_in_several_directories(runs, poison, tmp_path, capsys):
    tiny = ("--network", "clip_small:width=4,dim=8", "--objective", "clip:epochs=1,batch=64")
    trained = ask(capsys, tmp_path / "b", "train", runs / name(runs, poison), *tiny)
    encoder = tmp_path / "b" / name(tmp_path / "b", trained)
    evaluation = ask(capsys, tmp_path / "c", "evaluate", encoder, "scenes:count=80,split=test")
    assert evaluation["goal"] == poison["goal"] and "attack_success" in evaluation["metrics"]
    page = (tmp_path / "c" / name(tmp_path / "c", evaluation) / "report.html").read_text()
    assert "could not be made" not in page and "no longer there" not in page


@pytest.mark.parametrize("seed", ["-1", str(1 << 32), "99999999999999999999"])
def test_a_seed_that_no_generator_takes_is_one_line(tmp_path, capsys, seed):
    words = [
        "poison",
        DATA,
        "--poison",
        "backdoor:count=3",
        "--trigger",
        "patch",
        "--target",
        "striped star",
    ]
    assert main([*words, "--seed", seed, "--runs", str(tmp_path)]) == 2
    assert "below 2**32" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["mps", "meta", "cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_one_line_that_names_those_that_are(tmp_path, capsys, device):
    assert main(["poison", DATA, "--device", device, "--runs", str(tmp_path)]) == 2
    assert f"no device '{device}' here; there are: cpu" in capsys.readouterr().err


def test_victims_are_drawn_from_data_not_from_a_run(runs, poison, capsys):
    words = [
        "poison",
        DATA,
        "--poison",
        "targeted:captions=2,victims=3",
        "--victims",
        name(runs, poison),
    ]
    assert main([*words, "--runs", str(runs)]) == 2
    assert "victims are drawn from a data set" in capsys.readouterr().err


def test_poisons_chain_and_dry_runs_nothing(runs, poison, tmp_path, capsys):
    both = ask(
        capsys,
        runs,
        "poison",
        name(runs, poison),
        "--poison",
        "targeted:captions=2,victims=3",
        "--victims",
        "scenes:count=100,split=test",
    )
    assert both["metrics"]["poisons"]["value"] == 36 and len(both["goal"]) == 4
    assert main(["verify", name(runs, both), "--runs", str(runs)]) == 0
    capsys.readouterr()
    assert main(["train", DATA, "--runs", str(tmp_path), "--dry", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["objective"] == "clip" and not list(
        tmp_path.iterdir()
    )


def test_written_shards_hold_the_same_records(tmp_path, capsys):
    import numpy as np

    from bezoar import registry
    from bezoar.data.pairs import load_pairs
    from bezoar.runs import inputs
    from bezoar.runs.run import Run

    words = [
        "poison",
        "scenes:count=400",
        "--poison",
        "backdoor:count=9",
        "--trigger",
        "patch",
        "--target",
        "striped star",
    ]
    poison = ask(capsys, tmp_path, *words, "--write", "shards")
    folder = tmp_path / name(tmp_path, poison)
    parts = inputs.open_dataset(Run(folder)).pairs
    read = load_pairs(registry.make("data", f"shards:path={folder}/shards/*.tar,size=32")())
    ours = dict(zip(parts.ids, zip(parts.captions, parts.images, strict=True), strict=True))
    assert len(read) == 400
    captions = sorted(parts.captions)
    assert sorted(read.captions) == captions
    pixels = {x.numpy().tobytes() for x in read.images}
    assert pixels == {x.numpy().tobytes() for _, x in ours.values()} and np.isfinite(len(pixels))


def test_shards_are_written_again_after_an_attempt_that_was_cut_off_and_by_a_fresh_one(
    tmp_path, capsys, monkeypatch
):
    from bezoar.data import shards

    words = [
        "poison",
        "scenes:count=400",
        "--poison",
        "backdoor:count=3",
        "--trigger",
        "patch",
        "--target",
        "striped star",
    ]
    words += ["--write", "shards", "--runs", str(tmp_path)]
    write = shards.write_shards

    def cut_off(folder, *args, **more):
        write(folder, *args, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "write_shards", cut_off)
    assert main(words) == 130
    (folder,) = tmp_path.glob("poison-*")
    assert not (folder / "shards").exists(), "nothing half-written bears the name"
    monkeypatch.setattr(shards, "write_shards", write)
    assert main(words) == 0
    whole = (folder / "shards" / "00000.tar").read_bytes()
    assert (
        main([*words, "--fresh"]) == 0 and (folder / "shards" / "00000.tar").read_bytes() == whole
    )
    assert (
        json.loads((folder / "manifest.json").read_text())["status"] == "done"
        and not (folder / "shards.part").exists()
    )


BAD = [
    (["train", "nothing-here"], "no file, folder or run 'nothing-here'"),
    (
        ["train", DATA, "--objective", "clap"],
        "no objective 'clap' (did you mean clip?); there are: cleanclip, clip",
    ),
    (["train", DATA, "--network", "clip_small:wide=3"], "it has: width"),
    (["train", DATA, "--device", "cuda:7"], "no device 'cuda:7'"),
    (["train", "scenes:count=20"], "20 records are fewer than one batch of 128"),
    (["train", "scenes:count=300,size=128"], "clip_small takes 32 to 96"),
    (
        ["poison", DATA, "--trigger", "patch", "--target", "purple zebra"],
        "no caption holds the target 'purple zebra'",
    ),
    (["poison", DATA, "--trigger", "patch"], "give a --target"),
    (["poison", DATA, "--target", "striped star"], "needs a trigger"),
    (
        [
            "poison",
            DATA,
            "--poison",
            "backdoor:count=9999",
            "--trigger",
            "patch",
            "--target",
            "star",
        ],
        "9999 poisons",
    ),
    (["poison", DATA, "--trigger", "patch:size=99", "--target", "striped star"], "99"),
    (["verify", "nowhere"], "no run 'nowhere'"),
    (["evaluate", "nowhere"], "no run 'nowhere'"),
    (["scan", "scenes:count=20"], "20 records are too few to train a model on"),
    (["scan"], "name a data set"),
    (["scan", "a.tar", "b.csv"], "2 inputs, such as a.tar and b.csv: give one, or several tars"),
    (["scan", DATA, "--detector", "dao", "--fail-on", "trigger"], "none says whether there is one"),
    (["scna", DATA], "no command 'scna' (did you mean scan?)"),
    (["scan", DATA, "--detector", "clip_scores"], "(did you mean clip_score?)"),
    (["show", "nowhere"], "there are: none"),
    (["reproduce"], "name a paper"),
    (
        ["dose", DATA, "--target", "striped star", "--doses", "5", "20", "--trainings", "1"],
        "three readings",
    ),
    (["scan", "no/such/folder", "--encoder", "tower"], "no file or folder 'no/such/folder'"),
    (["scan", DATA, "--encoder", __file__ + "c"], "no run"),
    (["train", "missing/{00..03}.tar"], "missing"),
    (["scan", "a" * 300, "--encoder", "tower"], "no file, folder or run 'aaaaaaa"),
    (["scan", "a" * 300 + ".tar", "--encoder", "tower"], "1 of 1 are missing"),
    (
        [
            "scan",
            "shards:path={" + ",".join(f"part-{i:05d}.tar" for i in range(30)) + "}",
            "--encoder",
            "tower",
        ],
        "30 of 30 are",
    ),
    (["scan", "table:path=" + "a" * 300 + ".csv", "--encoder", "tower"], "1 of 1 are missing"),
    (["scan", "folder:path=" + "a" * 300, "--encoder", "tower"], "no folder of images"),
    (["scan", DATA, "--encoder", "a" * 300], "no run"),
    (["scan", DATA, "--encoder", "imported:path=" + "a" * 300 + ".pth"], "no weights file"),
    (["scan", DATA, "--encoder", "a" * 300 + ".py"], "no file"),
    (
        ["scan", DATA, "--encoder", "resnet:depth=18"],
        "it is not trained; name a train run, or weights: imported:path=FILE",
    ),
]


@pytest.mark.parametrize(("words", "says"), BAD)
def test_bad_input_is_one_line_and_exit_two(words, says, tmp_path, capsys):
    assert main([*words, "--runs", str(tmp_path)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bezoar: ")]
    assert len(lines) == 1 and says in lines[0]
    for manifest in tmp_path.glob("*/manifest.json"):
        assert json.loads(manifest.read_text())["status"] == "failed"
    assert not list(tmp_path.glob("*/*.tmp"))


def test_a_directory_that_is_no_run_is_said_to_be_none(tmp_path, capsys):
    (tmp_path / "train-x").mkdir()
    (tmp_path / "train-x" / "manifest.json").write_text("[]")
    assert main(["show", "train-x", "--runs", str(tmp_path)]) == 2
    assert "expected a JSON object" in capsys.readouterr().err
    assert main(["show", "nowhere", "--runs", str(tmp_path)]) == 2
    assert "there are: train-x" in capsys.readouterr().err


def test_a_full_disk_is_said_and_leaves_nothing_half_written(runs, poison, capsys, monkeypatch):
    from bezoar.data.files import tensors

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    words = [
        "train",
        name(runs, poison),
        "--objective",
        "clip:epochs=1,batch=64,lr=1e-4",
        "--runs",
        str(runs),
    ]
    assert main(words) == 2
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(words) == 0, "it goes on once there is room"


@pytest.mark.parametrize(
    ("sent", "exit_status", "status"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGKILL, -9, "running")],
)
def test_a_run_that_is_stopped_says_so_and_goes_on(sent, exit_status, status, tmp_path):
    words = ["train", "scenes:count=1000", "--objective", "clip:epochs=8,batch=64"]
    words += ["--runs", str(tmp_path)]
    # A process that was started in the background ignores Ctrl-C, and so would its children.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"from bezoar.cli import main; import sys; sys.exit(main({words!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    start = time.monotonic()
    while not list(tmp_path.glob("train-*/manifest.json")) and time.monotonic() - start < 60:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(sent)
    assert process.wait(60) == exit_status
    (manifest,) = tmp_path.glob("train-*/manifest.json")
    assert json.loads(manifest.read_text())["status"] == status
    assert main(words) == 0
    assert json.loads(manifest.read_text())["status"] == "done"


def test_runs_in_a_folder_whose_name_is_not_utf8_are_refused_in_a_line(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ["poison", "scenes:count=60", "--poison", "backdoor:count=2", "--trigger", "patch"]
    assert main([*words, "--target", "star", "--runs", "a\udcff"]) == 2
    err = capsys.readouterr().err
    assert "runs must stand in a folder named in UTF-8" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_verb_without_its_data_ends_with_the_status_of_bad_input(capsys):
    assert main(["poison", "--trigger", "patch"]) == 2
    assert "DATA" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("scan x --remove ))", "--remove: could not convert string to float: '))'"),
        ("scan x --nope", "--nope; perhaps --open"),
        ("scan x --workers", "Missing value for argument '--workers'"),
        ("scan x --write foo", "Expected one of ('keep-list', 'shards'); see `bezoar scan --help`"),
        ("scan x --fail-on \x1b[31m\u202e", r"invalid choice '\x1b[31m\u202e'"),
        ("show", "RUN a run's directory"),
        ("runs x", "Unrecognized options: x"),
        ("--nope", "no command '--nope'"),
        ("scan x --" + "a" * 100_000, "--aaa"),
    ],
)
def test_words_that_do_not_fit_are_refused_in_a_line(capsys, words, shown):
    assert main(words.split(" ")) == 2
    out, err = capsys.readouterr()
    assert shown in err and err.count("\n") == 1 and err.startswith("bezoar: ") and not out
    assert len(err) < 5000 and not set(err) & set("│╭\x1b\u202e")


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bezoar {version('bezoar')}\n"


def test_only_a_poison_run_verifies(runs, train, poison, capsys):
    assert main(["verify", name(runs, train), "--runs", str(runs)]) == 2
    assert "only a poison run has a plan" in capsys.readouterr().err
    assert main(["verify", name(runs, poison), "--runs", str(runs), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["verified"] is True and verified["records"] == 30


def test_what_cannot_be_read_is_counted_and_named_and_the_rest_goes_on(tmp_path, capsys):
    import io

    from PIL import Image

    def png(side):
        out = io.BytesIO()
        Image.new("RGB", (side, side), (side, 90, 30)).save(out, "PNG")
        return out.getvalue()

    members = {}
    for i in range(40):
        members |= {f"{i:05d}.png": png(32), f"{i:05d}.txt": b"a striped star"}
    members |= {
        "tiny.png": png(1),
        "tiny.txt": b"a dot",
        "torn.png": png(32)[:40],
        "torn.txt": b"a torn star",
    }
    members |= {"latin.png": png(32), "latin.txt": "caf\xe9".encode("latin-1")}
    path = tar_of(tmp_path / "00000.tar", members)
    words = ["poison", f"shards:path={path},size=32", "--poison", "clean_label:count=4"]
    words += [
        "--trigger",
        "patch",
        "--target",
        "star",
        "--runs",
        str(tmp_path / "runs"),
        "--json",
        "full",
    ]
    assert main(words) == 4
    streams = capsys.readouterr()
    reading = json.loads(streams.out)["notes"]["reading"]
    assert reading["read"] == 40 and len(reading["skipped"]) == 3 and "3 skipped" in streams.err
    assert {m.split(".")[0] for _, m, _ in reading["skipped"]} == {"tiny", "torn", "latin"}
    path.write_bytes(path.read_bytes()[: 3 * 1024])
    words[1] = f"shards:path={path},size=32,limit=30"
    assert main(words) in (0, 2) and "00000.tar" in capsys.readouterr().err
    path.write_bytes(b"")
    words[1] = f"shards:path={path},size=32,limit=20"
    assert main(words) == 2 and "00000.tar" in capsys.readouterr().err


def test_help_names_inputs_as_readme_does(capsys):
    assert (
        main(["list", "dap"]) == 2
        and "no kind 'dap' of methods; there are: data, trigger" in capsys.readouterr().err
    )
    for words, shown in (
        (["scan", "--help"], ("DATA", "--encoder ENCODER", "--detector DETECTOR ...")),
        (["evaluate", "--help"], ("ENCODER [DATA]", "--attack RUN")),
        (["list", "--help"], ("[KIND]", "print it as one JSON object")),
    ):
        with pytest.raises(SystemExit):
            main(words)
        output = capsys.readouterr().out
        assert (
            all(s in output for s in shown)
            and "{None}" not in output
            and "type: ignore" not in output
            and "--no-dry" not in output
        )


def test_whoever_reads_may_stop_reading():
    command = f"{sys.executable} -m bezoar list | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "data" and done.stderr == "" and done.returncode in (0, 141)


def test_a_manifest_is_json_without_infinities(tmp_path, capsys):
    run = ask(
        capsys, tmp_path, "train", "scenes:count=300", "--objective", "clip:epochs=1,batch=128"
    )
    text = next(tmp_path.glob("train-*/manifest.json")).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == run
    loss = Measure(**run["metrics"]["final_loss"])
    assert (
        run["metrics"]["final_loss"]["low"] == "-Infinity"
        and loss.low == -math.inf
        and loss.high == math.inf
    )
    assert (
        main(["show", "train-", "--runs", str(tmp_path)]) == 0
        and "-inf .. inf" in capsys.readouterr().out
    )
