"""Paths: files that must exist, paths that must stay inside a folder, and printable names."""

import errno
import glob
import io
import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from braceexpand import braceexpand

from bezoar.data.files.skipped import Unreadable
from bezoar.errors import UserError, describe_neighbours, expand_home

FILE_BYTES = 64 << 20  # the largest encoded image that is read
TEXT_BYTES = 4 << 20  # the largest caption or metadata object that is read
MAX_PATHS = 1_000_000  # the most files that a brace list may name
# Endings of images, in the order in which a record of a tar that has several is read.
IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "png", "webp", "jfif", "jpe", "bmp", "ppm", "pgm", "gif", "tif", "tiff",
)  # fmt: skip
IMAGE_SUFFIXES = frozenset(f".{extension}" for extension in IMAGE_EXTENSIONS)


def open_regular(path: Path, limit: int | None = None, links: bool = True) -> io.BufferedReader:
    """Open a regular file for reading: the one way in which files that others wrote are opened.

    Pipes, devices, sockets and folders are refused without waiting for them: a pipe that nobody
    writes to stalls the program for ever, and a device may have no end.

    Args:
        path: of the file.
        limit: the most bytes that it may hold; None for any number.
        links: whether a link in the last place is followed. A link that the user made is; in a run,
            which anybody may have made, none is.

    Raises:
        UserError: for anything else; it names the file and the reason.
    """
    try:
        file = os.fdopen(regular_descriptor(path, links), "rb")
    except (OSError, ValueError) as error:
        if not links and os.path.islink(path):
            raise UserError(f"{path} is a link; a run's files are read as they lie") from error
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error
    size = os.fstat(file.fileno()).st_size
    if limit is not None and size > limit:
        file.close()
        raise UserError(f"{path} holds {size} bytes; expected at most {limit}")
    return file


def check_regular(path: Path, limit: int | None = None, links: bool = True) -> Path:
    """A path for libraries that open files by name. Raises UserError, as `open_regular` does."""
    open_regular(path, limit, links).close()
    return path


def read_regular(path: Path, limit: int, links: bool = True) -> bytes:
    """Read a regular file of at most `limit` bytes. Raises UserError if it is another or larger."""
    with open_regular(path, limit, links) as file:
        content = file.read(limit + 1)  # it may grow meanwhile
    if len(content) > limit:
        raise UserError(f"{path} holds more than {limit} bytes")
    return content


def read_regular_text(path: Path, limit: int, links: bool = True) -> str:
    """Read a regular file of UTF-8, with a byte order mark or without one.

    Raises UserError, as `read_regular` does, or for other bytes.
    """
    try:
        return read_regular(path, limit, links).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8, at byte {error.start}") from error
    except (OSError, MemoryError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error


def read_file(path: Path, limit: int = FILE_BYTES) -> bytes:
    """Read one record's file, see `open_regular`. Raises Unreadable, also above `limit` bytes."""
    try:
        with open(regular_descriptor(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise Unreadable(f"too large: {size} bytes")
            return file.read(limit)
    except _NotRegularError as error:
        raise Unreadable("not a regular file") from error
    except (OSError, ValueError) as error:
        raise Unreadable(f"no such file: {_reason(error)}") from error


class _NotRegularError(OSError):
    """A pipe, a device, a socket or a folder stands where a file is expected."""


def regular_descriptor(path: Path | str, links: bool = True) -> int:
    """Open a file, see `open_regular`. Raises OSError, or ValueError for a NUL byte in the path."""
    # Without O_NONBLOCK opening a pipe waits for somebody to write to it. The status is that of
    # the open file, so that nothing can take its place in between.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    descriptor = os.open(path, flags if links else flags | os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _NotRegularError(errno.EINVAL, "it is not a regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def existing_file(path: str, what: str) -> Path:
    """Return the path of a file that exists. Raises UserError, which calls the file `what`."""
    expanded = expand_home(path)
    if not os.path.isfile(expanded):
        raise UserError(f"no {what} {path!r}{describe_neighbours(path)}")
    return expanded


def existing_folder(path: str, what: str) -> Path:
    """Return the path of a folder that exists. Raises UserError, which calls the folder `what`."""
    expanded = expand_home(path)
    if not os.path.isdir(expanded):
        raise UserError(f"no {what} {path!r}{describe_neighbours(path)}")
    return expanded


def expand_paths(text: str, what: str = "shards", ending: str = ".tar") -> tuple[Path, ...]:
    """Expand a path, a folder, a glob or a brace list into the files that it names.

    Args:
        text: for example `cc/{00000..00331}.tar`; braces may also hold commas. Globs are sorted,
            and a folder stands for its files with `ending`.
        what: what error messages call the files.
        ending: of the files that are looked for in a folder.

    Raises:
        UserError: if a file that is named is missing, or none is named.
    """
    for start, end in re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", text):
        if abs(int(end) - int(start)) > MAX_PATHS:  # braceexpand holds a range in memory
            raise UserError(f"{what} {text!r} names more than {MAX_PATHS} files")
    try:
        is_file = os.path.lexists(Path(text).expanduser())  # its name may hold braces itself
        expanded = [text] if is_file else braceexpand(text)
        names = list(itertools.islice(expanded, MAX_PATHS + 1))
    except ValueError as error:
        raise UserError(f"{what} {text!r}: {error}") from error
    if len(names) > MAX_PATHS:
        raise UserError(f"{what} {text!r} names more than {MAX_PATHS} files")
    paths: list[Path] = []
    for name in names:
        path = expand_home(name)
        if os.path.isdir(path):
            paths += sorted(path.glob(f"*{ending}"))
        elif os.path.exists(path) or not glob.has_magic(name):
            paths.append(path)
        else:
            paths += map(Path, sorted(glob.glob(str(path))))
    missing = [p for p in paths if not os.path.isfile(p)]
    if missing:
        raise UserError(
            f"{what} {text!r}: {len(missing)} of {len(paths)} are missing, the first is "
            f"{missing[0]}{describe_neighbours(str(missing[0]))}"
        )
    if not paths:
        folder = Path(text).expanduser()
        packed = (
            [p.name for p in folder.iterdir() if ending in p.suffixes] if folder.is_dir() else []
        )
        advice = f"; {min(packed)} must be unpacked first" if packed else ""
        raise UserError(f"{what} {text!r}: no such {ending} file{advice}")
    return tuple(paths)


def is_confined(text: str) -> bool:
    """Tell whether a relative path stays inside its folder by its text; links are not followed."""
    depth = 0
    for part in PurePosixPath(text.replace("\\", "/")).parts:
        if part == "..":
            depth -= 1
        elif part != ".":
            depth += 1
        if depth < 0 or part == "/":
            return False
    return depth > 0


def distinct_stems(paths: Sequence[Path]) -> tuple[str, ...]:
    """Name each file by as few trailing parts of its path as tell all of the files apart.

    The endings are left out unless they are needed too. Raises UserError if one file is named
    twice.
    """
    absolute = [p.absolute() for p in paths]
    for candidates in ([p.with_suffix("") for p in absolute], absolute):
        parts = [tuple(map(encodable, p.parts)) for p in candidates]
        for depth in range(1, max(map(len, parts)) + 1):
            stems = tuple("/".join(p[-depth:]) for p in parts)
            if len(set(stems)) == len(stems):
                return stems
    repeated = Counter(absolute).most_common(1)[0][0]
    raise UserError(f"a file is named twice among {len(paths)}, such as {repeated}")


def encodable(name: str) -> str:
    """Return a file name as text that can be written: bytes that are not UTF-8 are spelt out."""
    return name.encode(errors="backslashreplace").decode()


def printable(name: str) -> str:
    """Return a name with every character escaped that cannot be printed."""
    return name if name.isprintable() else ascii(name)[1:-1]
