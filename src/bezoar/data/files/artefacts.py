"""Files that runs are made of: manifests, plans, lists, verdicts and tensors, which anybody may
have written.

Only regular files are opened, never through a link in the last place, and no more is read than a
file of its kind may hold. Whatever is wrong is a UserError of one line that names the file. Imports
no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bezoar.data.files.paths import read_regular_text
from bezoar.errors import UserError

JSON_BYTES = 64 << 20  # of one JSON file
MAX_DIGITS = 20  # of a whole number, its sign included
LINES_BYTES = 1 << 30  # of a plan, a keep-list or a log


class Facts(dict[str, Any]):
    """A JSON object out of a file. A key that is not there is the file's fault: a UserError that
    names both.

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


def read_text(path: Path, limit: int = JSON_BYTES) -> str:
    """The text of a file in UTF-8. Raises UserError."""
    return read_regular_text(path, limit, links=False)


def read_lines(path: Path) -> list[str]:
    """The lines of a list of any length, without those that are empty. Raises UserError."""
    return [line for line in read_text(path, LINES_BYTES).split("\n") if line]


def read_json(path: Path) -> Any:
    """The value of a JSON file, its objects as Facts. Raises UserError."""
    return parse_json(read_text(path), path)


def read_facts(path: Path, links: bool = False) -> Facts:
    """The object of a JSON file. Raises UserError. links: see `paths.open_regular`."""
    value = parse_json(read_regular_text(path, JSON_BYTES, links), path)
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


def _whole_number(text: str) -> int:
    """A whole number of 64 bits. Raises ValueError for a longer one, which no float can hold."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def parse_json(text: str, path: Path) -> Any:
    """The value of a JSON text out of a file, its objects as Facts. Raises UserError."""
    try:
        return json.loads(
            text, object_hook=lambda content: Facts(content, path), parse_int=_whole_number
        )
    except (ValueError, RecursionError, MemoryError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path} cannot be read as JSON: {reason or 'too large'}") from error
