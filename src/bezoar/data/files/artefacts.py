"""Files that runs are made of: manifests, plans, lists, verdicts and tensors, which anybody may have written.

Only regular files are opened, never through a link in the last place, and no more is read than a file of its kind may hold.
Whatever is wrong is a UserError of one line that names the file. Imports no torch.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bezoar.errors import UserError

JSON_BYTES = 64 << 20  # of one JSON file
LINES_BYTES = 1 << 30  # of a plan, a keep-list or a log


class Facts(dict[str, Any]):
    """A JSON object out of a file. A key that is not there is the file's fault: a UserError that names both.

    Attributes:
        file: that it was read from.
    """

    def __init__(self, content: dict[str, Any], file: Path) -> None:
        super().__init__(content)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.file}: expected {key!r}; there is: {', '.join(self) or 'nothing'}")

    def text(self, key: str) -> str:
        """The text of a key. Raises UserError for anything else."""
        text: str = self._typed(key, str, "a text")
        return text

    def object(self, key: str) -> Facts:
        """The object of a key. Raises UserError for anything else."""
        facts: Facts = self._typed(key, Facts, "an object")
        return facts

    def objects(self, key: str) -> list[Facts]:
        """The list of objects of a key. Raises UserError for anything else."""
        objects: list[Facts] = self._list(key, Facts, "objects")
        return objects

    def texts(self, key: str) -> list[str]:
        """The list of texts of a key. Raises UserError for anything else."""
        texts: list[str] = self._list(key, str, "texts")
        return texts

    def _typed(self, key: str, kind: type[Any], name: str) -> Any:
        value = self[key]
        if not isinstance(value, kind):
            raise UserError(f"{self.file}: {key} must be {name}, not {shown(value)}")
        return value

    def _list(self, key: str, kind: type[Any], name: str) -> Any:
        value = self[key]
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise UserError(f"{self.file}: {key} must be a list of {name}, not {shown(value)}")
        return value


def shown(value: object) -> str:
    """A value of a file in a message: cut, and without a walk through all of it."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) < 60 else f"{text[:57]}..."


@contextmanager
def open_artefact(path: Path, limit: int, links: bool = False) -> Iterator[IO[bytes]]:
    """Open a regular file of at most `limit` bytes, as bytes, never waiting on a pipe.

    links: whether a link in the last place is followed, which is the user's own.

    Raises:
        UserError: for anything else.
    """
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags if links else flags | os.O_NOFOLLOW)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        if not links and os.path.islink(path):
            raise UserError(f"{path} is a link; a run's files are read as they lie") from error
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if state.st_size > limit:
            raise UserError(f"{path}: {state.st_size >> 20} MiB; expected {limit >> 20} at most")
        yield file


def read_text(path: Path, limit: int = JSON_BYTES) -> str:
    """The text of a file in UTF-8. Raises UserError."""
    with open_artefact(path, limit) as file:
        try:
            return file.read(limit).decode()
        except (OSError, UnicodeDecodeError, MemoryError) as error:
            raise UserError(f"{path} is no text in UTF-8") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a list of any length, without those that are empty. Raises UserError."""
    return [line for line in read_text(path, LINES_BYTES).split("\n") if line]


def read_json(path: Path) -> Any:
    """The value of a JSON file, its objects as Facts. Raises UserError."""
    return parse_json(read_text(path), path)


def read_facts(path: Path) -> Facts:
    """The object of a JSON file. Raises UserError."""
    value = read_json(path)
    if not isinstance(value, Facts):
        raise UserError(f"{path}: expected a JSON object, not {shown(value)}")
    return value


def read_facts_lines(path: Path) -> list[Facts]:
    """The objects of a JSON Lines file. Raises UserError."""
    objects = [parse_json(line, path) for line in read_lines(path)]
    for number, value in enumerate(objects, 1):
        if not isinstance(value, Facts):
            raise UserError(f"{path}: line {number}: expected a JSON object, not {shown(value)}")
    return objects


def parse_json(text: str, path: Path) -> Any:
    """The value of a JSON text out of a file, its objects as Facts. Raises UserError."""
    try:
        return json.loads(text, object_hook=lambda content: Facts(content, path))
    except (ValueError, RecursionError, MemoryError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path} cannot be read as JSON: {reason or 'too large'}") from error
