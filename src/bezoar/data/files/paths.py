"""data.files.paths"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from bezoar.data.files.skipped import Unreadable
from bezoar.errors import UserError

FILE_BYTES = 64 << 20  # one encoded image
TEXT_BYTES = 4 << 20  # one caption or one metadata object


def read_file(path: Path, limit: int = FILE_BYTES) -> bytes:
    """A regular file's content, at most `limit` bytes. Raises Unreadable; never waits on a pipe or reads a device."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise Unreadable("not a regular file")
        if found.st_size > limit:
            raise Unreadable(f"too large: {found.st_size} bytes")
        with path.open("rb") as file:
            return file.read(limit)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise Unreadable(f"no such file: {getattr(error, 'strerror', None) or error}") from error


def existing_file(path: str, what: str) -> Path:
    """The path of a file that is there. Raises UserError."""
    found = Path(path).expanduser()
    if not os.path.isfile(found):
        raise UserError(f"no {what} {path!r}")
    return found


def existing_folder(path: str, what: str) -> Path:
    """The path of a folder that is there. Raises UserError."""
    found = Path(path).expanduser()
    if not os.path.isdir(found):
        raise UserError(f"no {what} {path!r}")
    return found


def is_confined(text: str) -> bool:
    """Whether a relative path stays inside the folder it is relative to (by its text; links are the user's own)."""
    depth = 0
    for part in PurePosixPath(text.replace("\\", "/")).parts:
        depth += -1 if part == ".." else 0 if part == "." else 1
        if depth < 0 or part == "/":
            return False
    return depth > 0


def distinct_stems(paths: Sequence[Path]) -> tuple[str, ...]:
    """What each file is called in ids: as few trailing parts of its path as tell all of them apart, less its ending where that
    is not all that does."""
    whole = [p.absolute() for p in paths]
    for ended in ([p.with_suffix("") for p in whole], whole):
        parts = [tuple(map(encodable, p.parts)) for p in ended]
        for depth in range(1, max(map(len, parts)) + 1):
            stems = tuple("/".join(p[-depth:]) for p in parts)
            if len(set(stems)) == len(stems):
                return stems
    twice = Counter(whole).most_common(1)[0][0]
    raise UserError(f"a file is named twice among {len(paths)}, such as {twice}")


def encodable(name: str) -> str:
    """A file's name as text that can be written: bytes that are not UTF-8 are spelt out."""
    return name.encode(errors="backslashreplace").decode()
