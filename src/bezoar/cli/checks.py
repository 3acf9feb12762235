"""Checks a command's arguments before torch is imported and before any work.

Names of methods and of their fields, runs, and the files and folders of data are looked up. Other
errors, such as values that do not fit their fields, are found when the verb is run.
"""

import os
from collections.abc import Callable
from typing import Any

from bezoar import method_source, registry
from bezoar.data.files.paths import existing_file, existing_folder, expand_paths
from bezoar.errors import UserError
from bezoar.runs.run import Run
from bezoar.runs.verb import find_input
from bezoar.runs.verb_source import VerbSource

# How the value of `path` is looked up, by kind and name of the method.
PATHS: dict[tuple[str, str], Callable[[str], Any]] = {
    ("data", "shards"): lambda path: expand_paths(path),
    ("data", "table"): lambda path: expand_paths(path, "tables", ".parquet"),
    ("data", "folder"): lambda path: existing_folder(path, "folder of images"),
    ("trigger", "file"): lambda path: existing_file(path, "file"),
}


def check_arguments(source: VerbSource, arguments: Any) -> None:
    """Raise UserError for an input that does not exist, or a gate that no method can decide."""
    for field in source.fields:
        value = getattr(arguments, field.name)
        if field.takes.what and value is not None:
            for text in value if isinstance(value, tuple) else (value,):
                check_input(field.takes.what, text, arguments)
    for name, what in source.class_variables.get("run_fields", {}).items():
        check_inner_input(what, getattr(arguments, name), arguments)
    check_gate(source, arguments)


def check_input(what: str, text: str, arguments: Any) -> None:
    """Raise UserError where a text names no run, and no method whose files exist."""
    if what == "paper" and "/" not in text and not text.endswith(".py"):
        return  # a paper means all of its tables
    resolved = find_input(text, what, arguments.runs)
    if isinstance(resolved, Run):
        return
    kind, spec = resolved
    fields = method_source.check_spec(kind, spec)
    name = spec.partition(":")[0].strip()
    if (kind, name) in PATHS and "path" in fields:
        PATHS[kind, name](registry.convert_text(fields["path"], str, "path"))
    inner = method_source.class_variable(kind, spec, "run_fields") or {}
    for field in inner.keys() & fields.keys():
        text = registry.convert_text(fields[field], str, field)
        check_inner_input(inner[field], text, arguments)


def check_inner_input(what: str, text: str, arguments: Any) -> None:
    """Raise UserError where a text names no run and no file, and no method whose files exist."""
    if text and not os.path.isfile(text):
        check_input(what, text, arguments)


def check_gate(source: VerbSource, arguments: Any) -> None:
    """Raise UserError if --fail-on names a case that no chosen method can decide.

    A verb's `gate_needs` names, for a case, the field with the methods, and the class variable that
    one of them must have.
    """
    case = getattr(arguments, "fail_on", "never")
    if case not in (needs := source.class_variables.get("gate_needs", {})):
        return
    field, flag = needs[case]
    kind = next(f.takes.what for f in source.fields if f.name == field)
    specs = getattr(arguments, field)

    def decides(spec: str) -> bool:
        return method_source.class_variable(kind, spec, flag) is True

    if not any(map(decides, specs)):
        able = list(filter(decides, registry.method_names(kind)))
        raise UserError(
            f"--fail-on {case}: of {', '.join(specs) or 'no ' + kind} none says whether there is "
            f"one; --{field} {able[0] if able else 'MINE.py'} does (a {kind} of your own says so "
            f"by `{flag} = True` in its class)"
        )
