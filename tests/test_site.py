"""The site: its generated pages name every method and hold commands that parse; the board shows
what was published.
"""

import html
import re
import shlex
import sys
from pathlib import Path

import pytest
from test_docs import blocks, check_command, commands_of

from bezoar import registry
from bezoar.cli import main

ROOT = Path(__file__).parents[1]
if not (ROOT / "website").is_dir():
    pytest.skip("website/ is not beside the tests", allow_module_level=True)
sys.path.insert(0, str(ROOT / "website"))
import kind_pages  # noqa: E402

SMALL = {"scenes:count=2000": "scenes:count=300", "epochs=4": "epochs=1", "epochs=2": "epochs=1"}


@pytest.mark.parametrize("kind", registry.KINDS)
def test_the_page_of_a_kind_has_every_method_with_a_command_that_parses(kind):
    page = kind_pages.kind_page(kind)
    assert [b for b in re.findall(r"^## (\S+) ", page, re.M)] == registry.method_names(kind)
    commands = commands_of("".join(text for language, text in blocks(page) if not language))
    assert len(commands) >= len(registry.method_names(kind)) + 1
    for arguments in commands:
        check_command(arguments)


def test_a_docstring_and_its_signs_stay_what_they_are():
    assert kind_pages.markdown("a|b <c> `d_e|` *") == r"a|b &lt;c&gt; `d_e|` \*"
    assert kind_pages.markdown("of\n\n    x = 1\n    y = 2") == "of\n\n```python\nx = 1\ny = 2\n```"
    assert kind_pages.cell("a | b") == r"a \| b" and kind_pages.code("a | b") == r"`a \| b`"


def test_the_commands_page_lists_every_option():
    text = kind_pages.verb_parts()
    assert "| `--fail-on`" not in text  # an option of the command alone
    assert "| `--detector` | `detector` |" in text and "| `DATA` | `data` | needed |" in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", registry.KINDS)
def test_the_example_of_a_kind_runs(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = kind_pages.KINDS[kind]
    for command in (*example.before, example.command.format(example.method)):
        for text, smaller in SMALL.items():
            command = command.replace(text, smaller)
        assert main(shlex.split(command)[1:]) == 0, command


# The board


@pytest.fixture(scope="module")
def board():
    pytest.importorskip("msgspec")
    import board

    return board


def test_every_figure_of_the_board_stands_where_it_says(board):
    """With value, interval and n, under the name of the figure in that page's table of all
    figures.
    """
    pages = {}
    for name, claim in board.read_claims().items():
        for figure in claim.figures:
            page, _, place = figure.source.partition("#")
            path = ROOT / "docs" / page
            if path.suffix == ".md":
                headings = re.findall(r"^#+ (.*)", path.read_text(), re.M)
                assert place in [h.lower().replace(" ", "-").replace(",", "") for h in headings]
                continue
            if page not in pages:
                pages[page] = published_figures(path)
            value, low, high, n = pages[page][figure.key]
            assert (figure.value, figure.low, figure.high, figure.n) == (value, low, high, n), name


def published_figures(path):
    """Name -> value, ends of the interval and n, out of a page's table of all figures."""
    figures = {}
    for row in re.findall(r"<tr title=.*?</tr>", path.read_text(), re.DOTALL):
        key = html.unescape(re.search(r"<code>([^<]*)</code></span></td>", row)[1])
        cells = re.findall(r'<td class="num(?: strong)?">(.*?)</td>', row)
        value, interval, n = (re.sub(r"[^\d.–]", "", html.unescape(cell)) for cell in cells)
        figures[key] = (float(value), *map(float, interval.split("–")), int(n))
    return figures


def test_the_intervals_of_the_unseen_kinds_are_wilsons(board):
    from bezoar.evaluation.stats import wilson_interval

    figures = [f for c in board.read_claims().values() for f in c.figures if not f.key]
    assert len(figures) == 18
    for f in figures:
        low, high = wilson_interval(round(f.value * f.n), f.n)
        assert (f.low, f.high) == (pytest.approx(low, abs=6e-4), pytest.approx(high, abs=6e-4))


def test_the_board_shows_every_claim_and_says_what_was_not_measured(board):
    text = board.board_tables()
    for name, claim in board.read_claims().items():
        assert f"{{ #{name} }}" in text and f"](#{name})" in text
        for figure in claim.figures:
            assert f"`{figure.command}`" in text
    table = text.partition("\n\n</div>")[0]
    assert "not measured" in table and "**.996 → .007** (.004 to .011), n = 1,951" in table


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ("value = 1.1", "low <= value <= high"),
        ("n = 0", "n is at least 1"),
        ('column = "repairs"', "Invalid enum value"),
        ('command = "python x.py"', "must begin with"),
        ("extra = 1", "unknown field"),
    ],
)
def test_a_claim_of_another_form_is_refused_with_its_file(board, tmp_path, spoilt, message):
    text = (board.CLAIMS / "scenes-blend.toml").read_text()
    key = spoilt.partition(" =")[0]
    spoilt_text = re.sub(rf"^{key} = .*$", spoilt, text, count=1, flags=re.M)
    if spoilt_text == text:
        spoilt_text = f"{text}{spoilt}\n"
    (tmp_path / "mine.toml").write_text(spoilt_text)
    with pytest.raises(ValueError, match=message) as caught:
        board.read_claims(tmp_path)
    assert "mine.toml" in str(caught.value)


def test_a_column_is_not_measured_and_unmeasured_at_once(board, tmp_path):
    text = (board.CLAIMS / "scenes-blend.toml").read_text()
    (tmp_path / "mine.toml").write_text('unmeasured.scan = "no"\n' + text)
    with pytest.raises(ValueError, match="scan has figures"):
        board.read_claims(tmp_path)
