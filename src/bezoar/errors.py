"""The exception for mistakes in the user's input, and what is said of other exceptions."""

import difflib
from collections.abc import Iterable
from pathlib import Path

# How torch begins the message that explains how to unpickle a file all the same.
INVITATION = "Weights only load failed"


class UserError(Exception):
    """The user's input is at fault, not the program.

    The message is one line that names what was expected and what exists. The command line prints it and exits with 2.
    """


class UnwritableError(UserError):
    """A file cannot be written: the disk is full, say. It is not what was asked that is at fault.

    Who goes on without what was refused must not go on after this: the same command, asked again, can do it.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class where it has none.

    Torch's invitation to unpickle a file that it refuses is not handed on.
    """
    text = str(error).strip() or type(error).__name__
    return "it holds more than tensors" if INVITATION in text else text.splitlines()[0]


def suggest(name: str, names: Iterable[str]) -> str:
    """` (did you mean NAME?)` with the name that is most like what was written; "" where none is like it."""
    near = difflib.get_close_matches(name[:100], list(names), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def expand_home(path: str) -> Path:
    """The path with `~` or `~user` at its beginning replaced. Raises UserError for a user whom nobody knows."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such home directory") from error
