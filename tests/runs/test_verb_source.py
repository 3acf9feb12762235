"""What the command line reads of a verb's source text is what the verb is."""

import ast
import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any, Literal

import pytest

from bezoar.errors import UserError
from bezoar.runs.verb import field_marks, load_verb, verb_names
from bezoar.runs.verb_source import read_docstring, read_type, read_verb


def command_line_type(hint: Any) -> Any:
    """The type of a field whose inputs are texts."""
    hint = typing.get_args(hint)[0]
    if hint == tuple[Any, ...]:
        return tuple[str, ...]
    return str if hint is Any else hint


@pytest.mark.parametrize("name", verb_names())
def test_the_source_text_says_what_the_class_is(name):
    source, verb = read_verb(name), load_verb(name)
    fields = dataclasses.fields(verb)
    hints = typing.get_type_hints(verb, include_extras=True)
    assert [f.name for f in source.fields] == [f.name for f in fields]
    assert [f.default for f in source.fields] == [f.default for f in fields]
    assert [f.takes for f in source.fields] == list(field_marks(verb).values())
    assert [f.type for f in source.fields] == [command_line_type(hints[f.name]) for f in fields]
    assert all(f.help and f.help in hints[f.name].__metadata__ for f in source.fields)
    assert source.doc == read_docstring(name) == verb.__doc__.replace("\n    ", "\n").rstrip()
    assert source.class_variables == {n: getattr(verb, n) for n in source.class_variables}
    assert bool(source.class_variables.get("fail_on")) == hasattr(verb, "fails")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int", int),
        ("Path", Path),
        ("Input", str),
        ("str | None", str | None),
        ("tuple[float, ...]", tuple[float, ...]),
        ("Literal['a', 'b']", Literal["a", "b"]),
        ("Kind", Literal["c"]),
    ],
)
def test_types_of_annotations(text, expected):
    module = ast.parse("Kind = Literal['c']")
    assert read_type(ast.parse(text, mode="eval").body, module) == expected


@pytest.mark.parametrize("text", ["complex", "dict[str, int]", "tuple[int, int]", "exit()"])
def test_other_types_are_refused(text):
    with pytest.raises(ValueError, match="knows no type"):
        read_type(ast.parse(text, mode="eval").body, ast.parse(""))


def test_an_unknown_verb_is_refused():
    with pytest.raises(UserError, match="no verb 'os'; there are: audit"):
        load_verb("os")


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["list"], ["scan", "--help"], ["scan"]]
)
def test_the_command_line_checks_arguments_before_it_imports_torch(words):
    code = (
        "import sys; from bezoar.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
