"""The exceptions for mistakes in the user's input, and texts about other exceptions."""

import difflib
from collections.abc import Iterable
from pathlib import Path

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


def expand_home(path: str) -> Path:
    """The path with a leading `~` or `~user` replaced. Raises UserError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such home directory") from error
