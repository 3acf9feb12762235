"""runs.ask"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bezoar import registry
from bezoar.errors import UserError
from bezoar.runs.run import Run

# A spec, the start of a run's name, a Run, or a verb (or a Trial) that stands for its run.
Input = typing.Any


@dataclass(frozen=True)
class Takes:
    """What a verb's field takes.

    what: `data`, `encoder`, `run`, or a kind of method; a `bank` may also be a run that holds one. "" for a plain value.
    positional: whether the command line takes it without an option's name.
    """

    what: str = ""
    positional: bool = False


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
    finish: Callable[[Run], Any] | None = None  # called with a run that is done: writes its page
    workers: int = 0  # of a sweep; 0: one a core, or one a GPU
    ray: bool = False  # whether a sweep runs on Ray


def input_files(configured: Any) -> Any:
    """The files a method reads: those it lists itself (a path, or a name and a path), or those that its text fields name."""
    if hasattr(configured, "files"):
        return configured.files()
    texts = [v for v in vars(configured).values() if isinstance(v, str) and v]
    return [Path(t) for t in texts if Path(t).suffix and os.path.isfile(t)]


def spec_of_path(kind: str, text: str) -> str:
    """A bare path stands for the reader its looks call for: tars are shards, .csv a table, .npy embeddings, .json a bank."""
    path = Path(text.partition(":")[0])
    if ":" in text or text in registry.method_names(kind):
        return text
    readers = dict.fromkeys((".csv", ".tsv", ".jsonl", ".parquet"), "table") | {
        ".npz": "npz",
        ".json": "file",
    }
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


def input_to_json(value: Any) -> Any:
    """What the user wrote, in JSON."""
    if isinstance(value, Run):
        return value.name
    if isinstance(value, (tuple, list)):
        return [input_to_json(v) for v in value]
    if isinstance(value, Trial):
        return {**input_to_json(value.verb), "seed": value.seed}
    if dataclasses.is_dataclass(value) and hasattr(value, "work"):
        return {
            "verb": verb_name(value),
            **{f.name: input_to_json(getattr(value, f.name)) for f in dataclasses.fields(value)},
        }
    return value if isinstance(value, (str, int, float, bool, type(None))) else registry.spec(value)


def input_fields(verb: Any) -> dict[str, tuple[str, Any]]:
    """A verb's fields -> what each takes ("" for a plain value), and its value."""
    return {
        name: (mark.what, getattr(verb, name)) for name, mark in field_marks(type(verb)).items()
    }


def positional_fields(verb: type) -> tuple[str, ...]:
    """The fields that the command line takes without an option's name, in order."""
    return tuple(name for name, mark in field_marks(verb).items() if mark.positional)


def field_marks(verb: type) -> dict[str, Takes]:
    """What each field of a verb takes; a plain value where nothing is said."""
    hints = typing.get_type_hints(verb, include_extras=True)
    metadata = {
        f.name: getattr(hints[f.name], "__metadata__", ()) for f in dataclasses.fields(verb)
    }
    return {
        name: next((mark for mark in notes if isinstance(mark, Takes)), Takes())
        for name, notes in metadata.items()
    }
