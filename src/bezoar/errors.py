"""The exceptions for mistakes in the user's input, and texts about other exceptions."""

import difflib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

MAX_NEIGHBOURS, SHOWN_NEIGHBOURS = 10_000, 4  # names of a folder that are read, and shown

# How torch begins the message that explains how to unpickle a file all the same.
INVITATION = "Weights only load failed"


class UserError(Exception):
    """The user's input is wrong, not the program: the command line prints the message and exits
    with 2.

    The message is one line that names what was expected and what exists.
    """


class UnwritableError(UserError):
    """A file cannot be written, for example because the disk is full.

    Code that skips invalid input must not skip this: the same command can succeed later.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class if it has none.

    Torch's invitation to unpickle a file that it refuses is not handed on.
    """
    text = str(error).strip() or type(error).__name__
    return "it holds more than tensors" if INVITATION in text else text.splitlines()[0]


def suggest(name: str, names: Iterable[str]) -> str:
    """` (did you mean NAME?)` with the most similar name; "" if none is similar."""
    near = difflib.get_close_matches(name[:100], list(names), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def describe_neighbours(path: str) -> str:
    """What can be named in place of a path that does not exist.

    Returns:
        ` (did you mean PATH?)`, or `; FOLDER holds NAME, ...`; `; there is no folder FOLDER` where
        that is missing too; "" for an empty folder.
    """
    folder, name = os.path.split(path)
    try:
        with os.scandir(expand_home(folder or ".")) as entries:
            names = sorted(e.name for e in itertools.islice(entries, MAX_NEIGHBOURS))
    except (OSError, ValueError):
        return f"; there is no folder {folder[:100]}"
    if near := difflib.get_close_matches(name[:100], names, 1):
        return f" (did you mean {os.path.join(folder, near[0])}?)"
    shown = [n for n in names if not n.startswith(".")][: SHOWN_NEIGHBOURS + 1]
    listed = ", ".join([*shown[:SHOWN_NEIGHBOURS], *(["..."] if shown[SHOWN_NEIGHBOURS:] else [])])
    return f"; {folder or 'this folder'} holds {listed}" if shown else ""


def expand_home(path: str) -> Path:
    """The path with a leading `~` or `~user` replaced. Raises UserError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such home directory") from error
