"""Runs many trials on this machine's cores or GPUs, or on a Ray cluster.

The verbs that a trial is made from run first, as trials of their own, so that no worker waits for
another. Finished trials are skipped, so an interrupted sweep continues.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from bezoar import machine
from bezoar.errors import UserError
from bezoar.progress import Progress
from bezoar.runs.devices import select_device
from bezoar.runs.execute import execute
from bezoar.runs.run import Run
from bezoar.runs.verb import Settings, Trial, Verb, input_to_json, is_verb, load_verb, verb_name

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
Submit = Callable[[dict[str, Any]], "Future[dict[str, Any]]"]
Answer = Callable[[dict[str, Any]], dict[str, Any]]


def run_trials(trials: Iterable[Trial], settings: Settings, progress: Progress) -> dict[Trial, Run]:
    """Run trials, and everything that they are made from.

    Returns:
        The run of each trial.

    Raises:
        UserError: if a trial failed, after all others have run; it names the first failure.
    """
    wanted = list(dict.fromkeys(trials))
    schedule = _Schedule(dependency_graph(wanted))
    trainings = [t for t in schedule.parents if verb_name(t.verb) == "train"]
    counted = trainings or wanted  # the progress counts trainings, which take nearly all the time
    workers = min(len(wanted), settings.workers or worker_count(settings))
    # A single worker writes lines into a log; a terminal has the progress bar.
    quiet = settings.quiet or workers > 1 or sys.stderr.isatty()
    with worker_pool(settings, workers) as (submit, places):
        while not schedule.is_complete:
            for trial in schedule.ready(places):
                request = trial_to_json(trial, settings, trial in wanted, quiet)
                schedule.running[submit(request)] = trial
            schedule.collect(settings.runs)
            text = f"{len(schedule.done)} of {len(schedule.parents)} runs"
            progress.step(sum(t in schedule.done for t in counted), len(counted), text)
    if schedule.failed:
        failures = [schedule.failed[t] for t in wanted if t in schedule.failed]
        raise UserError(f"{len(failures)} of {len(wanted)} trials failed; the first: {failures[0]}")
    return {t: schedule.done[t] for t in wanted}


@dataclass
class _Schedule:
    """Which trials are done, failed and running. parents: what each is made from, parents first."""

    parents: dict[Trial, tuple[Trial, ...]]
    done: dict[Trial, Run] = field(default_factory=dict)
    failed: dict[Trial, str] = field(default_factory=dict)
    running: dict[Future[dict[str, Any]], Trial] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return len(self.done) + len(self.failed) >= len(self.parents)

    def ready(self, places: int) -> Iterator[Trial]:
        """The next trials to start. Trials with failed parents fail too."""
        for trial, parents in self.parents.items():
            if trial in self.done or trial in self.failed or trial in self.running.values():
                continue
            failed_parents = [p for p in parents if p in self.failed]
            if failed_parents:
                self.failed[trial] = self.failed[failed_parents[0]]
            elif len(self.running) < places and all(p in self.done for p in parents):
                yield trial

    def collect(self, runs: Path) -> None:
        """Wait until a running trial ends, and note how it ended."""
        if not self.running:
            return
        finished, _ = wait(self.running, return_when=FIRST_COMPLETED)
        for future in finished:
            trial = self.running.pop(future)
            answer = future.result()
            if "run" in answer:
                self.done[trial] = Run(runs / answer["run"])
            else:
                self.failed[trial] = answer["error"]


def dependency_graph(trials: Sequence[Trial]) -> dict[Trial, tuple[Trial, ...]]:
    """For each trial, and each trial inside one, the trials that it is made from; parents first."""
    graph: dict[Trial, tuple[Trial, ...]] = {}

    def add(trial: Trial) -> None:
        if trial in graph:
            return
        parents = tuple(
            v if isinstance(v, Trial) else Trial(v, trial.seed) for v in nested_verbs(trial.verb)
        )
        for parent in parents:
            add(parent)
        graph[trial] = parents

    for trial in trials:
        add(trial)
    return graph


def nested_verbs(verb: Verb) -> list[Verb | Trial]:
    """The verbs and trials that a verb's fields hold."""
    nested: list[Verb | Trial] = []
    for f in dataclasses.fields(verb):
        value = getattr(verb, f.name)
        items = value if isinstance(value, (tuple, list)) else (value,)
        nested += [item for item in items if isinstance(item, Trial) or is_verb(item)]
    return nested


def worker_count(settings: Settings) -> int:
    """The default number of workers: one for each GPU, or for each core without GPUs."""
    return gpus(settings) or machine.cores()


def gpus(settings: Settings) -> int:
    """Return how many GPUs the workers are spread over: all, the one that is named, or none."""
    device = select_device(settings.device)
    if device.type != "cuda":
        return 0
    return torch.cuda.device_count() if device.index is None else 1


# Messages to and from workers


def trial_to_json(
    trial: Trial, settings: Settings, page: bool, quiet: bool = True
) -> dict[str, Any]:
    """Write a trial as JSON for a worker.

    page: whether the run is finished with `settings.finish`. quiet: whether it shows no progress.
    """
    return {
        "verb": {"verb": verb_name(trial.verb), **input_to_json(trial.verb)},
        "seed": trial.seed,
        "runs": str(settings.runs.absolute()),
        "device": settings.device,
        "finish": function_name(settings.finish) if page and settings.finish else None,
        "quiet": quiet,
        "folder": str(Path.cwd()),
    }


def function_name(function: Callable[..., Any]) -> str:
    """The name of a function for workers: `package.module:name`."""
    return f"{function.__module__}:{function.__qualname__}"


def named_function(name: str | None) -> Callable[..., Any] | None:
    """The function of a name by `function_name`; None for None."""
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def verb_from_json(raw: Any) -> Any:
    """Read a verb, a trial or a plain value that `input_to_json` wrote."""
    if isinstance(raw, list):
        return tuple(map(verb_from_json, raw))
    if not isinstance(raw, dict):
        return raw
    fields = {k: verb_from_json(v) for k, v in raw.items() if k not in ("verb", "seed")}
    verb = load_verb(raw["verb"])(**fields)
    return Trial(verb, raw["seed"]) if "seed" in raw else verb


def run_request(request: dict[str, Any]) -> dict[str, Any]:
    """Run a trial in a worker. Returns `{"run": name}`, or `{"error": message}`."""
    finish = named_function(request["finish"])
    settings = Settings(
        Path(request["runs"]),
        request["seed"],
        request["device"],
        quiet=request["quiet"],
        finish=finish,
    )
    try:
        os.chdir(request["folder"])
        return {"run": execute(verb_from_json(request["verb"]), settings).name}
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:  # the sweep reports the error and continues
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


# Workers


def worker_pool(
    settings: Settings, workers: int, by: Answer = run_request
) -> AbstractContextManager[tuple[Submit, int]]:
    """Workers inside a `with` block: processes of this machine, or tasks of a Ray cluster.

    Args:
        settings: see `Settings.ray`, `Settings.device`.
        workers: number of processes.
        by: function that answers a request in the worker. A process runs its module, which calls
            `serve_requests`.

    Returns:
        A context manager that gives a function, which takes a request and returns the future of its
        answer; and how many requests are served at a time.
    """
    if settings.ray:
        return ray_tasks(settings, by)
    return processes(settings, workers, by.__module__)


@contextmanager
def processes(settings: Settings, workers: int, module: str) -> Iterator[tuple[Submit, int]]:
    """Worker processes, fed through pipes and killed at the end of the block. See `worker_pool`.

    Without GPUs each has one thread; otherwise they are spread over the GPUs.
    """
    pool = _Processes(workers, module, gpus(settings))
    threads = ThreadPoolExecutor(workers)  # each waits for the answer of one process
    try:
        yield (lambda request: threads.submit(pool.request, request)), workers
    finally:
        pool.stop()
        threads.shutdown(wait=False, cancel_futures=True)


class _Processes:
    """Worker processes; a process that dies is replaced, and costs its request alone."""

    def __init__(self, workers: int, module: str, gpu_count: int) -> None:
        self.gpu_count = gpu_count
        self.stopped = threading.Event()
        self.command = [
            sys.executable,
            "-m",
            "bezoar.runs.sweep" if module == "__main__" else module,
        ]
        self.environment = dict(os.environ) if gpu_count else {**os.environ, **ONE_THREAD}
        self.workers = [self.start_worker() for _ in range(workers)]
        self.free: SimpleQueue[int] = SimpleQueue()  # numbers of the workers that wait
        for number in range(workers):
            self.free.put(number)

    def start_worker(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have the next free worker answer a request, and wait for the answer."""
        number = self.free.get()
        if self.gpu_count > 1:
            request = {**request, "device": f"cuda:{number % self.gpu_count}"}
        answer = self._exchange(self.workers[number], json.dumps(request))
        if not answer:
            status = self.workers[number].wait()
            answer = json.dumps(
                {"error": f"a worker ended with status {status}; was memory short?"}
            )
            if not self.stopped.is_set():
                self.workers[number] = self.start_worker()
        self.free.put(number)
        parsed: dict[str, Any] = json.loads(answer)
        return parsed

    @staticmethod
    def _exchange(worker: subprocess.Popen[str], line: str) -> str:
        """Write a line to a worker and read one; "" where the worker has ended."""
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(line + "\n")
            worker.stdin.flush()
            return worker.stdout.readline()
        except OSError:
            return ""

    def stop(self) -> None:
        self.stopped.set()
        for worker in self.workers:
            worker.kill()
            worker.wait()


@contextmanager
def ray_tasks(settings: Settings, by: Answer) -> Iterator[tuple[Submit, int]]:
    """Tasks of a Ray cluster (RAY_ADDRESS, or a local one) that sees the same runs everywhere."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray needs Ray: pip install 'bezoar[ray]'") from error
    gpu_count = gpus(settings)
    starts_ray = not ray.is_initialized()
    if starts_ray:
        address = os.environ.get("RAY_ADDRESS")
        ray.init(
            address=address or "local",
            num_cpus=None if address else settings.workers or worker_count(settings),
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={} if gpu_count else {"env_vars": ONE_THREAD},
        )
    task = ray.remote(num_cpus=1, num_gpus=1 if gpu_count else 0)(by)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    places = int(resources.get("GPU" if gpu_count else "CPU", 1))
    try:
        yield (lambda request: task.remote(request).future()), max(1, places)
    finally:
        if starts_ray:
            ray.shutdown()


def serve_requests(by: Answer = run_request) -> None:
    """Answer requests in a worker: one request a line on stdin, one answer a line on stdout.

    Output of verbs goes to stderr. The worker ends at once when the main process does, even during
    a training, so that it keeps neither memory nor a run that is requested again.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    requests: SimpleQueue[str] = SimpleQueue()

    def read_requests() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)

    threading.Thread(target=read_requests, daemon=True).start()
    while True:
        answer = json.dumps(by(json.loads(requests.get())))
        try:
            print(answer, file=answers, flush=True)
        except BrokenPipeError:  # the main process has ended; discard the rest of the output
            os.dup2(os.open(os.devnull, os.O_WRONLY), answers.fileno())
            return


if __name__ == "__main__":
    try:
        serve_requests()
    except KeyboardInterrupt:
        sys.exit(130)
