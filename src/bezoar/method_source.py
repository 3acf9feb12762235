"""Docstring, fields and flags of a method, read from its source text without importing it."""

import ast
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bezoar import registry
from bezoar.errors import UserError, first_line


class FieldDescription(NamedTuple):
    """A field of a method, in texts."""

    name: str
    type: str
    default: str
    help: str


@dataclass(frozen=True)
class Description:
    """A method's description, from its source text.

    summary: the first paragraph of the file's docstring. text: the rest of it, and the class's.
    """

    name: str
    summary: str
    fields: tuple[FieldDescription, ...]
    text: str


class FieldNode(NamedTuple):
    """A field of a class in its source text. marks: the arguments of `Annotated` after the type."""

    name: str
    type: ast.expr
    marks: list[ast.expr]
    default: ast.expr | None


def first_paragraph(docstring: str | None) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((docstring or "").partition("\n\n")[0].split())


def describe(path: Path) -> Description:
    """Read a method's docstring and fields from its source text; nothing is imported or run."""
    module = read_module(path)
    docstring = ast.get_docstring(module) or ""
    cls = class_node(module, registry.class_name(path.stem))
    fields = []
    for field in field_nodes(cls) if cls else ():
        type_text = ast.unparse(field.type)
        if type_text.startswith("ClassVar"):
            continue
        default = ast.unparse(field.default) if field.default else ""
        description = FieldDescription(
            field.name,
            resolve_default(type_text, module),
            resolve_default(default, module),
            str(ast.literal_eval(field.marks[0])) if field.marks else "",
        )
        fields.append(description)
    texts = [docstring.partition("\n\n")[2], (ast.get_docstring(cls) if cls else "") or ""]
    text = "\n\n".join(filter(None, texts))
    return Description(path.stem, first_paragraph(docstring), tuple(fields), text)


def read_module(path: Path) -> ast.Module:
    """Parse a method's file. Raises UserError for a file that is no Python source."""
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path} is no Python source: {first_line(error)}") from error


def class_node(module: ast.Module, name: str) -> ast.ClassDef | None:
    """The definition of a class in a module's source text."""
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    return next((node for node in classes if node.name == name), None)


def field_nodes(cls: ast.ClassDef) -> Iterator[FieldNode]:
    """The annotated names of a class in its source text, class variables among them."""
    for node in cls.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        hint = node.annotation
        marks: list[ast.expr] = []
        if isinstance(hint, ast.Subscript) and ast.unparse(hint.value).endswith("Annotated"):
            assert isinstance(hint.slice, ast.Tuple)
            hint, *marks = hint.slice.elts
        yield FieldNode(node.target.id, hint, marks, node.value)


def resolve_default(text: str, module: ast.Module) -> str:
    """Replace the name of a constant or type by its source text.

    `training_traces.NETWORK` becomes `'clip_small'`. The constant is looked up in the module
    itself, or in the module of bezoar's that it is imported from. Any other text is returned
    unchanged.
    """
    prefix, _, name = text.rpartition(".")
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bezoar"):
            imported = [alias.name for alias in node.names]
            package = registry.PACKAGE.parent / str(node.module).replace(".", "/")
            if prefix in imported and (package / f"{prefix}.py").is_file():
                return resolve_default(name, ast.parse((package / f"{prefix}.py").read_text()))
            if not prefix and name in imported and package.with_suffix(".py").is_file():
                return resolve_default(name, ast.parse(package.with_suffix(".py").read_text()))
        elif isinstance(node, ast.Assign) and not prefix:
            for target, value in _assigned_pairs(node):
                if isinstance(target, ast.Name) and target.id == name:
                    return ast.unparse(value)
    return text


def _assigned_pairs(node: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    """Targets and values of an assignment; `A, B = 1, 2` has two."""
    target = node.targets[0]
    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
        return list(zip(target.elts, node.value.elts, strict=True))
    return [(target, node.value)]


def check_spec(kind: str, text: str) -> dict[str, str]:
    """The texts of a spec's fields, without importing the method: for checks before torch is
    loaded.

    Raises UserError as `parse_spec` does. The fields of a user's own file are not checked.
    """
    name, _, rest = text.strip().partition(":")
    path = registry.method_path(kind, name)
    if name.endswith(".py"):
        return {}
    return registry.split_fields(kind, name, rest, [field.name for field in describe(path).fields])


def class_variable(kind: str, text: str, name: str) -> Any:
    """The value of a class variable of a spec's method; None where it is no literal, or not set.

    Raises UserError for no method.
    """
    path = registry.method_path(kind, text.strip().partition(":")[0])
    cls = class_node(read_module(path), registry.class_name(path.stem))
    for node in cls.body if cls else ():
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            with contextlib.suppress(ValueError, TypeError):
                return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    return None
