"""Atomic writing: a file appears under its name when it is complete, or not at all."""

import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bezoar.errors import UnwritableError, UserError

TEMPORARY = ".tmp"  # the ending of files that are not yet whole


@contextmanager
def whole_file(path: Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Open a file to be written in full; it takes its name when the block ends without error.

    It is written under a name that nobody can foresee, created anew and never through a link, and
    removed if the block fails.

    Args:
        path: where the file is to stand; an older one is replaced.
        mode: `w` for text in UTF-8, `wb` for bytes.
        options: further options of `open`, `newline` say.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}{TEMPORARY}")
    if "b" not in mode:
        # File names that are not UTF-8 hold lone surrogates; they are written as JSON spells them.
        options = {"encoding": "utf-8", "errors": "backslashreplace", **options}
    try:
        with temporary.open(mode.replace("w", "x"), **options) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a text (UTF-8) or bytes; see `whole_file`."""
    with whole_file(path, "w" if isinstance(content, str) else "wb") as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """Write one small JSON file; see `whole_file`."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def make_folder(path: Path) -> None:
    """Make a folder of a run where there is none. A link in its place is removed."""
    if path.is_symlink():
        path.unlink()
    path.mkdir(parents=True, exist_ok=True)


def own_folder(path: Path) -> Path:
    """The path of a folder of a run. Raises UserError for a link in its place."""
    if path.is_symlink():
        raise UserError(f"{path} is a link; expected a folder of the run")
    return path


def remove_folder(path: Path) -> None:
    """Remove a folder of a run with what is in it; of a link in its place, the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_debris(folder: Path) -> None:
    """Remove what an attempt that was killed has left of files that were not yet whole."""
    for path in list(folder.rglob("*")):
        if path.suffix == TEMPORARY and (path.is_symlink() or path.is_file()):
            path.unlink(missing_ok=True)


def remove_debris_of(path: Path) -> None:
    """Remove what killed attempts have left of one file, beside files of the user."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*{TEMPORARY}"):
        middle = leftover.name.removeprefix(f"{path.name}.").removesuffix(TEMPORARY)
        if re.fullmatch(r"[0-9a-f]{12}", middle):
            leftover.unlink(missing_ok=True)


@contextmanager
def refuse_unwritable(path: Path) -> Iterator[None]:
    """Inside, an OSError becomes an UnwritableError of one line that names a file or this path."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "null byte" not in str(error):
            raise
        name, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        if name is None or str(name).endswith(TEMPORARY):
            name = path
        raise UnwritableError(f"{name}: {reason or error}") from error
