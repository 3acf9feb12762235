"""Prints untrusted text: shortened, and without terminal escapes.

Names of files and columns, captions, verdicts and statuses come from files that anybody may have
written. All output of bezoar goes through here.
"""

import json
import sys
import unicodedata
from typing import TextIO

LONGEST = 4000  # characters of a line
TAIL = 500  # characters from the end of a text that is shortened, which names the choices
# Categories of characters that no line holds as they are: controls, formats (among them those that
# turn the direction of text), surrogates, separators of lines and paragraphs.
UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
JOINERS = "\u200c\u200d"  # part of words in Persian and Hindi, and of emoji


def clean_line(text: object, longest: int = LONGEST) -> str:
    """One line of text: control characters are escaped, and long texts are shortened."""
    line = str(text)
    if len(line) > longest:
        tail = min(TAIL, longest // 2)
        line = f"{line[: longest - tail]} ... ({len(line):,} characters) ... {line[-tail:]}"
    if line.isascii() and line.isprintable():
        return line
    return "".join(map(_printable, line))


def print_line(text: object, file: TextIO | None = None) -> None:
    """Print one line of a text, cleaned, at once; to stdout where no file is given."""
    print(clean_line(text), file=sys.stdout if file is None else file, flush=True)


def clean_json(text: str) -> str:
    """A JSON text whose control characters are escaped as in JSON; its value is unchanged."""
    if text.isascii() and "\x7f" not in text:
        return text
    return "".join(
        json.dumps(c)[1:-1] if c != "\n" and unicodedata.category(c) in UNPRINTABLE else c
        for c in text
    )


def warn(text: object) -> None:
    """Print one line of a text on stderr, cleaned."""
    print_line(text, sys.stderr)


def _printable(character: str) -> str:
    if unicodedata.category(character) not in UNPRINTABLE or character in JOINERS:
        return character
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
