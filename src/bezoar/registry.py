"""Methods and their specs: finds methods, and writes configured methods as text.

A *method* is one file with one frozen dataclass named like the file: `detectors/k_distance.py`
holds `KDistance`. The file system is the registry. A *spec* is the text of a configured method,
such as `dao:k=16,pool=4096`: the name (or the path of a user's own `.py` file), then `field=value`
pairs. A value with commas is put into (), [], {} or "". A first value without `=` belongs to the
method's first field: `open_clip:RN50`, `file:trigger.npz`. A value may itself be a spec, in
brackets if it has commas: `loss_trace:objective=(clip:epochs=2,batch=64)`.

This module imports no torch, so that the command line's help is instant.
"""

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

from bezoar.errors import UserError, describe_neighbours, expand_home, suggest

KINDS = {  # kind of method -> the folder of its package
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
MAX_SPEC, MAX_DEPTH = 1 << 17, 32  # characters of a spec, and brackets within one another
LARGEST_INT = (1 << 63) - 1  # of a field
OPENING, CLOSING = "([{", ")]}"


def method(cls: type) -> Any:
    """Make a class a method: a frozen dataclass whose fields are its hyper-parameters."""
    return dataclass(frozen=True)(cls)


def method_names(kind: str) -> list[str]:
    """The methods of a kind that ship with bezoar, by file name, such as `carlini2022/poisons`."""
    folder = PACKAGE / KINDS[kind]
    files = [path for path in folder.rglob("*.py") if not path.stem.startswith("_")]
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in files)


def method_name(cls: type) -> str:
    """The name of a method in specs: its file's stem, or the path of a user's own file."""
    module = cls.__module__.replace(".", "/")
    folder = next((f for f in KINDS.values() if module.startswith(f"bezoar/{f}/")), None)
    if folder:
        return module.removeprefix(f"bezoar/{folder}/")
    return str(inspect.getfile(cls))


def class_name(stem: str) -> str:
    """The class that a method's file must define: `KDistance` for `k_distance`."""
    return stem.title().replace("_", "")


def call(configured: Any, *arguments: Any, **offered: Any) -> Any:
    """Call a method with the arguments of its kind, and those offered that its `needs` name."""
    return configured(*arguments, **{k: offered[k] for k in needs(configured) if k in offered})


def needs(configured: Any) -> tuple[str, ...]:
    """The names of a method's further arguments beyond those of its kind."""
    return tuple(getattr(configured, "needs", ()))


def has_fields(configured: Any, *names: str) -> bool:
    """Return whether a configured method has all of these fields."""
    return set(names) <= {f.name for f in dataclasses.fields(configured)}


def input_files(configured: Any) -> list[Any]:
    """The files that a method reads: those that it lists, or those that its text fields name.

    A file is a path, or a tuple of its recorded name and its path.
    """
    if hasattr(configured, "files"):
        return list(configured.files())
    texts = [v for v in vars(configured).values() if isinstance(v, str) and v]
    return [Path(text) for text in texts if os.path.isfile(text)]


def source_hash(cls: type) -> str:
    """Hash (sha256, 16 digits) the method's file, and the `__init__.py` of bezoar's packages.

    A method with changed code is another question, so the hash is part of a run's name.
    """
    file = Path(inspect.getfile(cls))
    shared = file.with_name("__init__.py")
    files = [file, shared] if cls.__module__.startswith("bezoar.") and shared.exists() else [file]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


# Specs


def make(kind: str, text: str) -> Any:
    """Make a configured method from a spec.

    Raises:
        UserError: for an unknown method or field, an invalid value, or a missing field.
    """
    cls, texts = parse_spec(kind, text)
    types_of_fields = typing.get_type_hints(cls)
    name = text.partition(":")[0]
    values = {
        field: convert_text(value, types_of_fields[field], f"{kind} {name!r}: {field}")
        for field, value in texts.items()
    }
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{kind} {name!r} needs {', '.join(missing)}")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{kind} {name!r}: {error}") from error


def spec(configured: Any) -> str:
    """Write a configured method as a spec with every field: `make(kind, spec(m)) == m`."""
    cls = type(configured)
    values = {f.name: getattr(configured, f.name) for f in dataclasses.fields(cls)}
    parts = [f"{name}={spec_value(value)}" for name, value in values.items() if value is not None]
    return (method_name(cls) + ":" + ",".join(parts)).removesuffix(":")


def spec_value(value: Any) -> str:
    """Write a field's value for a spec."""
    if isinstance(value, tuple):
        return "(" + ",".join(map(spec_value, value)) + ")"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and '"' in value:  # a spec with a quoted value
        return f"({value})"
    if isinstance(value, str) and (("," in value and "{" not in value) or not _is_one_part(value)):
        return f'"{value}"'
    return str(value)


def parse_spec(kind: str, text: str) -> tuple[type, dict[str, str]]:
    """Split a spec into the method's class and the texts of its fields, unconverted.

    For an unknown method or field, raises UserError, which lists the known ones.
    """
    name, _, rest = text.strip().partition(":")
    cls = find_method(kind, name)
    return cls, split_fields(kind, name, rest, [f.name for f in dataclasses.fields(cls)])


def method_path(kind: str, name: str) -> Path:
    """The file of a method by name, or of a user's own by path. Raises UserError without one."""
    if name.endswith(".py"):
        path = expand_home(name).resolve()
        if not os.path.isfile(path):  # Path.is_file raises for a text that no name can be
            raise UserError(f"no file {name!r} to read a {kind} from{describe_neighbours(name)}")
        return path
    if name in (names := method_names(kind)):
        return PACKAGE / KINDS[kind] / f"{name}.py"
    if "." in name or (kind != "paper" and "/" in name):  # no method's name, but that of a file
        raise UserError(f"no {kind} {name!r}, and no file{describe_neighbours(name)}")
    hint = suggest(name, names)
    raise UserError(
        f"no {kind} {name!r}{hint}; there are: {', '.join(names)}, or a path to a .py file"
    )


def split_fields(kind: str, name: str, rest: str, fields: list[str]) -> dict[str, str]:
    """The texts of a spec's fields. fields: those of the method. Raises UserError for any other."""
    texts: dict[str, str] = {}
    parts = [part for part in split_outside_brackets(rest, ",") if part.strip()]
    for i, part in enumerate(parts):
        field, equals, value = _partition_field(part)
        if not equals and i == 0 and fields:
            field, value = fields[0], part
        elif not equals:
            raise UserError(f"{kind} {name!r}: {part!r} is not of the form field=value")
        field = field.strip()
        if field not in fields:
            names = ", ".join(fields) or "none"
            hint = suggest(field, fields)
            raise UserError(f"{kind} {name!r} has no field {field!r}{hint}; it has: {names}")
        texts[field] = value.strip()
    return texts


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Split a text at a separator (one character) outside of brackets and quotes."""
    if len(text) > MAX_SPEC:
        raise UserError(f"a spec has {len(text)} characters; expected {MAX_SPEC} at most")
    parts: list[str] = []
    depth = start = 0
    quoted = False
    for i, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif character in OPENING:
            depth += 1
            if depth > MAX_DEPTH:
                raise UserError(f"a spec is nested more than {MAX_DEPTH} deep")
        elif character in CLOSING:
            depth -= 1
        elif character == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    if depth or quoted:
        raise UserError(f"spec {text!r}: unbalanced brackets or quotes")
    return [*parts, text[start:]]


def convert_text(text: str, hint: Any, where: str) -> Any:
    """Convert a text to a value of an annotated type.

    Args:
        text: the text.
        hint: int, float, bool, str, a choice of literals, a tuple of one of these, or one of these
            or None.
        where: the owner of the text, for the error message.
    """
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if text == "none" and type(None) in options:
            return None
        return convert_text(text, next(o for o in options if o is not type(None)), where)
    if origin is tuple:
        inner = text[1:-1] if text[:1] and text[:1] in OPENING else text
        items = [item.strip() for item in re.split(r"[,/]", inner) if item.strip()]
        return tuple(convert_text(item, options[0], where) for item in items)
    if origin is typing.Literal:
        if text not in options:
            raise UserError(f"{where} must be one of {', '.join(map(str, options))}; got {text!r}")
        return text
    if hint is bool:
        if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise UserError(f"{where} must be true or false; got {text!r}")
        return text.lower() in ("true", "yes", "1")
    if hint is str:
        return text[1:-1] if _is_wrapped(text) else text
    try:
        value = hint(text)
        if value != value:  # NaN, which no comparison with a bound refuses
            raise ValueError
        if hint is int and abs(value) > LARGEST_INT:  # no tensor and no draw takes it
            raise ValueError
        return value
    except (TypeError, ValueError):
        type_name = getattr(hint, "__name__", hint)
        raise UserError(f"{where} must be {type_name}; got {text!r}") from None


def _partition_field(part: str) -> tuple[str, str, str]:
    """`field=value` -> its three parts; a value in brackets may hold an `=` and has no field."""
    return ("", "", "") if part.lstrip()[:1] in tuple(OPENING) else part.partition("=")


def _is_wrapped(text: str) -> bool:
    """Whether quotes or round brackets enclose the whole text; not in `(a)+(b)`."""
    if len(text) < 2 or text[0] + text[-1] not in ('""', "()"):
        return False
    if text[0] == '"':
        return text.find('"', 1) == len(text) - 1
    depth = 0
    quoted = False
    for i, character in enumerate(text):
        quoted ^= character == '"'
        if not quoted:
            depth += (character in OPENING) - (character in CLOSING)
        if depth == 0:
            return i == len(text) - 1
    return False


def _is_one_part(text: str) -> bool:
    try:
        return len(split_outside_brackets(text, ",")) == 1
    except UserError:
        return False


# Finding methods, and which files of code may be loaded


@functools.cache
def find_method(kind: str, name: str) -> type:
    """Find the class of a method by its name, or by the path of its file.

    Loading a file runs its code. This happens only if the user has named the file (see `allow`):
    specs also come from plans, manifests and saved encoders, which anybody may have written.

    Raises:
        UserError: if there is no such method or file, the user has not named the file, or it
            defines no such class.
    """
    path = method_path(kind, name)
    if name.endswith(".py"):
        module = _load_file(kind, name, path)
    else:
        module = importlib.import_module(f"bezoar/{KINDS[kind]}/{name}".replace("/", "."))
    expected_name = class_name(Path(name).stem)
    cls = getattr(module, expected_name, None)
    if not dataclasses.is_dataclass(cls) or not isinstance(cls, type):
        raise UserError(
            f"{kind} {name!r}: the file must define a method class named {expected_name}"
        )
    return cls


def _load_file(kind: str, name: str, path: Path) -> types.ModuleType:
    if str(path) not in allowed_files():
        raise UserError(
            f"{kind} {name!r} would run the code of {path}, which you have not named yourself; if "
            f"you trust that code, set BEZOAR_METHODS={path}"
        )
    module_name = f"bezoar_user_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    module_spec.loader.exec_module(module)
    return module


_named: set[str] = set()  # files that the user has named in this process


def allow(text: str) -> None:
    """Allow the method files that a spec names to be loaded.

    Call it only with the user's own text, never with the contents of a file. The files are
    remembered for later processes, or for this process alone if there is no home directory.
    """
    for name in method_files(text):
        path = str(expand_home(name).resolve())
        if os.path.isfile(path) and path not in allowed_files():
            _named.add(path)
            if "\n" in path:
                continue  # a line of the record would name another file
            with contextlib.suppress(OSError):
                _record().parent.mkdir(parents=True, exist_ok=True)
                with _record().open("a", errors="surrogateescape") as file:
                    file.write(f"{path}\n")


def allowed_files() -> set[str]:
    """Method files that the user has named, now or earlier, and those in BEZOAR_METHODS."""
    record = _record().read_text(errors="surrogateescape") if _record().is_file() else ""
    variable = os.environ.get("BEZOAR_METHODS", "").split(os.pathsep)
    return (
        _named
        | set(record.split("\n")) - {""}
        | {str(expand_home(p).resolve()) for p in variable if p}
    )


def _record() -> Path:
    """The file that remembers which method files the user has named."""
    return state_folder() / "methods"


def state_folder() -> Path:
    """The folder for facts that bezoar remembers of a user. Raises RuntimeError without a home."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "bezoar"


def method_files(text: str) -> list[str]:
    """The method files that a spec names, itself or in a spec within it."""
    files: list[str] = []
    seen: set[str] = set()
    pending = [text]
    while pending:
        spec_text = pending.pop().strip()
        if ".py" not in spec_text or spec_text in seen:
            continue
        seen.add(spec_text)
        name, _, rest = spec_text.partition(":")
        if name.endswith(".py"):
            files.append(name)
        for part in map(str.strip, split_outside_brackets(rest, ",")):
            _, equals, value = _partition_field(part)
            inner = (value if equals else part).strip()
            if inner[:1] in (*OPENING, '"'):
                inner = inner[1:-1]
            for separator in ",+":  # fields, and the triggers of `several`
                pending += [inner, *split_outside_brackets(inner, separator)]
    return files
