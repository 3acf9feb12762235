"""Runs a verb: resolves its fields, works in a new directory, and writes the manifest."""

import dataclasses
import fcntl
import hashlib
import json
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bezoar import registry
from bezoar.data.files.paths import encodable
from bezoar.data.files.writing import TEMPORARY, refuse_unwritable, remove_debris, write_json
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure
from bezoar.progress import Progress
from bezoar.runs import reading
from bezoar.runs.devices import describe_environment, select_device
from bezoar.runs.run import CHECKPOINT, MANIFEST, PAGE, SCHEMA, UNHASHED, Run
from bezoar.runs.verb import (
    Settings,
    Trial,
    Verb,
    check_verb,
    find_inner_runs,
    fingerprint,
    input_fields,
    input_to_json,
    is_verb,
    resolve_text,
    verb_name,
)
from bezoar.terminal import warn
from bezoar.training.ranks import share_work

MAX_SEED = (1 << 32) - 1  # the largest that every generator takes


@dataclass
class Job:
    """A verb at work."""

    folder: Path  # directory for its files
    settings: Settings  # how it is run
    inputs: dict[str, Any]  # for each field its value: a Run, a configured method, or a plain value
    progress: Progress  # how far it is
    notes: dict[str, Any] = field(default_factory=dict)  # `notes` of the manifest
    # the attacker's goals for the run's artefact; None means those of the parents
    goals: list[dict[str, Any]] | None = None
    # runs that this one has run; they become its parents too
    child_runs: list[Run] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.settings.seed

    @property
    def device(self) -> torch.device:
        """The device that was requested."""
        return select_device(self.settings.device)

    def run(self, verb: Verb) -> Run:
        """Run another verb with this run's settings; its run becomes a parent of this one."""
        run = execute(verb, dataclasses.replace(self.settings, fresh=False))
        if run.name not in [child.name for child in self.child_runs]:
            self.child_runs.append(run)
        return run

    def reporter(self, name: str) -> Callable[..., None]:
        """Make a function `report(done, total, text="")` that shows progress of a part."""

        def report(done: int, total: int, text: str = "") -> None:
            self.progress.step(done, total, ": ".join(filter(None, (name, text))))

        return report


def execute(verb: Verb, settings: Settings) -> Run:
    """Run a verb, or return the run that already answers it. The verbs in its fields are run first.

    A run that was cut off or failed continues from its checkpoint, unless `settings.fresh`.

    Raises:
        UserError: if the user's input is at fault, or a file cannot be read or written.
    """
    verb = find_inner_runs(check_verb(verb), settings.runs)
    select_device(settings.device)
    if not 0 <= settings.seed <= MAX_SEED:
        raise UserError(f"seed must be 0 or more, below 2**32; got {settings.seed}")
    if encodable(str(settings.runs)) != str(settings.runs):
        raise UserError(f"runs must stand in a folder named in UTF-8; got {settings.runs}")
    inputs, ask = resolve_inputs(verb, settings)
    digest = hashlib.sha256(json.dumps(ask, sort_keys=True).encode()).hexdigest()[:10]
    run = Run(settings.runs / f"{verb_name(verb)}-{digest}")
    if _is_answered(run, settings):
        return run
    with refuse_unwritable(run.path):
        if run.path.is_symlink():
            raise UserError(f"{run.path} is a link; a run is written into a folder of its own")
        run.path.mkdir(parents=True, exist_ok=True)
        with lock_folder(run.path):
            if _is_answered(run, settings):
                return run  # another process has just answered it
            remove_debris(run.path)
            if settings.fresh or not run.is_done:
                if settings.fresh:
                    (run.path / CHECKPOINT).unlink(missing_ok=True)
                title = getattr(verb, "title", verb_name(verb))
                job = Job(run.path, settings, inputs, Progress(settings.quiet, title))
                _work(verb, job, ask)
            if settings.finish is not None:
                settings.finish(run)
    return run


def _is_answered(run: Run, settings: Settings) -> bool:
    """Whether a run is complete: it is done, and has a page if one is wanted."""
    has_page = settings.finish is None or os.path.lexists(run.path / PAGE)
    return not settings.fresh and run.is_done and has_page


def _work(verb: Verb, job: Job, ask: dict[str, Any]) -> None:
    """Do the verb's work. The manifest says `running` during it, and afterwards how it ended."""
    parents = list(_runs_among(job.inputs.values()))
    manifest = _first_manifest(verb, job.settings, ask, parents)
    inherited_goals = _distinct(goal for run in parents for goal in run.manifest["goal"])
    write_json(job.folder / MANIFEST, {**manifest, "goal": inherited_goals, "metrics": {}})
    start = time.monotonic()
    status, error = "done", None
    metrics: Mapping[str, Measure] = {}
    try:
        with (
            job.progress,
            share_work(_order_for_ranks(verb, job, ask, parents)),
            reading.collect_reports() as reports,
        ):
            metrics = verb.work(job)
        job.notes |= reading.incomplete_notes(reports, job.notes, job.child_runs)
    except KeyboardInterrupt:
        status, error = "interrupted", "stopped by the user; ask again to go on"
        raise
    except BaseException as problem:
        status, error = "failed", f"{type(problem).__name__}: {problem}"
        raise
    finally:
        if status != "done":
            remove_debris(job.folder)  # of workers that were ended in the middle of a file
        manifest |= {
            "status": status,
            "error": error,
            "parents": [run.name for run in [*parents, *job.child_runs]],
            "goal": inherited_goals if job.goals is None else job.goals,
            "metrics": {name: measure.json() for name, measure in metrics.items()},
            "notes": job.notes,
            "outputs": _hash_outputs(job.folder) if status == "done" else {},
            "environment": describe_environment(job.device),
            "seconds": round(time.monotonic() - start, 2),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        write_json(job.folder / MANIFEST, manifest)


def _first_manifest(
    verb: Verb, settings: Settings, ask: dict[str, Any], parents: list[Run]
) -> dict[str, Any]:
    elsewhere = [run for run in parents if not run.path.parent.samefile(settings.runs)]
    return {
        "schema": SCHEMA,
        "bezoar": version("bezoar"),
        "verb": verb_name(verb),
        "status": "running",
        "ask": ask,
        "typed": {f.name: input_to_json(getattr(verb, f.name)) for f in dataclasses.fields(verb)},
        "parents": [run.name for run in parents],
        "elsewhere": {run.name: str(run.path.absolute()) for run in elsewhere},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _order_for_ranks(
    verb: Verb, job: Job, ask: dict[str, Any], parents: list[Run]
) -> dict[str, Any] | None:
    """The message by which other ranks join a joint verb; see `torchrun.assist`."""
    if not getattr(verb, "joint", False):
        return None
    return {
        "verb": verb_name(verb),
        "ask": ask,
        "seed": job.settings.seed,
        "device": job.settings.device,
        "runs": str(job.settings.runs),
        "paths": {run.name: str(run.path) for run in parents},
        "folder": str(job.folder),
    }


def _runs_among(values: Iterable[Any]) -> Iterator[Run]:
    for value in values:
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Run):
                yield item


def _distinct(goals: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal once: two parents may come from one poisoning."""
    distinct: list[dict[str, Any]] = []
    for goal in goals:
        if goal not in distinct:
            distinct.append(goal)
    return distinct


def resolve_inputs(verb: Verb, settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Resolve a verb's fields. Verbs among them are run.

    Returns:
        For each field a Run, a configured method or a plain value (or a tuple of these); and `ask`
        of the manifest, which names them with the hashes of their files.
    """
    inputs: dict[str, Any] = {}
    ask: dict[str, Any] = {
        "verb": verb_name(verb),
        "seed": settings.seed,
        "version": version("bezoar"),
    }
    for name, (what, value) in input_fields(verb).items():
        if value is None or not what:
            inputs[name] = ask[name] = value
        elif isinstance(value, (tuple, list)):
            pairs = [_resolve(item, what, settings) for item in value]
            inputs[name] = tuple(item for item, _ in pairs)
            ask[name] = [identity for _, identity in pairs]
        else:
            inputs[name], ask[name] = _resolve(value, what, settings)
    if hasattr(verb, "files") and (files := verb.files()):  # files that its plain fields name
        ask["files"] = fingerprint(files)
    return inputs, ask


def _resolve(value: Any, what: str, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """Resolve one value: a run or configured method, and its entry in `ask`."""
    if isinstance(value, Trial):
        settings = dataclasses.replace(settings, seed=value.seed)
        value = value.verb
    if is_verb(value):
        value = execute(value, settings)
    if isinstance(value, (str, Path)):
        registry.allow(str(value))  # the user wrote it, unlike a spec that a file holds
        value = resolve_text(str(value), what, settings.runs)
    if isinstance(value, Run):
        if (status := value.manifest["status"]) != "done":
            raise UserError(f"run {value.name} is {status}, not done; ask for it again first")
        return value, {"run": value.name}
    identity = {"spec": registry.spec(value), "source": registry.source_hash(type(value))}
    if files := registry.input_files(value):
        identity["files"] = fingerprint(files)
    return value, identity


def _hash_outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file of a run, except those that change when nothing else does."""
    outputs = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file() or path.suffix == TEMPORARY:
            continue
        if UNHASHED.isdisjoint(path.relative_to(folder).parts):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            outputs[str(path.relative_to(folder))] = {
                "bytes": path.stat().st_size,
                "sha256": digest,
            }
    return outputs


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Let one process at a time use a folder; the lock ends with the process."""
    # Neither a link is followed, nor a pipe waited on.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(folder / ".lock", flags, 0o666), "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            warn(f"waiting for another process in {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
