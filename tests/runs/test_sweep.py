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
from bezoar.runs import sweep
from bezoar.runs.run import Run
from bezoar.runs.verb import Trial, input_to_json, verb_name

DATA, TEST = "scenes:count=256", "scenes:count=80,split=test"
TINY = {"network": "clip_small:width=4,dim=8", "objective": "clip:epochs=1,batch=64"}


def trial(count: int, seed: int = 0, target: str = "striped star") -> Trial:
    plan = Poison(DATA, f"backdoor:count={count}", "patch:size=4", target)
    return Trial(Evaluate(Train(plan, **TINY), TEST), seed)


def run_trials(trials: list[Trial], runs: Path, **settings) -> dict[Trial, Run]:
    progress = Progress(True, "sweep")
    return sweep.run_trials(trials, Settings(runs, quiet=True, **settings), progress)


def test_what_a_verb_is_made_from_comes_first_and_once():
    shared = Train(DATA, **TINY)
    trials = [
        Trial(Evaluate(shared, TEST, probes), seed)
        for probes in (("zero_shot",), ("retrieval",))
        for seed in (0, 1)
    ]
    graph = sweep.dependency_graph(trials)
    order = list(graph)
    assert [verb_name(t.verb) for t in order].count("train") == 2  # one a seed
    for child, parents in graph.items():
        assert all(order.index(parent) < order.index(child) for parent in parents)


def test_a_verb_survives_the_way_to_a_worker():
    verb = trial(4).verb
    request = sweep.trial_to_json(Trial(verb, 3), Settings(Path("somewhere")), True)
    assert sweep.verb_from_json(json.loads(json.dumps(request))["verb"]) == verb
    assert request["seed"] == 3 and Path(request["runs"]).is_absolute()
    raw = json.loads(json.dumps({"verb": "evaluate", **input_to_json(verb)}))
    assert sweep.verb_from_json(raw) == verb


def test_a_worker_reports_an_error(tmp_path):
    wrong = Trial(Train("scenes:count=0", **TINY))
    request = sweep.trial_to_json(wrong, Settings(tmp_path), True)
    assert set(sweep.run_request(request)) == {"error"}


def test_a_worker_whose_sweep_has_ended_ends_quietly():
    code = "from bezoar.runs.sweep import serve_requests; serve_requests(lambda request: request)"
    pipe = subprocess.PIPE
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe)
    worker.stdout.close()
    worker.stdin.write(b"{}\n")
    worker.stdin.flush()
    assert worker.wait(60) == 0 and worker.stderr.read() == b""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_runs_everything_and_the_second_time_nothing(tmp_path, workers):
    trials = [trial(4), trial(8)]
    first = run_trials(trials, tmp_path, workers=workers)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("manifest.json")}
    assert list(first) == trials and len(stamps) == 6
    assert all(run.is_done for run in first.values())
    assert first == run_trials(trials, tmp_path, workers=workers)
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("manifest.json")}


def test_the_rest_is_run_when_one_trial_fails(tmp_path):
    trials = [trial(4, target="no such thing"), trial(8)]
    with pytest.raises(UserError, match=r"1 of 2 trials failed.*no such thing"):
        run_trials(trials, tmp_path, workers=1)
    assert list(tmp_path.glob("evaluate-*/manifest.json"))


ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


@pytest.mark.parametrize(
    ("gpus", "workers", "devices"),
    [(2, 3, {"cuda:0", "cuda:1"}), (1, 2, {"auto"}), (0, 2, {"auto"})],
)
def test_workers_are_spread_over_the_gpus_however_many_of_either(
    monkeypatch, gpus, workers, devices
):
    settings = Settings(device="auto")
    monkeypatch.setattr(sweep, "gpus", lambda _: gpus)
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda _, **options: start([sys.executable, "-c", ECHO], **options)
    )
    with sweep.processes(settings, workers, "any") as (submit, places):
        futures = [submit({"device": settings.device, "number": i}) for i in range(12)]
        answers = [future.result() for future in futures]
    assert places == workers and [a["number"] for a in answers] == list(range(12))
    assert {a["device"] for a in answers} <= devices


def test_a_sweep_that_is_broken_off_starts_no_more_workers(monkeypatch):
    start, workers = subprocess.Popen, []

    def start_worker(_, **options):
        workers.append(start([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return workers[-1]

    monkeypatch.setattr(subprocess, "Popen", start_worker)
    with (
        pytest.raises(KeyboardInterrupt),
        sweep.processes(Settings(device="cpu"), 2, "any") as (submit, _),
    ):
        futures = [submit({}), submit({})]
        time.sleep(0.2)
        raise KeyboardInterrupt
    assert all("status -9" in future.result(10)["error"] for future in futures)
    assert len(workers) == 2 and all(worker.poll() is not None for worker in workers)


@pytest.mark.slow
def test_ray_gives_what_processes_give(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    trials = [trial(4), trial(8)]
    by_processes = run_trials(trials, tmp_path / "a", workers=2)
    by_ray = run_trials(trials, tmp_path / "b", workers=2, ray=True)
    for t in trials:
        assert by_processes[t].name == by_ray[t].name
        assert by_processes[t].manifest["metrics"] == by_ray[t].manifest["metrics"]
        weights = [
            runs[t].ancestor("train").file("encoder.safetensors").read_bytes()
            for runs in (by_processes, by_ray)
        ]
        assert weights[0] == weights[1]


def test_a_worker_ends_with_whoever_asked_it(tmp_path):
    """A sweep that is killed leaves no worker that goes on with a training, and its memory."""
    long = Trial(Train("scenes:count=64", **(TINY | {"objective": "clip:epochs=100000,batch=16"})))
    request = sweep.trial_to_json(long, Settings(tmp_path), False)
    command = [sys.executable, "-m", "bezoar.runs.sweep"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as worker:
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        while not list(tmp_path.glob("train-*")):
            time.sleep(0.1)
        worker.stdin.close()
        assert worker.wait(20) == 0
    (manifest,) = tmp_path.glob("train-*/manifest.json")
    assert json.loads(manifest.read_text())["status"] == "running"
