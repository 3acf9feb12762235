"""Whole files: what is written appears under its name when it is complete, or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

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
