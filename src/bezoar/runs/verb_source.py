"""Reads the fields of a verb from its source text, without importing it.

A verb's file imports torch, which takes seconds. Help and the check of the arguments need only the
names, types, defaults and help texts of its fields. They are read with `ast`; no code is run, and
only literals are evaluated.
"""

import ast
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from bezoar import method_source, registry
from bezoar.method_source import FieldNode
from bezoar.runs.verb import VERBS, Takes

TYPES: dict[str, type] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "Path": Path,
    "Input": str,  # an input is a text on the command line
}


@dataclass(frozen=True)
class FieldSource:
    """A field of a verb. type: of its value on the command line. default: or MISSING."""

    name: str
    type: Any
    help: str
    takes: Takes
    default: Any


@dataclass(frozen=True)
class VerbSource:
    """A verb: the docstring of its class, its fields in order, and its class variables by name."""

    name: str
    doc: str
    fields: tuple[FieldSource, ...]
    class_variables: dict[str, Any]


def read_verb(name: str) -> VerbSource:
    """Read a verb's class from its file. Raises ValueError for a field of another form."""
    module = _parse(name)
    cls = _class_node(module, name)
    fields = []
    class_variables = {}
    for node in method_source.field_nodes(cls):
        if ast.unparse(node.type).startswith("ClassVar"):
            assert node.default is not None
            class_variables[node.name] = _literal(node.default, module)
        else:
            fields.append(_read_field(node, module))
    return VerbSource(name, ast.get_docstring(cls) or "", tuple(fields), class_variables)


def read_docstring(name: str) -> str:
    """Read the docstring of a verb's class from its file."""
    return ast.get_docstring(_class_node(_parse(name), name)) or ""


def read_type(node: ast.expr, module: ast.Module) -> Any:
    """Make a type from an annotation: a name of `TYPES`, `X | None`, `tuple[X, ...]` or `Literal`.

    A name may also be an alias in the module, or in a module of bezoar's that it imports from.
    Raises ValueError for any other annotation.
    """
    match node:
        case ast.Name(id=name) if name in TYPES:
            return TYPES[name]
        case ast.Name(id=name) if (text := method_source.resolve_default(name, module)) != name:
            return read_type(ast.parse(text, mode="eval").body, module)
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
            return read_type(left, module) | None
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return Literal[ast.literal_eval(choices)]
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[item, end])):
            if isinstance(end, ast.Constant) and end.value is ...:
                return tuple[read_type(item, module), ...]  # type: ignore[misc]
    raise ValueError(f"the command line knows no type {ast.unparse(node)}")


def _parse(name: str) -> ast.Module:
    return ast.parse((VERBS / f"{name}.py").read_text(encoding="utf-8"))


def _class_node(module: ast.Module, name: str) -> ast.ClassDef:
    cls = method_source.class_node(module, registry.class_name(name))
    if cls is None:
        raise ValueError(f"verbs/{name}.py defines no class {registry.class_name(name)}")
    return cls


def _read_field(node: FieldNode, module: ast.Module) -> FieldSource:
    takes = Takes()
    text = ""
    for mark in node.marks:
        if isinstance(mark, ast.Call):  # Takes(...)
            options = {str(k.arg): ast.literal_eval(k.value) for k in mark.keywords}
            takes = Takes(*map(ast.literal_eval, mark.args), **options)
        else:
            text = ast.literal_eval(mark)
    default = MISSING if node.default is None else _literal(node.default, module)
    return FieldSource(node.name, read_type(node.type, module), text, takes, default)


def _literal(node: ast.expr, module: ast.Module) -> Any:
    """The value of a literal, or of a constant of the module or of another of bezoar's."""
    return ast.literal_eval(method_source.resolve_default(ast.unparse(node), module))
