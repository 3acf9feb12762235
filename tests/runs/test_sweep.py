"""Sweeps: order, what travels to a worker, what is done and what failed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bezoar import Evaluate, Poison, Settings, Train
from bezoar.errors import UserError
from bezoar.progress import Progress
from bezoar.runs import sweep as sweeping
from bezoar.runs.sweep import (
    Trial,
    dependency_graph,
    run_request,
    sweep,
    trial_to_json,
    verb_from_json,
)
from bezoar.runs.verb import input_to_json, verb_name

DATA, TEST = "scenes:count=256", "scenes:count=80,split=test"
TINY = {"network": "clip_small:width=4,dim=8", "objective": "clip:epochs=1,batch=64"}


def trial(count: int, seed: int = 0, target: str = "striped star") -> Trial:
    plan = Poison(DATA, f"backdoor:count={count}", "patch:size=4", target)
    return Trial(Evaluate(Train(plan, **TINY), TEST), seed)


def test_what_a_verb_is_made_from_comes_first_and_once():
    shared = Train(DATA, **TINY)
    trials = [
        Trial(Evaluate(shared, TEST, p), s)
        for p in (("zero_shot",), ("retrieval",))
        for s in (0, 1)
    ]
    order = list(dependency_graph(trials))
    assert [verb_name(t.verb) for t in order].count("train") == 2  # one a seed
    for child, parents in dependency_graph(trials).items():
        assert all(order.index(p) < order.index(child) for p in parents)


def test_a_verb_survives_the_way_to_a_worker():
    verb = trial(4).verb
    asked = trial_to_json(Trial(verb, 3), Settings(Path("somewhere")), True)
    assert verb_from_json(json.loads(json.dumps(asked))["verb"]) == verb
    assert asked["seed"] == 3 and Path(asked["runs"]).is_absolute()
    assert (
        verb_from_json(json.loads(json.dumps({"verb": "evaluate", **input_to_json(verb)}))) == verb
    )


def test_a_worker_says_what_was_wrong(tmp_path):
    wrong = Trial(Train("scenes:count=0", **TINY))
    assert set(run_request(trial_to_json(wrong, Settings(tmp_path), True))) == {"error"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_runs_everything_and_the_second_time_nothing(tmp_path, workers):
    settings = Settings(tmp_path, quiet=True, workers=workers)
    trials = [trial(4), trial(8)]
    first = sweep(trials, settings, Progress(True, "sweep"))
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("manifest.json")}
    assert list(first) == trials and len(stamps) == 6
    assert all(run.manifest["status"] == "done" for run in first.values())
    assert first == sweep(trials, settings, Progress(True, "sweep"))
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("manifest.json")}


def test_the_rest_is_run_when_one_trial_fails(tmp_path):
    trials = [trial(4, target="no such thing"), trial(8)]
    with pytest.raises(UserError, match=r"1 of 2 trials failed.*no such thing"):
        sweep(trials, Settings(tmp_path, quiet=True, workers=1), Progress(True, "sweep"))
    assert [p.parent.name for p in tmp_path.glob("evaluate-*/manifest.json")]


ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


@pytest.mark.parametrize(
    ("there", "workers", "devices"),
    [(2, 3, {"cuda:0", "cuda:1"}), (1, 2, {"auto"}), (0, 2, {"auto"})],
)
def test_workers_are_spread_over_the_gpus_however_many_of_either(
    monkeypatch, there, workers, devices
):
    settings = Settings(device="auto")
    monkeypatch.setattr(sweeping, "gpus", lambda _: there)
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda _, **more: start([sys.executable, "-c", ECHO], **more)
    )
    with sweeping.processes(settings, workers, "any") as (submit, places):
        futures = [submit({"device": settings.device, "number": i}) for i in range(12)]
        told = [f.result() for f in futures]
    assert places == workers and [a["number"] for a in told] == list(range(12))
    assert {a["device"] for a in told} <= devices


def test_a_sweep_that_is_broken_off_hires_nobody_any_more(monkeypatch):
    start, hired = subprocess.Popen, []

    def hire(_, **more):
        hired.append(start([sys.executable, "-c", "import time; time.sleep(60)"], **more))
        return hired[-1]

    monkeypatch.setattr(subprocess, "Popen", hire)
    with (
        pytest.raises(KeyboardInterrupt),
        sweeping.processes(Settings(device="cpu"), 2, "any") as (submit, _),
    ):
        waiting = [submit({}), submit({})]
        time.sleep(0.2)
        raise KeyboardInterrupt
    assert all("status -9" in f.result(10)["error"] for f in waiting)
    assert len(hired) == 2 and all(w.poll() is not None for w in hired)


@pytest.mark.slow
def test_ray_gives_what_processes_give(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    trials = [trial(4), trial(8)]
    here = sweep(trials, Settings(tmp_path / "a", quiet=True, workers=2), Progress(True, "sweep"))
    there = sweep(
        trials, Settings(tmp_path / "b", quiet=True, workers=2, ray=True), Progress(True, "sweep")
    )
    for t in trials:
        assert here[t].name == there[t].name
        assert here[t].manifest["metrics"] == there[t].manifest["metrics"]
        weights = [
            r[t].ancestor("train").file("encoder.safetensors").read_bytes() for r in (here, there)
        ]
        assert weights[0] == weights[1]
