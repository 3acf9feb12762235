"""runs.ask"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bezoar import registry
from bezoar.errors import UserError
from bezoar.runs.run import Run

Input = (
    typing.Any
)  # a spec, the start of a run's name, a Run, or a verb (or a Trial) that stands for its run


@dataclass(frozen=True)
class Takes:
    """What a verb's field is given: `data`, `encoder`, `run`, or a kind of method (of a `bank` too, a run may hold it)."""

    what: str


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


def typed(value: Any) -> Any:
    """What the user wrote, in JSON."""
    if isinstance(value, Run):
        return value.name
    if isinstance(value, (tuple, list)):
        return [typed(v) for v in value]
    if isinstance(value, Trial):
        return {**typed(value.verb), "seed": value.seed}
    if dataclasses.is_dataclass(value) and hasattr(value, "work"):
        return {
            "verb": verb_name(value),
            **{f.name: typed(getattr(value, f.name)) for f in dataclasses.fields(value)},
        }
    return value if isinstance(value, (str, int, float, bool, type(None))) else registry.spec(value)


def _fields(verb: Any) -> dict[str, tuple[str | None, Any]]:
    hints = typing.get_type_hints(type(verb), include_extras=True)
    marks = {f.name: getattr(hints[f.name], "__metadata__", ()) for f in dataclasses.fields(verb)}
    return {
        k: (next((m.what for m in own if isinstance(m, Takes)), None), getattr(verb, k))
        for k, own in marks.items()
    }
