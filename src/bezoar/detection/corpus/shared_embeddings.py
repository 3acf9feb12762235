"""Embeddings that scans of one data set with one encoder share, whatever detectors they ask for.

They lie in a hidden folder of the runs directory, an entry for each question; the files of a run
are hard links to those of its entry, so that either can be deleted and both cost the disk once. An
entry that no run holds any more goes with the next scan. Beside the vectors lie the scores of the
detectors that were asked, which depend on the same and on their own specs.

An entry's name depends on a secret of the user's own. In a folder of runs that somebody else made,
nothing is called what a question of this user is: a stranger's vectors and scores are never read.
"""

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bezoar import registry
from bezoar.data.files.artefacts import parse_json, read_text
from bezoar.data.files.tensors import read_tensors, write_tensors
from bezoar.data.files.writing import make_folder, remove_debris, remove_folder, write_whole
from bezoar.detection.corpus.assembly import DONE, SKIPPED
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.runs.execute import lock_folder
from bezoar.runs.run import Run
from bezoar.runs.verb import fingerprint

SHARED = ".embeddings"  # folder of the runs directory
LOCK = ".lock"
SECRET = "embeddings.key"  # file of the user's state folder
SECRET_BYTES = 32
SCORES = "scores"  # folder of an entry
VECTORS = "vectors"  # folder of an entry, and of a run
UNFINISHED = 2  # entries that are not whole and are kept, besides the one in use
EMBEDDING_CODE = ("data", "encoders", "detection/corpus")  # folders that vectors depend on
SCORING_CODE = ("detection", "evaluation", "training", "encoders", "data")


@dataclass(frozen=True)
class Entry:
    """The folder of one question: data, encoder and device."""

    folder: Path  # takes the files

    @property
    def vectors(self) -> Path:
        """The folder of the vectors, as a run has it."""
        return self.folder / VECTORS

    @property
    def skipped(self) -> Path:
        """The list of what was not read."""
        return self.folder / SKIPPED

    @property
    def is_done(self) -> bool:
        """Whether all vectors are there."""
        return (self.vectors / DONE).is_file()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process at a time into the entry."""
        make_folder(self.folder.parent)
        make_folder(self.folder)
        with lock_folder(self.folder):
            yield

    def clear(self) -> None:
        """Forget everything."""
        for name in (VECTORS, SCORES):
            remove_folder(self.folder / name)
        self.skipped.unlink(missing_ok=True)

    def link_into(self, run: Path) -> None:
        """Give a run what there is; copies where links cannot be made. `done.json` comes last."""
        remove_folder(run / VECTORS)
        (run / SKIPPED).unlink(missing_ok=True)
        if self.skipped.exists():
            _link(self.skipped, run / SKIPPED)
        if not self.is_done:
            return
        make_folder(run / VECTORS)
        for path in self.vectors.iterdir():
            if path.name != DONE:
                _link(path, run / VECTORS / path.name)
        _link(self.vectors / DONE, run / VECTORS / DONE)

    def load_scores(self, detector: Any, ids: Sequence[str]) -> Scores | None:
        """The scores that a detector gave before; None where there are none, or spoilt ones."""
        path = self._scores_path(detector)
        if not path.is_file():
            return None
        try:
            tensors = read_tensors(path)
            notes = tensors.pop("notes", None)
            facts = None if notes is None else parse_json(bytes(notes.numpy()).decode(), path)
            return Scores(ids, notes=facts, **tensors)
        except (UserError, ValueError, TypeError):
            return None

    def store_scores(self, detector: Any, scores: Scores, ids: Sequence[str]) -> None:
        """Keep what a detector gave, in the order of the records; nothing if it is of others."""
        if len(scores) != len(ids):
            return
        try:
            scores = scores.select(ids)
        except KeyError:
            return
        names = [f.name for f in dataclasses.fields(scores) if f.name not in ("ids", "notes")]
        tensors = {name: getattr(scores, name) for name in names}
        if scores.notes is not None:
            text = np.frombuffer(json.dumps(scores.notes).encode(), np.uint8)
            tensors["notes"] = torch.from_numpy(text.copy())
        path = self._scores_path(detector)
        with self.lock():
            remove_debris(self.folder)
            make_folder(path.parent)
            write_tensors(path, {name: t for name, t in tensors.items() if t is not None})

    def _scores_path(self, detector: Any) -> Path:
        """Return where the scores of a configured detector lie."""
        question = {
            "detector": registry.spec(detector),
            "source": registry.source_hash(type(detector)),
            "code": code_hash(SCORING_CODE),
            "files": fingerprint(registry.input_files(detector)),
        }
        return self.folder / SCORES / f"{_digest(question)}.safetensors"


def find_entry(runs: Path, ask: dict[str, Any], inputs: Sequence[Any], device: str) -> Entry:
    """The entry for what a scan asks.

    Args:
        ask: The `ask` of the scan's manifest, of which data and encoder count.
        inputs: The same as runs or methods.
        device: What it is computed on: `cpu` or `cuda`.
    """
    outputs = {run.name: run.manifest["outputs"] for run in inputs if isinstance(run, Run)}
    question = {
        "data": ask["data"],
        "encoder": ask["encoder"],
        "outputs": outputs,
        "device": device,
        "torch": torch.__version__,
        "code": code_hash(EMBEDDING_CODE),
        "secret": read_secret(),
    }
    return Entry(runs / SHARED / _digest(question))


def read_secret() -> str:
    """The user's secret, made where there is none; that of this process without a folder."""
    try:
        path = registry.state_folder() / SECRET
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, new_secret())
            path.chmod(0o600)
        secret = read_text(path, 4 * SECRET_BYTES)
    except (OSError, RuntimeError, UserError):
        secret = ""
    return secret if len(secret) == 2 * SECRET_BYTES else _secret_of_process()


def new_secret() -> str:
    """A text that nobody can foresee."""
    return secrets.token_hex(SECRET_BYTES)


@functools.cache
def _secret_of_process() -> str:
    return new_secret()


def remove_unused(entry: Entry) -> None:
    """Remove the other entries that no run holds, and all but the newest that are not whole.

    Entries that a process works on stay.
    """
    others = (f for f in entry.folder.parent.iterdir() if f != entry.folder and not f.is_symlink())
    unfinished: list[Path] = []
    for folder in others:
        with suppress(OSError):
            done = folder / VECTORS / DONE
            if not done.exists():
                unfinished.append(folder)
            elif done.stat().st_nlink == 1:
                _remove_idle(folder)
    with suppress(OSError):
        unfinished.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in unfinished[UNFINISHED:]:
        _remove_idle(folder)


def _remove_idle(folder: Path) -> None:
    """Remove an entry that no process works on."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with suppress(OSError), os.fdopen(os.open(folder / LOCK, flags, 0o666), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_folder(folder)


@functools.cache
def code_hash(folders: tuple[str, ...]) -> str:
    """Hash (sha256, 16 digits) the code of some of the package's folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((registry.PACKAGE / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _digest(question: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]


def _link(path: Path, target: Path) -> None:
    """Link a file to where a run has it, or copy it where links cannot be made."""
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError:
        shutil.copyfile(path, target, follow_symlinks=False)
