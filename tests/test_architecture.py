"""Who may import whom: the rules of ARCHITECTURE.md, read off the folders and the import
statements.
"""

import ast
import functools
import statistics
from pathlib import Path

import pytest

import bezoar
from bezoar import registry

SRC = Path(bezoar.__file__).parent
FILES = sorted(SRC.rglob("*.py"))
GROUND = {"errors", "registry", "method_source", "progress", "machine", "terminal"}
LOW = ["ground", "data", "encoders", "training", "attacks", "evaluation"]  # in this order
SIDE_BY_SIDE = ["runs", "auditing", "repair"]

MAY_IMPORT = {wing: set(LOW[:place]) for place, wing in enumerate(LOW)}
MAY_IMPORT |= {wing: set(LOW) for wing in SIDE_BY_SIDE}
MAY_IMPORT["detection"] = {*LOW, "runs"}
MAY_IMPORT["verbs"] = {*LOW, *SIDE_BY_SIDE, "detection"}
MAY_IMPORT["reports"] = MAY_IMPORT["papers"] = MAY_IMPORT["verbs"] | {"verbs"}
MAY_IMPORT["cli"] = MAY_IMPORT["reports"] | {"reports"}
MAY_IMPORT["__main__"] = MAY_IMPORT["__init__"] = MAY_IMPORT["cli"] | {"papers", "cli"}


def module_name(path: Path) -> str:
    """`data.files.tars` for data/files/tars.py; `data.files` for the `__init__` of the folder."""
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def wing_of(module: str) -> str:
    first = module.partition(".")[0]
    return "ground" if first in GROUND else first


@functools.cache
def imports_of(module: str) -> frozenset[str]:
    """The modules of bezoar that a module imports, anywhere in its file."""
    imported = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bezoar":
            base = (node.module or "").removeprefix("bezoar").removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".strip(".")
                imported.add(name if name in MODULES else base or "__init__")
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("bezoar.")]
            imported |= {name.removeprefix("bezoar.") for name in names}
    return frozenset(imported)


def method_modules() -> set[str]:
    """Every file that holds a method."""
    return {
        f"{folder}/{name}".replace("/", ".")
        for kind, folder in registry.KINDS.items()
        for name in registry.method_names(kind)
    }


def circles(graph: dict[str, frozenset[str]]) -> list[list[str]]:
    """The strongly connected components with more than one member (Tarjan 1972)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for neighbour in graph.get(node, ()):
            if neighbour not in number:
                visit(neighbour)
                lowest[node] = min(lowest[node], lowest[neighbour])
            elif neighbour in stack:
                lowest[node] = min(lowest[node], number[neighbour])
        if lowest[node] == number[node]:
            place = stack.index(node)
            components.append(stack[place:])
            del stack[place:]

    for node in graph:
        if node not in number:
            visit(node)
    return [component for component in components if len(component) > 1]


def functions() -> list[tuple[str, int]]:
    """Every function of the source with its length in lines."""
    return [
        (f"{path.relative_to(SRC)}: {node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def test_every_folder_is_a_wing_with_a_place_in_the_order():
    folders = {path.parent.name for path in SRC.glob("*/__init__.py")}
    assert folders == MAY_IMPORT.keys() - {"ground", "__main__", "__init__"}


def test_the_top_level_has_few_modules():
    assert len(list(SRC.glob("*.py"))) <= 8


@pytest.mark.parametrize("wing", sorted(MAY_IMPORT))
def test_a_wing_imports_the_wings_below_it(wing):
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        if wing_of(module) == wing
        for other in imports_of(module)
        if wing_of(other) not in MAY_IMPORT[wing] | {wing}
    ]
    assert not wrong


def test_the_reader_of_foreign_files_stands_alone():
    for module in MODULES:
        if module.startswith("data.files"):
            others = {n for n in imports_of(module) if not n.startswith("data.files")}
            assert others <= {"errors"}, module


def test_methods_never_import_methods():
    methods = method_modules()
    assert methods <= MODULES.keys()
    wrong = {m: imports_of(m) & methods for m in methods if imports_of(m) & methods}
    assert not wrong


def test_circles_are_seen():
    graph = {"a": frozenset("b"), "b": frozenset("ca"), "c": frozenset("d"), "d": frozenset()}
    assert [sorted(circle) for circle in circles(graph)] == [["a", "b"]]


def test_no_modules_import_each_other_in_a_circle():
    assert not circles({module: imports_of(module) for module in MODULES})


def test_functions_are_short():
    lengths = functions()
    assert not [f"{name}, {length} lines" for name, length in lengths if length > 60]
    assert statistics.median(length for _, length in lengths) < 12


def test_files_are_short():
    lengths = {str(path.relative_to(SRC)): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > 500}
