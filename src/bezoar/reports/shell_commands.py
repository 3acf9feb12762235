"""Shell commands that ask a run's question again, or one like it."""

import shlex
from dataclasses import MISSING, fields
from typing import Any

from bezoar.runs.run import Run
from bezoar.runs.verb import load_verb, positional_fields, verb_names


def shell_command(run: Run, seeded: bool = True, seed: int | None = None, **changes: Any) -> str:
    """Return the shell command that repeats a run, without the fields at their defaults.

    seeded: with the run's seed, even if it is 0. seed: another one in its place. changes: fields
    that are to have another value.
    """
    manifest = run.manifest
    verb, ask = manifest["verb"], manifest.get("ask", {})
    verb_class = find_verb(verb)
    defaults = {} if verb_class is None else field_defaults(verb_class)
    positional = () if verb_class is None else positional_fields(verb_class)
    arguments: list[str] = []
    options: list[str] = []
    for name, value in (manifest.get("typed", {}) | changes).items():
        resolved = ask.get(name)
        if isinstance(resolved, dict) and "run" in resolved:
            value = resolved["run"]
        if value is None or (name in defaults and value == defaults[name]):
            continue
        words = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        option = name.replace("_", "-")
        if name in positional:
            arguments += words
        elif isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        else:
            options += [f"--{option}", *words]
    seed = ask.get("seed", 0) if seed is None else seed
    if seeded or seed:
        options += ["--seed", str(seed)]
    if run.path.parent.name not in ("", "runs"):
        options += ["--runs", str(run.path.parent)]
    return shlex.join(["bezoar", verb, *arguments, *options])


def find_verb(verb: str) -> type | None:
    """Return the class of a verb; None for a verb that this version of bezoar does not have."""
    return load_verb(verb) if verb in verb_names() else None


def field_defaults(verb_class: Any) -> dict[str, Any]:
    """Return the defaults of a verb's fields as a manifest writes them, tuples as lists."""
    defaults = {f.name: f.default for f in fields(verb_class) if f.default is not MISSING}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
