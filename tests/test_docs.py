"""What the documents say is so: modules, kinds, commands, methods, links."""

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
from test_architecture import SRC

import bezoar
from bezoar import registry
from bezoar.cli import main
from bezoar.cli.forms import list_examples

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES)
MADE = {(ROOT / "docs/kinds" / f"{kind}.md").resolve() for kind in ("index", *registry.KINDS)}
KIND_ROW = re.compile(r"^\| (\w+) \|", re.MULTILINE)
VERBS = sorted(path.stem for path in (SRC / "verbs").glob("[!_]*.py"))
NOT_VERBS = ("list", "runs", "show", "verify", "completion")  # these have no --dry


def read_document(name: str) -> str:
    path = ROOT / name
    return path.read_text() if path.exists() else pytest.skip(f"{name} is not beside the tests")


def code_blocks(name: str) -> list[str]:
    """The blocks of a document that are not of a named language."""
    return [text for language, text in blocks(read_document(name)) if not language]


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and text of each block of a document."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[list[str]]:
    """Every `bezoar ...` line of a document's blocks as arguments, without comments."""
    return commands_of("".join(code_blocks(name)))


def commands_of(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("bezoar ")]


def described_modules() -> dict[str, set[str]]:
    """Folder -> the modules that ARCHITECTURE's tree names in it."""
    tree = code_blocks("ARCHITECTURE.md")[0]
    modules: dict[str, set[str]] = {"": set()}
    path: list[str] = [""]
    for line in tree.splitlines()[1:]:
        if folder := re.match(r"( {2,4})(\w+)/ ", line):
            path = [*path[: len(folder[1]) // 2 - 1], folder[2]]
            modules["/".join(path)] = set()
        else:
            modules["/".join(path)] |= set(line.split())
    return modules


def test_the_architecture_names_every_module_in_its_folder():
    described = described_modules()
    methods = {f"{folder}/" for folder in registry.KINDS.values()}
    for folder in [SRC, *(path.parent for path in SRC.rglob("__init__.py"))]:
        name = folder.relative_to(SRC).as_posix().removeprefix(".")
        modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
        if name == "reports/sections" or f"{name}/".startswith(tuple(methods)):
            modules = set()  # a module a verb, and a file a method: the folder's line says so
        if not name.startswith("papers/"):
            assert described.get(name) == modules, name or "src/bezoar"


def test_the_architecture_names_every_kind_in_its_folder():
    tree = code_blocks("ARCHITECTURE.md")[0]
    for kind, folder in registry.KINDS.items():
        assert re.search(rf"^ +{Path(folder).name}/ +KIND {kind}:", tree, re.MULTILINE), kind


def test_the_documents_name_every_kind_and_every_verb():
    for name in ("ARCHITECTURE.md", "CONTRIBUTING.md"):
        assert set(KIND_ROW.findall(read_document(name))) - {"kind"} == set(registry.KINDS), name
    for name in ("README.md", "docs/commands.md"):
        assert not [verb for verb in VERBS if f"bezoar {verb}" not in read_document(name)], name
    assert all(hasattr(getattr(bezoar, verb.title()), "work") for verb in VERBS)


def test_contributing_names_files_that_are_there():
    rows = re.findall(
        r"^\| \w+ \| `([\w/.]+)` \|.*\| `([\w/.]+)`", read_document("CONTRIBUTING.md"), re.M
    )
    assert len(rows) == len(registry.KINDS)
    for source, test in rows:
        assert (SRC / source).is_file(), source
        assert (ROOT / "tests" / test).is_file(), test


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    """`make docs` follows the anchors, too."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", read_document(name)):
        if "://" not in target:
            path = ((ROOT / name).parent / target).resolve()
            assert path.exists() or path in MADE, target


def test_the_readme_is_short_and_shows_a_page():
    text = read_document("README.md")
    assert len(text.splitlines()) <= 120
    (picture,) = re.findall(r"!\[.*?\]\((.*?\.png)\)", text)
    assert (ROOT / picture).stat().st_size < 150_000


@pytest.mark.parametrize("name", ["README.md", *PAGES])
def test_every_command_parses(name):
    for arguments in commands(name):
        check_command(arguments)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_examples_that_parse(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    printed = capsys.readouterr().out
    assert list_examples(verb)
    for example in list_examples(verb):
        assert f"\n  {example}\n" in printed
        check_command(shlex.split(example)[1:])


def check_command(arguments):
    """Verbs with --dry, which may miss files and runs of the reader's; the others with --help."""
    plain = arguments[0] in NOT_VERBS
    errors = io.StringIO()
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.redirect_stderr(errors),
    ):
        try:
            status = main([*arguments, "--help" if plain else "--dry"])
        except SystemExit as stop:  # help, or a mistake
            status = stop.code
    absent = re.search(
        r"bezoar: .*(no (file|folder|run|such)\b|could not be read under|are missing|no DIR/)",
        errors.getvalue(),
    )
    if status == 2 and absent:  # what the command names is the reader's
        return
    assert status in (0, None), (arguments, errors.getvalue())
    first = f"usage: bezoar {arguments[0]}" if plain else f"{arguments[0]}: "
    assert printed.getvalue().startswith(first), arguments


@pytest.mark.parametrize("name", ["README.md", *PAGES])
def test_the_python_of_a_page_compiles_and_imports_what_there_is(name):
    for language, code in blocks(read_document(name)):
        if language == "python":
            compile(code, name, "exec")
            for module, names in re.findall(r"^from (bezoar\S*) import (.*)", code, re.M):
                imported = importlib.import_module(module)
                assert all(hasattr(imported, n) for n in names.split(", ")), (module, names)
