"""What others wrote reaches the terminal cut, cleaned and as text."""

import json

import pytest

from bezoar import terminal
from bezoar.errors import first_line
from bezoar.progress import Progress


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred", r"a\x1b[31mred"),
        ("a\r\nb", r"a\r\nb"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\x9b\x7f\udc80\u2028", r"\x9b\x7f\udc80\u2028"),
        ("狗 café می\u200cخواهم", "狗 café می\u200cخواهم"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
    ],
)
def test_a_line_holds_nothing_that_a_terminal_obeys(text, shown):
    assert terminal.clean_line(text) == shown


def test_a_long_line_keeps_its_beginning_and_its_end():
    line = terminal.clean_line("begins " + "x" * 100_000 + " it has: a, b")
    assert len(line) < terminal.LONGEST + 60
    assert line.startswith("begins") and line.endswith("it has: a, b")


def test_json_is_cleaned_without_changing_its_value():
    value = {"a\u202e": ["\x9b", "\x7f", "\U000e0001", "狗"]}
    text = terminal.clean_json(json.dumps(value, ensure_ascii=False, indent=1))
    assert json.loads(text) == value
    assert not set(text) & {"\u202e", "\x9b", "\x7f", "\U000e0001"} and "狗" in text


def test_progress_prints_names_as_text(capsys, monkeypatch):
    progress = Progress(False, "scan")
    progress._last_print = -1e9
    progress.step(1, 2, "a\x1b[2J\n" + "x" * 10_000)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "\x1b" not in line and len(line) < 400


def test_torchs_invitation_to_unpickle_is_not_handed_on():
    error = RuntimeError("Weights only load failed. This file can still be loaded, to do so ...")
    assert first_line(error) == "it holds more than tensors"
