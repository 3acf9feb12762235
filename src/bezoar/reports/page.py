"""One self-contained page a run: no script, no network, every text escaped. `write(Run(path))` renders it anew."""

from __future__ import annotations

import importlib
import os
import re
import shlex
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from bezoar.errors import UserError
from bezoar.reports import metric_names
from bezoar.reports.page_parts import Section, Text
from bezoar.reports.run_page import Story, tell
from bezoar.runs.execute import execute as run_verb
from bezoar.runs.run import Run
from bezoar.runs.verb import Settings, positional_fields

PAGE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
RUN_NAME = re.compile(r"[A-Za-z][\w-]*")
PROBLEMS = (UserError, OSError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
FEW = 24  # metrics that are shown at once; longer tables are folded


def execute(verb: Any, settings: Settings | None = None) -> Run:
    """Run a verb, or return the run that already answers it; a run that is done gets its page."""
    settings = settings or Settings()
    return run_verb(verb, replace(settings, finish=settings.finish or write_page))


def write_page(run: Run) -> Path:
    """Write report.html into a run, under a temporary name first. Returns its path."""
    text = render_page(run)
    temporary = run.path / "report.tmp"
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, run.path / PAGE)
    return run.path / PAGE


def write_standalone_page(run: Run, path: Path) -> Path:
    """Write a run's page to be handed around: without links to other runs, or where they lie. Returns its path."""
    text = re.sub(r'<a href="\.\./[^"]*"([^>]*)>(.*?)</a>', r"<span\1>\2</span>", render_page(run))
    text = text.replace(str(escape(f" --runs {shlex.quote(str(run.path.parent))}")), "")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)
    return path


def render_page(run: Run) -> str:
    """The page's text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    engine = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters["breaks"] = breaks
    story = tell(run)
    return engine.get_template("page.jinja").render(contents(story))


def contents(story: Story) -> dict[str, Any]:
    """Everything the template shows."""
    manifest = story.manifest
    rows = [metric_names.metric_row(k, m, story.attacked) for k, m in story.measures.items()]
    by_key = {row.key: row for row in rows}
    return {
        "verb": story.run.verb,
        "name": story.run.name,
        "status": manifest["status"],
        "error": manifest.get("error"),
        "warning": story.warning(),
        "headline": story.headline(),
        "more": story.more(),
        "cards": [by_key[k] for k in story.cards() if k in by_key],
        "sections": [s for s in map(made, story.chapters()) if s is not None],
        "rows": rows,
        "folded": len(rows) > FEW,
        "parents": [parent(story.run, name) for name in dict.fromkeys(manifest.get("parents", []))],
        "command": shell_command(story.run),
        "started": manifest.get("started", ""),
        "seconds": manifest.get("seconds"),
        "memory": manifest.get("peak_memory_bytes"),
        "environment": metric_names.as_dict(manifest.get("environment")),
        "notes": [(k, plain(v)) for k, v in story.notes.items()],
        "outputs": metric_names.as_dict(manifest.get("outputs")),
        "version": manifest.get("bezoar", ""),
    }


def made(chapter: Any) -> Section | None:
    """One section. One that cannot be made (a file is gone, data have moved) says why; it never costs the run its page."""
    try:
        return chapter()
    except PROBLEMS as problem:
        title = chapter.__name__.replace("_", " ").capitalize()
        return Section(
            title, [Text(f"This section could not be made: {type(problem).__name__}: {problem}")]
        )


def parent(run: Run, name: str) -> dict[str, str]:
    """A link to a parent's page: relative, and only to a sibling directory."""
    if not RUN_NAME.fullmatch(str(name)):
        return {"name": str(name), "href": "", "headline": ""}
    try:
        found = run.sibling(name)
        headline = tell(found).headline()
    except PROBLEMS:
        return {"name": name, "href": "", "headline": "this run is no longer there"}
    return {
        "name": name,
        "href": f"../{name}/{PAGE}" if found.path.parent == run.path.parent else "",
        "headline": headline,
    }


def shell_command(run: Run) -> str:
    """The shell command that asks the same question again: every field that differs from its default."""
    manifest = run.manifest
    verb, typed, ask = (
        manifest["verb"],
        manifest.get("typed", {}),
        metric_names.as_dict(manifest.get("ask")),
    )
    cls = verb_class(verb)
    defaults = {} if cls is None else defaults_of(cls)
    positional = () if cls is None else positional_fields(cls)
    first: list[str] = []
    options: list[str] = []
    for name, value in typed.items():
        asked = ask.get(name)
        if isinstance(asked, dict) and "run" in asked:
            value = asked["run"]
        if value is None or (name in defaults and value == defaults[name]):
            continue
        words = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        if name in positional:
            first += words
        elif isinstance(value, bool):
            options.append(("--" if value else "--no-") + name.replace("_", "-"))
        else:
            options += ["--" + name.replace("_", "-"), *words]
    options += ["--seed", str(ask.get("seed", 0))]
    if run.path.parent.name not in ("", "runs"):
        options += ["--runs", str(run.path.parent)]
    return shlex.join(["bezoar", verb, *first, *options])


def verb_class(verb: str) -> type | None:
    """The class of a verb; None for one that this bezoar does not have."""
    if not (TEMPLATES.parents[1] / "verbs" / f"{verb}.py").is_file():
        return None
    return getattr(importlib.import_module(f"bezoar.verbs.{verb}"), verb.title())


def defaults_of(verb: type) -> dict[str, Any]:
    """The defaults of a verb's fields, as a manifest writes them."""
    defaults = {f.name: f.default for f in fields(verb) if f.default is not MISSING}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}


def breaks(text: Any) -> Markup:
    """Escaped text whose lines may break after a comma, as long specs must."""
    return escape(text).replace(",", Markup(",<wbr>"))


def plain(value: Any) -> str:
    """A note as text."""
    if isinstance(value, dict):
        return ", ".join(f"{k}: {plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        shown = ", ".join(plain(v) for v in value[:50])
        return shown + (f", … ({len(value)})" if len(value) > 50 else "")
    return str(value)
