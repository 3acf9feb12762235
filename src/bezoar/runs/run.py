"""A run: a directory that answers one question, its manifest, the runs it was made from, and how to find one.

The directory's name is the verb and a hash of everything that was asked (`ask` in the manifest), so that the same question
has one answer on disk.
"""

from __future__ import annotations

import glob
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bezoar.errors import UserError

if TYPE_CHECKING:
    from bezoar.evaluation.scores import Measure

SCHEMA = 1
MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint.safetensors"
# Files and folders of a run that its manifest does not list as outputs.
UNHASHED = {MANIFEST, CHECKPOINT, "report.html", "log.jsonl", ".lock", "vectors"}
MAX_NAMES = 6  # names of runs in an error message


@dataclass(frozen=True)
class Run:
    """A finished or unfinished run on disk."""

    path: Path

    @property
    def name(self) -> str:
        """The directory's name: the verb and a hash."""
        return self.path.name

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands on disk. Raises UserError where the directory is not a run."""
        try:
            raw = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = f"{self.path} is not a run directory: no readable {MANIFEST} in it"
            raise UserError(message) from error
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA or "verb" not in raw:
            raise UserError(f"{self.path}/{MANIFEST} is not of schema {SCHEMA}")
        return raw

    @property
    def verb(self) -> str:
        """The name of the verb that made the run."""
        return str(self.manifest["verb"])

    @property
    def is_done(self) -> bool:
        """Whether the run exists and is finished."""
        return (self.path / MANIFEST).exists() and self.manifest["status"] == "done"

    def file(self, name: str) -> Path:
        """The path of one of the run's files. Raises UserError where it does not exist."""
        path = self.path / name
        if not path.exists():
            raise UserError(f"run {self.name} holds no {name} (status: {self.manifest['status']})")
        return path

    def metric(self, name: str) -> Measure:
        """A metric by name. Raises UserError, which lists the names that there are, for an unknown one."""
        # Imported here so that `bezoar show` and `bezoar list` do without torch.
        from bezoar.evaluation.scores import Measure

        metrics = self.manifest["metrics"]
        if name not in metrics:
            names = ", ".join(sorted(metrics)) or "none"
            raise UserError(f"run {self.name} has no metric {name!r}; it has: {names}")
        return Measure(**metrics[name])

    @property
    def parents(self) -> list[Run]:
        """The runs that this one was made from."""
        return [self.sibling(name) for name in self.manifest["parents"]]

    def sibling(self, name: str) -> Run:
        """A run by name: in the same directory, or else where the manifest says that the parent of this name lies."""
        path = self.path.parent / name
        if path.exists():
            return Run(path)
        return Run(Path(self.manifest.get("elsewhere", {}).get(name, path)))

    def input_run(self, field: str) -> Run | None:
        """The run that was given for a field of the verb; None where the field's value is no run."""
        value = self.manifest["ask"].get(field)
        return self.sibling(value["run"]) if isinstance(value, dict) and "run" in value else None

    def ancestor(self, verb: str) -> Run | None:
        """This run if the verb made it, else the first such run among those that it was made from, depth first."""
        if self.verb == verb:
            return self
        candidates = (parent.ancestor(verb) for parent in self.parents)
        return next((run for run in candidates if run is not None), None)


def find_run(runs: Path, text: str) -> Run | None:
    """Find a run by its directory, or by the start of its name.

    Args:
        runs: the directory in which names are looked up.
        text: what the user wrote.

    Returns:
        The run; None where there is none.

    Raises:
        UserError: if several runs have names with this start.
    """
    path = Path(text)
    if os.path.isfile(path / MANIFEST):  # Path.is_file raises for a text that no name can be
        return Run(path)
    if not text or "/" in text or ":" in text:
        return None
    matches = sorted(p.parent for p in runs.glob(f"{glob.escape(text)}*/{MANIFEST}"))
    if len(matches) > 1:
        names = ", ".join(p.name for p in matches[:4])
        raise UserError(f"{text!r} begins the names of {len(matches)} runs: {names}")
    return Run(matches[0]) if matches else None


def get_run(runs: Path, text: str) -> Run:
    """Find a run as `find_run` does. Raises UserError, which names the newest runs, where there is none."""
    if run := find_run(runs, text):
        return run
    manifests = sorted(
        runs.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    names = ", ".join(path.parent.name for path in manifests[:MAX_NAMES])
    more = f", ... ({len(manifests)})" if len(manifests) > MAX_NAMES else ""
    raise UserError(f"no run {text!r} in {runs}; there are: {names or 'none'}{more}")
