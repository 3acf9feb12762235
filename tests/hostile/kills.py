"""Cut every verb off at every operation on a file, and ask again: the answer must be that of the
run that nobody disturbed.

python tests/hostile/kills.py FOLDER [--mode kill,full,once] [--chains N] [--only VERB,...]
                              [--sample N] [--part 0 --parts 2]

A chain cuts one command off again and again, each time a few operations after it went on, until it
ends: for verbs that run for long and write much.

Prints a JSON line for each operation that left something behind, then a line of totals; exits with
1 if any did. Each run is a fork of this process, which has imported everything. Clocks stand still
in it, so that runs are equal to the byte, manifests and pages included.
"""

import argparse
import gc
import hashlib
import importlib
import json
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import torch
from hostile.artefacts import write_tables, write_tar
from hostile.disk import GROWING, Disk
from hostile.run import enter, exit_status
from safetensors.torch import load_file, save_file

import bezoar
from bezoar.detection.corpus import shared_embeddings, units
from bezoar.runs import execute, sweep
from bezoar.training import loop

SECONDS = 180  # for one run
LINES = 3  # that a refusal may take
STRIDE = 128  # operations that a link of a chain goes on for, at most
PROGRESS = re.compile(r"[\w ]+: ([\d.]+ s|\d+ of \d+: .*)|")
NOW = time.gmtime(1_800_000_000)
TINY = "tower:width=4,dim=8"
SIMCLR = "simclr:epochs=1,batch=32,hidden=8,dim=4"
CLIP = "clip:epochs=2,batch=100"
CLIP_TINY = "clip_small:width=8,dim=8"
BACKDOOR = ("--poison", "backdoor:count=6", "--trigger", "patch:size=6")
TARGET = ("--target", "striped star")


@dataclass(frozen=True)
class Case:
    """A command that is cut off.

    Attributes:
        name: of the case, and of the verb before a dot.
        words: of the command; {NAME} stands for the run that another case makes.
        after: cases whose runs it reads, or that must have been run before.
    """

    name: str
    words: tuple[str, ...]
    after: tuple[str, ...] = ()


CASES = (
    Case("poison", ("poison", "scenes:count=200", *BACKDOOR, *TARGET)),
    Case("poison.shards", ("poison", "scenes:count=200", *BACKDOOR, *TARGET, "--write", "shards")),
    Case("verify", ("verify", "{poison}"), ("poison",)),
    Case("train", ("train", "{poison}", "--network", CLIP_TINY, "--objective", CLIP), ("poison",)),
    Case("tower", ("train", "scenes:count=64", "--network", TINY, "--objective", SIMCLR)),
    Case(
        "inject",
        (
            *("inject", "{tower}", "--data", "scenes:count=64", *TARGET),
            *("--reference", "scenes:count=300", "--trigger", "patch:size=4"),
            *("--attack", "badencoder:epochs=2,batch=32,lr=0.01"),
        ),
        ("tower",),
    ),
    Case("evaluate", ("evaluate", "{train}", "scenes:count=60,split=test"), ("train",)),
    Case("scan", ("scan", "{train}", "--detector", "duplicates", "clip_score"), ("train",)),
    Case(
        "scan.shards",
        (
            *("scan", "shards:path={{0..2}}.tar,size=32", "--encoder", "{train}", "--workers", "1"),
            *("--detector", "duplicates", "--write", "shards"),
        ),
        ("train",),
    ),
    Case(
        "scan.workers",
        (
            *("scan", "shards:path={{0..2}}.tar,size=32", "--encoder", "{train}", "--workers", "2"),
            *("--detector", "k_distance:k=2"),
        ),
        ("train",),
    ),
    Case(
        "scan.table",
        (
            *("scan", "table:path=tables/t.csv,size=32", "--encoder", "{train}", "--workers", "1"),
            *("--detector", "./mine.py:k=2"),
        ),
        ("train",),
    ),
    Case(
        "scan.export",
        ("scan", "{train}", "--detector", "duplicates", "--export", "fiftyone"),
        ("train",),
    ),
    Case("scan.fresh", ("scan", "{train}", "--detector", "duplicates", "--fresh"), ("train",)),
    Case("survive", ("survive", "scenes:count=16", "--trigger", "patch:size=6")),
    Case(
        "audit",
        ("audit", "{train}", "--audit", "whitening", "whole_image", "--images", "64"),
        ("train",),
    ),
    Case(
        "calibrate",
        (
            *("calibrate", "{tower}", "--attacked", "{inject}", "--audit", "whitening"),
            *("--images", "64", "--data", "scenes:count=64,split=test", "--workers", "1"),
        ),
        ("tower", "inject"),
    ),
    Case(
        "shadows",
        (
            *("shadows", "{tower}", *(f"{{clean{i}}}" for i in range(5))),
            *("--attacked", "{inject}", *(f"{{attacked{i}}}" for i in range(5))),
            *("--queries", "4", "--steps", "1", "--images", "16"),
        ),
        ("tower", "inject"),
    ),
    Case(
        "repair",
        ("repair", "{train}", "--data", "scenes:count=400,seed=3", "--repair", "prune"),
        ("train",),
    ),
    Case(
        "check",
        (
            *("check", "{train}", "scenes:count=40,split=test"),
            *("--check", "strip", "--clean", "scenes:count=160,seed=4"),
        ),
        ("train",),
    ),
    Case(
        "dose",
        (
            *("dose", "scenes:count=200", *TARGET, "--doses", "4", "8", "--trainings", "2"),
            *("--network", CLIP_TINY, "--objective", "clip:epochs=1,batch=100"),
            *("--test", "scenes:count=60,split=test", "--workers", "1"),
        ),
    ),
    Case(
        "demo",
        (
            *("demo", "--count", "300", "--test", "60", "--epochs", "1"),
            *("--victims", "2", "--poisons", "10"),
        ),
    ),
    Case("reproduce", ("reproduce", "{paper}", "--scale", "smoke", "--workers", "1")),
    Case("show", ("show", "{train}", "--page", "page.html"), ("train",)),
)


METHOD = '''"""A user's own detector, which is remembered as named."""

from bezoar.evaluation.scores import Scores
from bezoar.registry import method


@method
class Mine:
    k: int = 1

    def __call__(self, encoder, source):
        embedded = encoder.embed(source)
        return Scores(embedded.ids, embedded.images[:, self.k])
'''


# One run, in a process of its own


def stop_clocks() -> None:
    """Let no time pass in this process, and let it take no memory that a manifest would name.

    Nor is there a commit that may change meanwhile, in the checkout that bezoar is run from.
    """
    time.monotonic = time.perf_counter = time.process_time = lambda: 0.0
    time.gmtime = lambda *_: NOW
    usage = SimpleNamespace(ru_maxrss=0, ru_utime=0.0, ru_stime=0.0)
    resource.getrusage = lambda _: usage  # type: ignore[assignment]
    execute.describe_environment = lambda _: {}
    loop.CHECKPOINT_SECONDS = -1.0  # a checkpoint after every step
    shared_embeddings.new_secret = lambda: "0" * 2 * shared_embeddings.SECRET_BYTES


class ForkedWorker:
    """A worker of a sweep that is forked, where the real one imports everything again."""

    def __init__(self, module: str) -> None:
        request, answer = os.pipe(), os.pipe()
        self.process = os.fork()
        if self.process == 0:
            self.serve(module, request[0], answer[1])
        os.close(request[0])
        os.close(answer[1])
        self.stdin, self.stdout = os.fdopen(request[1], "w"), os.fdopen(answer[0], "r")

    @staticmethod
    def serve(module: str, requests: int, answers: int) -> None:
        """Answer requests, as the module does that the real worker runs."""
        try:
            os.dup2(requests, 0)
            os.dup2(answers, 1)
            sys.stdin, sys.stdout = os.fdopen(0, "r"), os.fdopen(1, "w")
            for end in (requests, answers):
                os.close(end)
            sweep.serve_requests(
                units.answer_request if module == units.__name__ else sweep.run_request
            )
        finally:
            os._exit(0)

    def kill(self) -> None:
        """End it."""
        os.kill(self.process, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end, which another thread may have seen already."""
        with suppress(ChildProcessError):
            os.waitpid(self.process, 0)
        return -signal.SIGKILL


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its status, and what it printed."""

    status: int
    out: str
    err: str


def run(words: Iterable[str], world: Path, at: int = 0, mode: str = "kill") -> Outcome:
    """Run a command in a folder; at operation `at`, see `Disk`."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            status = run_here(list(words), world, at, mode)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status)
    deadline = time.monotonic() + SECONDS
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)
    out, err = (world.with_suffix(f".{n}").read_text(errors="replace") for n in ("out", "err"))
    return Outcome(os.waitstatus_to_exitcode(ended[1]), out, err)


def run_here(words: list[str], world: Path, at: int, mode: str) -> int:
    """The command, as the child process runs it. Returns the exit status."""
    enter(world)
    stop_clocks()
    sweep._Processes.start_worker = lambda pool: ForkedWorker(pool.command[-1])  # type: ignore
    Disk(world, world.with_suffix(".log"), at, mode).install()
    return exit_status(words)


# What it leaves behind


def snapshot(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What files differ, a phrase a file."""
    lines = [f"missing: {name}" for name in before.keys() - after.keys()]
    lines += [f"left behind: {name}" for name in after.keys() - before.keys()]
    both = before.keys() & after.keys()
    return sorted(lines + [f"differs: {name}" for name in both if before[name] != after[name]])


def refusal_faults(outcome: Outcome, world: Path) -> list[str]:
    """What is wrong with the way in which a command ended on a full disk."""
    lines = [line for line in outcome.err.splitlines() if not PROGRESS.fullmatch(line)]
    faults = []
    if outcome.status not in (0, 2, 4):
        faults.append(f"status {outcome.status}: {(lines or ['no word'])[-1][:300]}")
    if outcome.status == 2 and not 0 < len(lines) <= LINES:
        faults.append(f"{len(lines)} lines: {outcome.err[-300:]!r}")
    faults += [f"left behind: {p.relative_to(world)}" for p in world.rglob("*.tmp")]
    return faults


@dataclass
class World:
    """A folder that commands run in, made anew from a base before each of them."""

    base: Path
    path: Path

    def reset(self) -> None:
        """Make it what the base is."""
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.base, self.path)

    def keep(self) -> None:
        """Make the base what it is."""
        shutil.rmtree(self.base)
        shutil.copytree(self.path, self.base)


def make_base(folder: Path) -> World:
    """The data that commands read."""
    world = World(folder / "base", folder / "world")
    world.base.mkdir(parents=True)
    for i in range(3):
        write_tar(world.base / f"{i}.tar", 6 + i)
    write_tables(world.base / "tables")
    (world.base / "mine.py").write_text(METHOD)
    (world.base / "home").mkdir()
    return world


def copy_encoder(world: World, source: str, number: int) -> str:
    """A run with weights and a parent of its own in the base, made from another's in
    milliseconds.
    """
    runs = world.base / "runs"
    copy = Path(shutil.copytree(runs / source, runs / f"{source.split('-')[0]}-copy{number}"))
    weights = load_file(copy / "encoder.safetensors")
    draws = torch.Generator().manual_seed(number)
    moved = {
        k: v + 0.3 * torch.randn(v.shape, generator=draws).abs() if v.is_floating_point() else v
        for k, v in weights.items()
    }
    save_file(moved, copy / "encoder.safetensors")
    manifest = json.loads((copy / "manifest.json").read_text())
    if "encoder" in manifest["ask"]:
        manifest["ask"]["encoder"] = {"run": f"train-gone{number}"}
        (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy.name


def sample_operations(log: list[str], most: int) -> list[int]:
    """The numbers of at most so many operations, each kind of them at least once; all where `most`
    is 0.
    """
    if not most or len(log) <= most:
        return list(range(1, len(log) + 1))
    first = {line.split()[0]: number for number, line in reversed(list(enumerate(log, 1)))}
    rest = max(1, most - len(first))
    spread = {1 + round(i * (len(log) - 1) / rest) for i in range(1, rest + 1)}
    return sorted({*first.values(), *spread})


@dataclass
class Totals:
    """What was tried, and how much of it went wrong."""

    cuts: int = 0
    faults: int = 0

    def note(self, case: str, mode: str, at: int, operation: str, faults: list[str]) -> None:
        """Take down one cut."""
        self.cuts += 1
        if faults:
            self.faults += 1
            facts = {"case": case, "mode": mode, "at": at, "operation": operation}
            print(json.dumps(facts | {"faults": faults[:8]}), flush=True)


def sweep_case(
    case: Case, words: list[str], world: World, options: argparse.Namespace, totals: Totals
) -> None:
    """Cut a command off at every operation, or at some, in every mode; the base has been made for
    it.
    """
    world.reset()
    start = time.monotonic()
    reference = run(words, world.path)
    if reference.status not in (0, 4):
        raise SystemExit(f"{case.name}: status {reference.status}: {reference.err[-2000:]}")
    took = time.monotonic() - start
    log = world.path.with_suffix(".log").read_text().splitlines()
    expected = snapshot(world.path)
    chosen = sample_operations(log, options.sample)
    mine = [n for i, n in enumerate(chosen) if i % options.parts == options.part]
    for mode in filter(None, options.mode.split(",")):
        for at in mine:
            if mode != "kill" and log[at - 1].split()[0] not in GROWING:
                continue
            world.reset()
            cut = run(words, world.path, at, mode)
            faults = refusal_faults(cut, world.path) if mode != "kill" else []
            if mode == "kill" and cut.status != -signal.SIGKILL:
                faults.append(f"not killed: status {cut.status}: {cut.err[-300:]}")
            again = run(words, world.path)
            if (again.status, again.out) != (reference.status, reference.out):
                said = (again.err.strip().splitlines() or again.out.splitlines() or [""])[-1][:300]
                faults.append(f"asked again: status {again.status}: {said}")
            faults += differences(expected, snapshot(world.path))
            totals.note(case.name, mode, at, log[at - 1], faults)
    for chain in range(options.part, options.chains, options.parts):
        world.reset()
        again = follow_chain(case.name, words, world, chain, totals)
        faults = differences(expected, snapshot(world.path))
        if (again.status, again.out) != (reference.status, reference.out):
            faults.append(f"in the end: status {again.status}: {again.err.strip()[-300:]}")
        totals.note(case.name, "chain", chain, "end", faults)
    seconds = time.monotonic() - start
    print(
        f"{case.name}: {len(log)} operations, {len(mine) if options.mode else 0} of them here, "
        f"{took:.1f} s a run, {seconds:.0f} s",
        flush=True,
    )


def follow_chain(name: str, words: list[str], world: World, seed: int, totals: Totals) -> Outcome:
    """Cut a command off, go on with it and cut it off a few operations later, up to its end.

    Returns how it ended.
    """
    draws = random.Random(f"{name} {seed}")
    while True:
        at, mode = draws.randint(1, STRIDE), draws.choice(("kill", "kill", "full"))
        outcome = run(words, world.path, at, mode)
        log = world.path.with_suffix(".log").read_text().splitlines()
        if len(log) < at:
            return outcome
        # What was killed before may still lie about.
        faults = [f for f in refusal_faults(outcome, world.path) if not f.startswith("left")]
        if mode == "kill":
            faults = [] if outcome.status == -signal.SIGKILL else [f"status {outcome.status}"]
        totals.note(name, f"chain {seed}, {mode}", at, log[at - 1], faults)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mode", default="kill,full,once")
    parser.add_argument("--chains", type=int, default=0, help="of each case")
    parser.add_argument("--only", default="")
    parser.add_argument("--sample", type=int, default=0, help="operations a case; 0: all")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    return parser.parse_args()


def import_everything() -> None:
    """Import every module of bezoar, so that forks need not; none of them looks for garbage in what
    they share.
    """
    for module in pkgutil.walk_packages(bezoar.__path__, "bezoar."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    gc.freeze()


def needed_cases(only: set[str]) -> set[str]:
    """The cases that are asked for, and those whose runs they read."""
    names = set(only)
    for case in reversed(CASES):
        if case.name in names:
            names |= set(case.after)
    return names


def run_all(options: argparse.Namespace) -> int:
    """-> the exit status."""
    folder = options.folder.absolute() / f"kills{options.part}"
    shutil.rmtree(folder, ignore_errors=True)
    only = set(options.only.split(",")) if options.only else {case.name for case in CASES}
    world, totals, names = make_base(folder), Totals(), {"paper": "carlini2022/sources"}
    import_everything()
    for case in CASES:
        if case.name not in needed_cases(only):
            continue
        if case.name == "shadows":
            for i in range(5):
                names[f"clean{i}"] = copy_encoder(world, names["tower"], i)
                names[f"attacked{i}"] = copy_encoder(world, names["inject"], 10 + i)
        words = [word.format(**names) for word in case.words]
        if case.name in only:
            sweep_case(case, words, world, options, totals)
        if any(case.name in other.after for other in CASES):
            world.reset()
            before = (
                set(os.listdir(world.path / "runs")) if (world.path / "runs").is_dir() else set()
            )
            outcome = run(words, world.path)
            assert outcome.status in (0, 4), outcome.err
            (names[case.name],) = set(os.listdir(world.path / "runs")) - before
            world.keep()
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{totals.cuts} cuts, {totals.faults} left something behind")
    return 1 if totals.faults else 0


if __name__ == "__main__":
    sys.exit(run_all(arguments()))
