"""Spec text <-> method; which methods a folder offers. Imports no torch, so that help is instant.

A *method* is one file that holds one frozen dataclass named like the file: `detectors/k_distance.py` holds `KDistance`.
The file system is the registry. A *spec* is the one spelling of a configured method, `dao:k=16,pool=4096`: the name (or
a path to a `.py` file of the user's own), then `field=value` pairs. A value that holds commas stands in (), [], {} or "".
A first value without `=` goes to the method's first field: `open_clip:RN50`, `file:trigger.npz`. A value may be a spec
itself, in brackets where it holds commas: `loss_trace:objective=(clip:epochs=2,batch=64)`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bezoar.errors import UserError

KINDS = {  # kind -> its package's folder; one verb runs each of them
    "data": "data/sources",
    "trigger": "attacks/triggers",
    "poison": "attacks/poisons",
    "network": "encoders/networks",
    "objective": "training/objectives",
    "attack": "attacks/encoder_attacks",
    "probe": "evaluation/probes",
    "detector": "detection/detectors",
    "audit": "auditing/audits",
    "repair": "repair/repairs",
    "check": "detection/checks",
    "bank": "auditing/banks",
    "paper": "papers",
}
PACKAGE = Path(__file__).parent
OPENING, CLOSING = "([{", ")]}"


def method(cls: type) -> Any:
    """Make a class a method: a frozen dataclass whose fields are its hyper-parameters. Registers nothing."""
    return dataclass(frozen=True)(cls)


def method_names(kind: str) -> list[str]:
    """Every method of a kind that ships with bezoar, by file name; `carlini2022/poisons` is one in a folder."""
    folder = PACKAGE / KINDS[kind]
    files = [
        p.relative_to(folder).with_suffix("")
        for p in folder.rglob("*.py")
        if not p.stem.startswith("_")
    ]
    return sorted(p.as_posix() for p in files)


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Split at a separator that stands outside brackets and quotes."""
    parts, depth, quoted, start = [], 0, False, 0
    for i, c in enumerate(text):
        if c == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif c in OPENING:
            depth += 1
        elif c in CLOSING:
            depth -= 1
        elif c == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    if depth or quoted:
        raise UserError(f"spec {text!r}: unbalanced brackets or quotes")
    return [*parts, text[start:]]


def parse_spec(kind: str, text: str) -> tuple[type, dict[str, str]]:
    """Spec text -> the method's class and its fields as text, unconverted.

    Raises UserError for an unknown method or field, listing the known ones.
    """
    name, _, rest = text.strip().partition(":")
    cls = find_method(kind, name)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given: dict[str, str] = {}
    for i, part in enumerate(p for p in split_outside_brackets(rest, ",") if p.strip()):
        key, equals, value = ("", "", "") if part.lstrip()[:1] in OPENING else part.partition("=")
        if not equals and i == 0 and fields:
            key, value = next(iter(fields)), part
        elif not equals:
            raise UserError(f"{kind} {name!r}: {part!r} is not of the form field=value")
        key = key.strip()
        if key not in fields:
            raise UserError(
                f"{kind} {name!r} has no field {key!r}; it has: {', '.join(fields) or 'none'}"
            )
        given[key] = value.strip()
    return cls, given


def make(kind: str, text: str) -> Any:
    """Spec text -> configured method. Raises UserError when a value does not fit its field or one is missing."""
    cls, given = parse_spec(kind, text)
    hints = typing.get_type_hints(cls)
    name = text.partition(":")[0]
    values = {
        key: convert_text(value, hints[key], f"{kind} {name!r}: {key}")
        for key, value in given.items()
    }
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in values and _required(f)]
    if missing:
        raise UserError(f"{kind} {name!r} needs {', '.join(missing)}")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{kind} {name!r}: {error}") from error


def spec(configured: Any) -> str:
    """Configured method -> its spec text with every field written out; `make(kind, spec(m)) == m`."""
    cls = type(configured)
    parts = []
    for f in dataclasses.fields(cls):
        value = getattr(configured, f.name)
        if value is None:
            continue
        parts.append(f"{f.name}={spec_value(value)}")
    return (method_name(cls) + ":" + ",".join(parts)).removesuffix(":")


def method_name(cls: type) -> str:
    """The name a method is asked for by: its file's stem, or the file's path when it is the user's own."""
    module = cls.__module__.replace(".", "/")
    folder = next((f for f in KINDS.values() if module.startswith(f"bezoar/{f}/")), None)
    if folder:
        return module.removeprefix(f"bezoar/{folder}/")
    return str(inspect.getfile(cls))


def source_hash(cls: type) -> str:
    """sha256 of the file a method is written in, and of what its folder shares: a changed method is another question."""
    file = Path(inspect.getfile(cls))
    shared = file.with_name("__init__.py")
    parts = [file, shared] if cls.__module__.startswith("bezoar.") and shared.exists() else [file]
    return hashlib.sha256(b"".join(p.read_bytes() for p in parts)).hexdigest()[:16]


@functools.cache
def find_method(kind: str, name: str) -> type:
    """The class of a method, by name or by path of a file.

    A file is loaded, which runs its code, only where the user has named it (`allow`, BEZOAR_METHODS): specs also come out
    of plans, manifests and saved encoders, which anybody may have written. Raises UserError that names the file, or lists
    the known methods.
    """
    if name.endswith(".py"):
        path = Path(name).expanduser().resolve()
        if not os.path.isfile(path):
            raise UserError(f"no file {name!r} to read a {kind} from")
        if str(path) not in allowed_files():
            raise UserError(
                f"{kind} {name!r} would run the code of {path}, which you have not named yourself; if you trust that code, "
                f"set BEZOAR_METHODS={path}"
            )
        own = f"bezoar_user_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        loading = importlib.util.spec_from_file_location(own, path)
        assert loading and loading.loader
        module = sys.modules[own] = importlib.util.module_from_spec(loading)
        loading.loader.exec_module(module)
    elif name in method_names(kind):
        module = importlib.import_module(f"bezoar/{KINDS[kind]}/{name}".replace("/", "."))
    else:
        raise UserError(
            f"no {kind} {name!r}; there are: {', '.join(method_names(kind))}, or a path to a .py file"
        )
    wanted = class_name(Path(name).stem)
    found = getattr(module, wanted, None)
    if not dataclasses.is_dataclass(found) or not isinstance(found, type):
        raise UserError(f"{kind} {name!r}: the file must define a method class named {wanted}")
    return found


def allowed_files() -> set[str]:
    """Method files that the user has named, in this process or an earlier one, and those in BEZOAR_METHODS."""
    recorded = _record().read_text().splitlines() if _record().is_file() else []
    variable = os.environ.get("BEZOAR_METHODS", "").split(os.pathsep)
    return _named | set(recorded) | {str(Path(p).expanduser().resolve()) for p in variable if p}


def allow(text: str) -> None:
    """Let the method files that a spec names be loaded. Call it with what the user wrote, never with what a file holds.

    The files are remembered for later processes; without a home to remember them in, for this process.
    """
    for name in method_files(text):
        path = str(Path(name).expanduser().resolve())
        if os.path.isfile(path) and path not in allowed_files():
            _named.add(path)
            with contextlib.suppress(OSError):
                _record().parent.mkdir(parents=True, exist_ok=True)
                with _record().open("a") as file:
                    file.write(f"{path}\n")


_named: set[str] = set()


def _record() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "bezoar" / "methods"


def method_files(text: str) -> list[str]:
    """Every file that a spec, or a spec within it, names as a method."""
    files, seen, left = [], set(), [text]
    while left:
        spec = left.pop().strip()
        if ".py" not in spec or spec in seen:
            continue
        seen.add(spec)
        name, _, rest = spec.partition(":")
        if name.endswith(".py"):
            files.append(name)
        for part in map(str.strip, split_outside_brackets(rest, ",")):
            _, equals, value = ("", "", "") if part[:1] in OPENING else part.partition("=")
            inner = (value if equals else part).strip()
            inner = inner[1:-1] if inner[:1] in (*OPENING, '"') else inner
            left += [inner, *split_outside_brackets(inner, ",")]
    return files


def class_name(stem: str) -> str:
    """`k_distance` -> `KDistance`."""
    return stem.title().replace("_", "")


def convert_text(text: str, hint: Any, where: str) -> Any:
    """Text -> a value of an annotated type: int, float, bool, str, None, a tuple of these, or a choice of literals."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if text == "none" and type(None) in options:
            return None
        return convert_text(text, next(o for o in options if o is not type(None)), where)
    if origin is tuple:
        inner = text[1:-1] if text[:1] in OPENING and text[:1] else text
        return tuple(
            convert_text(t.strip(), options[0], where)
            for t in re.split(r"[,/]", inner)
            if t.strip()
        )
    if origin is typing.Literal:
        if text not in options:
            raise UserError(f"{where} must be one of {', '.join(map(str, options))}; got {text!r}")
        return text
    if hint is bool:
        if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise UserError(f"{where} must be true or false; got {text!r}")
        return text.lower() in ("true", "yes", "1")
    if hint is str:
        if len(text) > 1 and (text[0] + text[-1] in ('""', "()")):
            return text[1:-1]
        return text
    try:
        return hint(text)
    except (TypeError, ValueError):
        raise UserError(
            f"{where} must be {getattr(hint, '__name__', hint)}; got {text!r}"
        ) from None


@dataclass(frozen=True)
class Description:
    """What a method says of itself, read without importing it."""

    name: str
    summary: str
    fields: tuple[tuple[str, str, str, str], ...]  # name, type, default, help


def describe(path: Path) -> Description:
    """Read a method's docstring and fields from its source text; nothing is imported or run."""
    tree = ast.parse(path.read_text())
    summary = (ast.get_docstring(tree) or "").partition("\n")[0]
    fields = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name(path.stem):
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    hint, text = _documented(item.annotation)
                    default = ast.unparse(item.value) if item.value else ""
                    if not hint.startswith("ClassVar"):
                        fields.append(
                            (
                                item.target.id,
                                resolve_default(hint, tree),
                                resolve_default(default, tree),
                                text,
                            )
                        )
    return Description(path.stem, summary, tuple(fields))


def resolve_default(text: str, tree: ast.Module) -> str:
    """`training_traces.NETWORK` -> the constant or type that it names, in the file itself or in a module of bezoar's."""
    module, _, name = text.rpartition(".")
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bezoar"):
            imported = [a.name for a in node.names]
            path = PACKAGE.parent / str(node.module).replace(".", "/")
            if module in imported and (path / f"{module}.py").is_file():
                return resolve_default(name, ast.parse((path / f"{module}.py").read_text()))
            if not module and name in imported and path.with_suffix(".py").is_file():
                return resolve_default(name, ast.parse(path.with_suffix(".py").read_text()))
        elif isinstance(node, ast.Assign) and not module:
            target, value = node.targets[0], node.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            for left, right in pairs:
                if isinstance(left, ast.Name) and left.id == name:
                    return ast.unparse(right)
    return text


def _documented(hint: ast.expr) -> tuple[str, str]:
    """`Annotated[int, "note"]` -> ("int", "note"); anything else has no note."""
    if isinstance(hint, ast.Subscript) and ast.unparse(hint.value).endswith("Annotated"):
        assert isinstance(hint.slice, ast.Tuple)
        return ast.unparse(hint.slice.elts[0]), str(ast.literal_eval(hint.slice.elts[1]))
    return ast.unparse(hint), ""


def _required(f: Any) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def spec_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ",".join(map(spec_value, value)) + ")"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and '"' in value:  # a spec with a quoted value
        return f"({value})"
    if isinstance(value, str) and (("," in value and "{" not in value) or not _whole(value)):
        return f'"{value}"'
    return str(value)


def _whole(text: str) -> bool:
    try:
        return len(split_outside_brackets(text, ",")) == 1
    except UserError:
        return False
