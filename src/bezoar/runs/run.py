"""Run: a directory that answers one question, its manifest, its parents; execute, find, resume.

The directory's name is the verb and a hash of everything asked (`ask`): the same question has one answer on disk.
"""

from __future__ import annotations

import glob
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bezoar.errors import UserError

SCHEMA = 1
MANIFEST, CHECKPOINT = "manifest.json", "checkpoint.safetensors"
UNHASHED = {
    MANIFEST,
    "report.html",
    "log.jsonl",
    ".lock",
    CHECKPOINT,
    "vectors",
}  # files, and folders


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
            raise UserError(
                f"{self.path} is not a run directory: no readable {MANIFEST} in it"
            ) from error
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
            raise UserError(
                f"run {self.name} has no metric {name!r}; it has: {', '.join(sorted(metrics)) or 'none'}"
            )
        return Measure(**metrics[name])

    @property
    def parents(self) -> list[Run]:
        """The runs this one was made from."""
        return [self.sibling(name) for name in self.manifest["parents"]]

    def sibling(self, name: str) -> Run:
        """A run that this one was made from: in the same directory, or where the manifest says that it lay."""
        here = self.path.parent / name
        return Run(
            here if here.exists() else Path(self.manifest.get("elsewhere", {}).get(name, here))
        )

    def ancestor(self, verb: str) -> Run | None:
        """This run or the nearest one it was made from, of the given verb."""
        above = (parent.ancestor(verb) for parent in self.parents)
        return self if self.verb == verb else next(filter(None, above), None)


def find_run(runs: Path, text: str) -> Run | None:
    """A run by directory or by the start of its name. None when there is none; UserError when there are several."""
    path = Path(text)
    if os.path.isfile(path / MANIFEST):  # Path.is_file raises for a text that no name can be
        return Run(path)
    if not text or "/" in text or ":" in text:
        return None
    matches = sorted(p.parent for p in runs.glob(f"{glob.escape(text)}*/{MANIFEST}"))
    if len(matches) > 1:
        raise UserError(
            f"{text!r} begins the names of {len(matches)} runs: {', '.join(p.name for p in matches[:4])}"
        )
    return Run(matches[0]) if matches else None


def get_run(runs: Path, text: str) -> Run:
    """A run that must be there. Raises UserError that names the newest ones that are."""
    if run := find_run(runs, text):
        return run
    there = [
        p.parent.name
        for p in sorted(runs.glob(f"*/{MANIFEST}"), key=lambda p: p.stat().st_mtime, reverse=True)
    ]
    told = ", ".join(there[:6]) + (f", ... ({len(there)})" if len(there) > 6 else "")
    raise UserError(f"no run {text!r} in {runs}; there are: {told or 'none'}")
