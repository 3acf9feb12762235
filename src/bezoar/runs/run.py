"""Run: a directory that answers one question, its manifest, its parents; execute, find, resume.

The directory's name is the verb and a hash of everything asked (`ask`): the same question has one answer on disk.
"""

from __future__ import annotations

import dataclasses
import fcntl
import glob
import hashlib
import json
import os
import resource
import sys
import time
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bezoar import registry
from bezoar.runs.environment import environment
from bezoar.errors import UserError
from bezoar.progress import Progress
from bezoar.training.ranks import device, shared

SCHEMA = 1
MANIFEST, CHECKPOINT = "manifest.json", "checkpoint.safetensors"
UNHASHED = {MANIFEST, "report.html", "log.jsonl", ".lock", CHECKPOINT, "vectors"}  # files, and folders


@dataclass(frozen=True)
class Takes:
    """What a verb's field is given: `data`, `encoder`, `run`, or a kind of method (of a `bank` too, a run may hold it)."""

    what: str


Input = typing.Any  # a spec, the start of a run's name, a Run, or a verb (or a Trial) that stands for its run


@dataclass(frozen=True)
class Trial:
    """A verb, and the seed that it and all it is made from are run with; what it is made from may be trials with their own."""

    verb: Any
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    """How verbs are run, whatever they ask."""

    runs: Path = Path("runs")
    seed: int = 0
    device: str = "auto"
    fresh: bool = False
    quiet: bool = False
    page: bool = True  # whether a page is written; `bezoar show` writes one that is missing
    workers: int = 0  # of a sweep; 0: one a core, or one a GPU
    ray: bool = False  # whether a sweep runs on Ray


@dataclass(frozen=True)
class Run:
    """A finished or unfinished run on disk."""

    path: Path

    @property
    def name(self) -> str:
        """verb-hash."""
        return self.path.name

    @property
    def manifest(self) -> dict:
        """The manifest as it stands. Raises UserError when the directory is no run."""
        try:
            raw = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} is not a run directory: no readable {MANIFEST} in it") from error
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA or "verb" not in raw:
            raise UserError(f"{self.path}/{MANIFEST} is not of schema {SCHEMA}")
        return raw

    @property
    def verb(self) -> str:
        """Which verb made it."""
        return self.manifest["verb"]

    def file(self, name: str) -> Path:
        """A file of the run. Raises UserError when it is not there."""
        path = self.path / name
        if not path.exists():
            raise UserError(f"run {self.name} holds no {name} (status: {self.manifest['status']})")
        return path

    def metric(self, name: str) -> Any:
        """A Measure by name. Raises UserError that lists the names there are."""
        from bezoar.evaluation.scores import Measure

        metrics = self.manifest["metrics"]
        if name not in metrics:
            raise UserError(f"run {self.name} has no metric {name!r}; it has: {', '.join(sorted(metrics)) or 'none'}")
        return Measure(**metrics[name])

    @property
    def parents(self) -> list[Run]:
        """The runs this one was made from."""
        return [self.beside(name) for name in self.manifest["parents"]]

    def beside(self, name: str) -> Run:
        """A run that this one was made from: in the same directory, or where the manifest says that it lay."""
        here = self.path.parent / name
        return Run(here if here.exists() else Path(self.manifest.get("elsewhere", {}).get(name, here)))

    def ancestor(self, verb: str) -> Run | None:
        """This run or the nearest one it was made from, of the given verb."""
        above = (parent.ancestor(verb) for parent in self.parents)
        return self if self.verb == verb else next(filter(None, above), None)


def find(runs: Path, text: str) -> Run | None:
    """A run by directory or by the start of its name. None when there is none; UserError when there are several."""
    path = Path(text)
    if os.path.isfile(path / MANIFEST):  # Path.is_file raises for a text that no name can be
        return Run(path)
    if not text or "/" in text or ":" in text:
        return None
    matches = sorted(p.parent for p in runs.glob(f"{glob.escape(text)}*/{MANIFEST}"))
    if len(matches) > 1:
        raise UserError(f"{text!r} begins the names of {len(matches)} runs: {', '.join(p.name for p in matches[:4])}")
    return Run(matches[0]) if matches else None


def named(runs: Path, text: str) -> Run:
    """A run that must be there. Raises UserError that names the newest ones that are."""
    if run := find(runs, text):
        return run
    there = [p.parent.name for p in sorted(runs.glob(f"*/{MANIFEST}"), key=lambda p: p.stat().st_mtime, reverse=True)]
    told = ", ".join(there[:6]) + (f", ... ({len(there)})" if len(there) > 6 else "")
    raise UserError(f"no run {text!r} in {runs}; there are: {told or 'none'}")


@dataclass
class Job:
    """One verb at work: where its files go, what it was given, and how to say how far it is."""

    folder: Path
    settings: Settings
    inputs: dict[str, Any]
    progress: Progress
    notes: dict[str, Any] = field(default_factory=dict)  # goes into the manifest as `notes`
    goals: list[dict] | None = None  # set by a verb that changes them; otherwise inherited
    made: list[Run] = field(default_factory=list)  # runs that this one ran; they are parents too

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.settings.seed

    def run(self, verb: Any) -> Run:
        """Run another verb, with this run's settings, as a parent of this run."""
        made = execute(verb, dataclasses.replace(self.settings, fresh=False))
        if made.name not in [r.name for r in self.made]:
            self.made.append(made)
        return made

    @property
    def device(self) -> Any:
        """The torch device asked for."""
        return device(self.settings.device)


def execute(verb: Any, settings: Settings) -> Run:
    """Run a verb, or return the run that already answers it. Nested verbs are run first.

    A run that was cut off, or failed, is gone on with from what it kept; a fresh one keeps nothing.
    """
    device(settings.device)
    if not 0 <= settings.seed < 1 << 32:  # what every generator that is used takes
        raise UserError(f"seed must be 0 or more, below 2**32; got {settings.seed}")
    inputs, ask = resolve(verb, settings)
    name = f"{verb_name(verb)}-{hashlib.sha256(json.dumps(ask, sort_keys=True).encode()).hexdigest()[:10]}"
    folder = settings.runs / name
    run = Run(folder)
    if not settings.fresh and (folder / MANIFEST).exists() and run.manifest["status"] == "done":
        return run
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not settings.fresh and (folder / MANIFEST).exists() and run.manifest["status"] == "done":
                return run  # another process has just answered it
            if settings.fresh:
                (folder / CHECKPOINT).unlink(missing_ok=True)
            return _work(verb, settings, inputs, ask, run)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from error


def _work(verb: Any, settings: Settings, inputs: dict[str, Any], ask: dict, run: Run) -> Run:
    parents = [r for v in inputs.values() for r in (v if isinstance(v, tuple) else (v,)) if isinstance(r, Run)]
    job = Job(run.path, settings, inputs, Progress(settings.quiet, verb_name(verb)))
    manifest = {
        "schema": SCHEMA,
        "bezoar": version("bezoar"),
        "verb": verb_name(verb),
        "status": "running",
        "ask": ask,
        "typed": {f.name: typed(getattr(verb, f.name)) for f in dataclasses.fields(verb)},
        "parents": [r.name for r in parents],
        "elsewhere": {r.name: str(r.path.absolute()) for r in parents if not r.path.parent.samefile(settings.runs)},
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
        order = {"verb": verb_name(verb), "ask": ask, **common} if getattr(verb, "joint", False) else None
        with job.progress, shared(order):
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
            "parents": [r.name for r in [*parents, *job.made]],
            "goal": goals if job.goals is None else job.goals,
            "metrics": {k: m.json() for k, m in metrics.items()},
            "notes": job.notes,
            "outputs": _outputs(run.path) if status == "done" else {},
            "environment": environment(job.device),
            "seconds": round(time.monotonic() - start, 2),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        _write(run.path, manifest)
    if settings.page:
        from bezoar.reports import page

        page.write(run)
    return run


def resolve(verb: Any, settings: Settings) -> tuple[dict[str, Any], dict]:
    """A verb's fields -> what they stand for (Run, configured method, plain value), and the `ask` that names them."""
    inputs: dict[str, Any] = {}
    ask: dict[str, Any] = {"verb": verb_name(verb), "seed": settings.seed, "version": version("bezoar")}
    for name, (what, value) in _fields(verb).items():
        if value is None or what is None:
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
        must = what == "run" or (what == "encoder" and ":" not in str(value) and not str(value).endswith(".py"))
        if must and os.path.isfile(value):
            raise UserError(f"no run {str(value)!r}; weights are imported:path=FILE, a classifier's classifier:path=FILE")
        run = (named if must else find)(settings.runs, str(value))
        kind = "network" if what == "encoder" else what
        value = run or registry.make(kind, _spec(kind, str(value)))
    elif isinstance(value, (str, Path)):
        value = registry.make(what, str(value))
    if isinstance(value, Run):
        if (status := value.manifest["status"]) != "done":
            raise UserError(f"run {value.name} is {status}, not done; ask for it again first")
        return value, {"run": value.name}
    asked = {"spec": registry.spec(value), "source": registry.source_hash(type(value))}
    if files := named_files(value):
        asked["files"] = fingerprint(files)
    return value, asked


def named_files(configured: Any) -> Any:
    """The files a method reads: those it lists itself (a path, or a name and a path), or those that its text fields name."""
    if hasattr(configured, "files"):
        return configured.files()
    texts = [v for v in vars(configured).values() if isinstance(v, str) and v]
    return [Path(t) for t in texts if Path(t).suffix and os.path.isfile(t)]


def _spec(kind: str, text: str) -> str:
    """A bare path stands for the reader its looks call for: tars are shards, .csv a table, .npy embeddings, .json a bank."""
    path = Path(text.partition(":")[0])
    if ":" in text or text in registry.names(kind):
        return text
    readers = dict.fromkeys((".csv", ".tsv", ".jsonl", ".parquet"), "table") | {".npz": "npz", ".json": "file"}
    if path.suffix in readers:
        return f"{readers[path.suffix]}:path={text}"
    if text.endswith(".tar"):
        return f"shards:path={text}"
    if path.suffix == ".npy" or os.path.isdir(path / "img_emb"):
        return f"embeddings:path={text}"
    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm"):
        return f"image:path={text}"
    if os.path.isdir(path):
        return f"shards:path={text}/*.tar" if any(path.glob("*.tar")) else f"folder:path={text}"
    if "/" in text and path.suffix != ".py":
        raise UserError(f"no file or folder {text!r}")
    return text


def fingerprint(files: Iterable[Path | tuple[str, Path]]) -> str:
    """sha256 over names, sizes and contents; of files beyond 64 MiB, 64 pieces of a MiB, evenly spread, stand for the whole."""
    total = hashlib.sha256()
    for name, path in ((f.name, f) if isinstance(f, Path) else f for f in files):
        size = path.stat().st_size
        total.update(f"{name}:{size}:".encode("utf-8", "surrogateescape"))
        with path.open("rb") as f:
            if size <= 64 << 20:
                total.update(f.read())
                continue
            for i in range(64):
                f.seek(i * (size - (1 << 20)) // 63)
                total.update(f.read(1 << 20))
    return total.hexdigest()[:16]


def verb_name(verb: Any) -> str:
    """`Poison(...)` -> `poison`."""
    return type(verb).__name__.lower()


def typed(value: Any) -> Any:
    """What the user wrote, in JSON."""
    if isinstance(value, Run):
        return value.name
    if isinstance(value, (tuple, list)):
        return [typed(v) for v in value]
    if isinstance(value, Trial):
        return {**typed(value.verb), "seed": value.seed}
    if dataclasses.is_dataclass(value) and hasattr(value, "work"):
        return {"verb": verb_name(value), **{f.name: typed(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    return value if isinstance(value, (str, int, float, bool, type(None))) else registry.spec(value)


def _fields(verb: Any) -> dict[str, tuple[str | None, Any]]:
    hints = typing.get_type_hints(type(verb), include_extras=True)
    marks = {f.name: getattr(hints[f.name], "__metadata__", ()) for f in dataclasses.fields(verb)}
    return {k: (next((m.what for m in own if isinstance(m, Takes)), None), getattr(verb, k)) for k, own in marks.items()}


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
