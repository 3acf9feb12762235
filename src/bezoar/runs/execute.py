"""runs.execute"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bezoar import registry
from bezoar.errors import UserError
from bezoar.machine import describe_environment, select_device
from bezoar.progress import Progress
from bezoar.runs.run import CHECKPOINT, MANIFEST, SCHEMA, UNHASHED, Run, find_run, get_run
from bezoar.runs.verb import (
    Settings,
    Trial,
    fingerprint,
    input_fields,
    input_files,
    input_to_json,
    spec_of_path,
    verb_name,
)
from bezoar.training.ranks import share_work


@dataclass
class Job:
    """One verb at work: where its files go, what it was given, and how to say how far it is."""

    folder: Path
    settings: Settings
    inputs: dict[str, Any]
    progress: Progress
    notes: dict[str, Any] = field(default_factory=dict)  # goes into the manifest as `notes`
    goals: list[dict] | None = None  # set by a verb that changes them; otherwise inherited
    child_runs: list[Run] = field(
        default_factory=list
    )  # runs that this one ran; they are parents too

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.settings.seed

    def run(self, verb: Any) -> Run:
        """Run another verb, with this run's settings, as a parent of this run."""
        made = execute(verb, dataclasses.replace(self.settings, fresh=False))
        if made.name not in [r.name for r in self.child_runs]:
            self.child_runs.append(made)
        return made

    @property
    def device(self) -> Any:
        """The torch device asked for."""
        return select_device(self.settings.device)


def execute(verb: Any, settings: Settings) -> Run:
    """Run a verb, or return the run that already answers it. Nested verbs are run first.

    A run that was cut off, or failed, is gone on with from what it kept; a fresh one keeps nothing.
    """
    select_device(settings.device)
    if not 0 <= settings.seed < 1 << 32:  # what every generator that is used takes
        raise UserError(f"seed must be 0 or more, below 2**32; got {settings.seed}")
    inputs, ask = resolve_inputs(verb, settings)
    name = f"{verb_name(verb)}-{hashlib.sha256(json.dumps(ask, sort_keys=True).encode()).hexdigest()[:10]}"
    folder = settings.runs / name
    run = Run(folder)
    if not settings.fresh and (folder / MANIFEST).exists() and run.manifest["status"] == "done":
        return run
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if (
                not settings.fresh
                and (folder / MANIFEST).exists()
                and run.manifest["status"] == "done"
            ):
                return run  # another process has just answered it
            if settings.fresh:
                (folder / CHECKPOINT).unlink(missing_ok=True)
            return _work(verb, settings, inputs, ask, run)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from error


def _work(verb: Any, settings: Settings, inputs: dict[str, Any], ask: dict, run: Run) -> Run:
    parents = [
        r
        for v in inputs.values()
        for r in (v if isinstance(v, tuple) else (v,))
        if isinstance(r, Run)
    ]
    job = Job(run.path, settings, inputs, Progress(settings.quiet, verb_name(verb)))
    manifest = {
        "schema": SCHEMA,
        "bezoar": version("bezoar"),
        "verb": verb_name(verb),
        "status": "running",
        "ask": ask,
        "typed": {f.name: input_to_json(getattr(verb, f.name)) for f in dataclasses.fields(verb)},
        "parents": [r.name for r in parents],
        "elsewhere": {
            r.name: str(r.path.absolute())
            for r in parents
            if not r.path.parent.samefile(settings.runs)
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    start, error, metrics = time.monotonic(), None, {}
    goals: list[dict] = []
    for goal in (g for r in parents for g in r.manifest["goal"]):
        if goal not in goals:  # two parents may come from one poisoning
            goals.append(goal)
    _write(run.path, {**manifest, "goal": goals, "metrics": {}})
    try:
        # how the other ranks take part in a joint verb: `torchrun.assist`
        common = {"seed": settings.seed, "device": settings.device, "runs": str(settings.runs)}
        common |= {"paths": {r.name: str(r.path) for r in parents}, "folder": str(run.path)}
        order = (
            {"verb": verb_name(verb), "ask": ask, **common}
            if getattr(verb, "joint", False)
            else None
        )
        with job.progress, share_work(order):
            metrics = verb.work(job)
        status = "done"
    except KeyboardInterrupt:
        status, error = "interrupted", "stopped by the user; ask again to go on"
        raise
    except BaseException as problem:
        status, error = "failed", f"{type(problem).__name__}: {problem}"
        raise
    finally:
        manifest |= {
            "status": status,
            "error": error,
            "parents": [r.name for r in [*parents, *job.child_runs]],
            "goal": goals if job.goals is None else job.goals,
            "metrics": {k: m.json() for k, m in metrics.items()},
            "notes": job.notes,
            "outputs": _outputs(run.path) if status == "done" else {},
            "environment": describe_environment(job.device),
            "seconds": round(time.monotonic() - start, 2),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        _write(run.path, manifest)
    if settings.finish is not None:
        settings.finish(run)
    return run


def resolve_inputs(verb: Any, settings: Settings) -> tuple[dict[str, Any], dict]:
    """A verb's fields -> what they stand for (Run, configured method, plain value), and the `ask` that names them."""
    inputs: dict[str, Any] = {}
    ask: dict[str, Any] = {
        "verb": verb_name(verb),
        "seed": settings.seed,
        "version": version("bezoar"),
    }
    for name, (what, value) in input_fields(verb).items():
        if value is None or not what:
            inputs[name], ask[name] = value, value
        elif isinstance(value, (tuple, list)):
            parts = [_resolve(v, what, settings) for v in value]
            inputs[name], ask[name] = tuple(p[0] for p in parts), [p[1] for p in parts]
        else:
            inputs[name], ask[name] = _resolve(value, what, settings)
    if hasattr(verb, "files") and (files := verb.files()):  # that its plain fields name
        ask["files"] = fingerprint(files)
    return inputs, ask


def _resolve(value: Any, what: str, settings: Settings) -> tuple[Any, dict]:
    if isinstance(value, Trial):
        value, settings = value.verb, dataclasses.replace(settings, seed=value.seed)
    if dataclasses.is_dataclass(value) and hasattr(value, "work"):
        value = execute(value, settings)
    if isinstance(value, (str, Path)):
        registry.allow(str(value))  # the user's own word, unlike a spec that a file holds
    if what in ("data", "encoder", "run", "bank") and isinstance(value, (str, Path)):
        must = what == "run" or (
            what == "encoder" and ":" not in str(value) and not str(value).endswith(".py")
        )
        if must and os.path.isfile(value):
            raise UserError(
                f"no run {str(value)!r}; weights are imported:path=FILE, a classifier's classifier:path=FILE"
            )
        run = (get_run if must else find_run)(settings.runs, str(value))
        kind = "network" if what == "encoder" else what
        value = run or registry.make(kind, spec_of_path(kind, str(value)))
    elif isinstance(value, (str, Path)):
        value = registry.make(what, str(value))
    if isinstance(value, Run):
        if (status := value.manifest["status"]) != "done":
            raise UserError(f"run {value.name} is {status}, not done; ask for it again first")
        return value, {"run": value.name}
    asked = {"spec": registry.spec(value), "source": registry.source_hash(type(value))}
    if files := input_files(value):
        asked["files"] = fingerprint(files)
    return value, asked


def _outputs(folder: Path) -> dict[str, dict]:
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".tmp"):
        if UNHASHED.isdisjoint(path.relative_to(folder).parts):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            out[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    return out


def _write(folder: Path, manifest: dict) -> None:
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    # what is not UTF-8 in a file's name is a lone surrogate, and so stands as JSON spells it
    (folder / "manifest.tmp").write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(folder / "manifest.tmp", folder / MANIFEST)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time in a run; the lock goes with the process, however it ends."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process in {folder}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
