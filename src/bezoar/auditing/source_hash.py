"""A hash of Python source that comments, formatting and docstrings do not change."""

import ast
import hashlib
from collections.abc import Sequence
from pathlib import Path

from bezoar import registry


def hash_sources(path: Path, shared: Sequence[str]) -> str:
    """Hash (sha256, 16 digits) of a file and of the shared modules that it depends on.

    Args:
        shared: modules, without the leading `bezoar.`. Those count that the file imports, directly
            or through others.
    """
    tree = parse_without_docstrings(path)
    trees: dict[str, ast.Module] = {}
    unread = [tree]
    while unread:
        imports = imported_names(unread.pop())
        for name in shared:
            if name not in trees and f"bezoar.{name}" in imports:
                file = registry.PACKAGE / f"{name.replace('.', '/')}.py"
                trees[name] = parse_without_docstrings(file)
                unread.append(trees[name])
    dumps = [ast.dump(tree), *(ast.dump(trees[name]) for name in shared if name in trees)]
    return hashlib.sha256("".join(dumps).encode()).hexdigest()[:16]


def parse_without_docstrings(path: Path) -> ast.Module:
    """The syntax tree of a Python file, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:]
    return tree


def imported_names(tree: ast.Module) -> set[str]:
    """What `from module import name` statements name, as `module` and as `module.name`."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = {node.module or "" for node in nodes}
    return modules | {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
