"""Sweep: many verbs, each answered once, on this machine's cores, its GPUs, or a Ray cluster; one training a worker.

What a verb is made from is run first, by itself, so that no worker waits for another; what is done is skipped, so that
a sweep that was cut off goes on where it was.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from bezoar import machine
from bezoar.errors import UserError
from bezoar.progress import Progress
from bezoar.runs.execute import execute
from bezoar.runs.run import Run
from bezoar.runs.verb import Settings, Trial, input_to_json, verb_name

THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
Submit = Callable[[dict], "Future[dict]"]
Answer = Callable[[dict], dict]


def sweep(trials: Iterable[Trial], settings: Settings, progress: Progress) -> dict[Trial, Run]:
    """Every trial's run. Raises UserError that names the first failure, after everything else has been run."""
    wanted = list(dict.fromkeys(trials))
    needs = dependency_graph(wanted)
    done: dict[Trial, Run] = {}
    failed: dict[Trial, str] = {}
    heavy = [t for t in needs if verb_name(t.verb) == "train"] or wanted
    with worker_pool(settings, min(len(wanted), settings.workers or worker_count(settings))) as (
        submit,
        places,
    ):
        going: dict[Future[dict], Trial] = {}
        while len(done) + len(failed) < len(needs):
            for trial, parents in needs.items():  # the first trials are finished first
                if trial in done or trial in failed or trial in going.values():
                    continue
                if lost := [p for p in parents if p in failed]:
                    failed[trial] = failed[lost[0]]
                elif len(going) < places and all(p in done for p in parents):
                    going[submit(trial_to_json(trial, settings, trial in wanted))] = trial
            finished, _ = wait(going, return_when=FIRST_COMPLETED) if going else ([], None)
            for future in finished:
                trial, answer = going.pop(future), future.result()
                if "run" in answer:
                    done[trial] = Run(settings.runs / answer["run"])
                else:
                    failed[trial] = answer["error"]
            progress.step(
                sum(t in done for t in heavy), len(heavy), f"{len(done)} of {len(needs)} runs"
            )
    if failed:
        broken = [t for t in wanted if t in failed]
        raise UserError(
            f"{len(broken)} of {len(wanted)} trials failed; the first: {failed[broken[0]]}"
        )
    return {t: done[t] for t in wanted}


def dependency_graph(trials: Sequence[Trial]) -> dict[Trial, tuple[Trial, ...]]:
    """Every trial and every verb inside one -> what it is made from. Parents stand before their children."""
    out: dict[Trial, tuple[Trial, ...]] = {}

    def add(trial: Trial) -> None:
        if trial in out:
            return
        parents = tuple(
            v if isinstance(v, Trial) else Trial(v, trial.seed) for v in nested_verbs(trial.verb)
        )
        for parent in parents:
            add(parent)
        out[trial] = parents

    for trial in trials:
        add(trial)
    return out


def nested_verbs(verb: Any) -> list[Any]:
    """The verbs and trials that a verb's fields hold."""
    values = [getattr(verb, f.name) for f in dataclasses.fields(verb)]
    flat = [
        v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,))
    ]
    return [
        v
        for v in flat
        if isinstance(v, Trial) or (dataclasses.is_dataclass(v) and hasattr(v, "work"))
    ]


def worker_count(settings: Settings) -> int:
    """How many workers: one a GPU, or one a core."""
    return gpus(settings) or machine.cores()


def gpus(settings: Settings) -> int:
    """How many GPUs workers are spread over: all, the one that is named, or none."""
    import torch

    chosen = machine.select_device(settings.device)
    return 0 if chosen.type != "cuda" else torch.cuda.device_count() if chosen.index is None else 1


def trial_to_json(trial: Trial, settings: Settings, page: bool) -> dict:
    """A trial in JSON, as a worker reads it."""
    return {
        "verb": {"verb": verb_name(trial.verb), **input_to_json(trial.verb)},
        "seed": trial.seed,
        "runs": str(settings.runs.absolute()),
        "device": settings.device,
        "finish": function_name(settings.finish) if page and settings.finish else None,
        "folder": str(Path.cwd()),
    }


def function_name(function: Callable[..., Any]) -> str:
    """`package.module:name` of a function, as a worker finds it."""
    return f"{function.__module__}:{function.__qualname__}"


def named_function(name: str | None) -> Callable[..., Any] | None:
    """The function of such a name; None for None. Names come from the process that started the sweep."""
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def verb_from_json(raw: Any) -> Any:
    """A verb, or a trial, out of what `typed` made of it."""
    if isinstance(raw, list):
        return tuple(map(verb_from_json, raw))
    if not isinstance(raw, dict):
        return raw
    name = raw["verb"]
    verb = getattr(importlib.import_module(f"bezoar.verbs.{name}"), name.title())
    made = verb(**{k: verb_from_json(v) for k, v in raw.items() if k not in ("verb", "seed")})
    return Trial(made, raw["seed"]) if "seed" in raw else made


def run_request(asked: dict) -> dict:
    """Run what was asked: `{"run": name}`, or `{"error": one line}`."""
    settings = Settings(
        Path(asked["runs"]),
        asked["seed"],
        asked["device"],
        quiet=True,
        finish=named_function(asked["finish"]),
    )
    try:
        os.chdir(asked["folder"])
        return {"run": execute(verb_from_json(asked["verb"]), settings).name}
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:  # a worker must say what happened: the sweep reports it and goes on
        import traceback

        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


@contextmanager
def worker_pool(
    settings: Settings, workers: int, by: Answer = run_request
) -> Iterator[tuple[Submit, int]]:
    """What takes a question and gives the future of its answer. by: who answers; a process runs its module for that."""
    with (
        ray_tasks(settings, by)
        if settings.ray
        else processes(settings, workers, by.__module__) as submit
    ):
        yield submit


@contextmanager
def processes(settings: Settings, workers: int, module: str) -> Iterator[tuple[Submit, int]]:
    """Worker processes of one thread each, or spread over the GPUs, fed through pipes; stopped at the end, however it comes."""
    many, ended = gpus(settings), threading.Event()
    command = [sys.executable, "-m", "bezoar.runs.sweep" if module == "__main__" else module]
    environment = os.environ if many else {**os.environ, **THREADS}

    def hire() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    hired = [hire() for _ in range(workers)]
    free: SimpleQueue[int] = SimpleQueue()
    for i in range(workers):
        free.put(i)

    def ask(asked: dict) -> dict:
        i = free.get()
        worker = hired[i]
        assert worker.stdin and worker.stdout
        try:
            line = json.dumps({**asked, "device": f"cuda:{i % many}"} if many > 1 else asked)
            worker.stdin.write(line + "\n")
            worker.stdin.flush()
            said = worker.stdout.readline()
        except OSError:
            said = ""
        if not said:
            said = json.dumps(
                {"error": f"a worker ended with status {worker.wait()}; was memory short?"}
            )
            if not ended.is_set():
                hired[i] = hire()
        free.put(i)
        return json.loads(said)

    threads = ThreadPoolExecutor(workers)
    try:
        yield (lambda asked: threads.submit(ask, asked)), workers
    finally:
        ended.set()
        for worker in hired:
            worker.kill()
            worker.wait()
        threads.shutdown(wait=False, cancel_futures=True)


@contextmanager
def ray_tasks(settings: Settings, by: Answer) -> Iterator[tuple[Submit, int]]:
    """Tasks of a Ray cluster: the one that RAY_ADDRESS names, or a local one. The runs' directory must be one for all."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray needs Ray: pip install 'bezoar[ray]'") from error
    own = not ray.is_initialized()
    if own:
        named = os.environ.get("RAY_ADDRESS")
        local: dict[str, Any] = (
            {} if named else {"num_cpus": settings.workers or worker_count(settings)}
        )
        environment = {} if gpus(settings) else {"env_vars": THREADS}
        ray.init(
            address=named or "local",
            include_dashboard=False,
            log_to_driver=False,
            runtime_env=environment,
            **local,
        )
    unit = "GPU" if gpus(settings) else "CPU"
    task = ray.remote(num_cpus=1, num_gpus=1 if unit == "GPU" else 0)(by)
    try:
        yield (
            (lambda asked: task.remote(asked).future()),
            max(1, int(ray.cluster_resources().get(unit, 1))),
        )
    finally:
        if own:
            ray.shutdown()


def serve_requests(by: Answer = run_request) -> None:
    """A worker: a question a line on stdin, an answer a line on stdout; what verbs print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(by(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    try:
        serve_requests()
    except KeyboardInterrupt:
        sys.exit(130)
