"""The page of a run: one HTML file without script and without access to the network."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from bezoar.data.files.writing import refuse_unwritable, remove_debris_of, write_whole
from bezoar.evaluation.scores import Measure
from bezoar.reports import chart_files, metric_names
from bezoar.reports.page_parts import Section, Text
from bezoar.reports.run_page import Page, as_list, build_page
from bezoar.reports.shell_commands import find_verb, shell_command
from bezoar.runs.execute import execute as run_verb
from bezoar.runs.run import PAGE, Run
from bezoar.runs.summary import (
    MOST_FIGURES,
    MOST_FILES,
    Figure,
    Summary,
    first_sentences,
    read_summary,
    write_summary,
)
from bezoar.runs.verb import Settings, field_marks

TEMPLATES = Path(__file__).parent / "templates"
RUN_NAME = re.compile(r"[A-Za-z][\w-]*")
WORD_JOINER = "\u2060"  # keeps lines of a page whole; a terminal is not shown it
LONGEST_TABLE = 24  # metrics; a longer table is folded
LONGEST_LIST = 50  # entries of a list among the notes


def execute(verb: Any, settings: Settings | None = None) -> Run:
    """Run a verb and write the page of its run, or return the run that already answers it."""
    settings = settings or Settings()
    return run_verb(verb, replace(settings, finish=settings.finish or write_page))


def write_page(run: Run) -> Path:
    """Write the page of a run and its summary into its directory. Returns the path of the page."""
    page = build_page(run)
    values = template_values(run, page)
    if chart_files.FOLDER in getattr(find_verb(run.verb), "main_files", ()):
        chart_files.write_charts(run.path, values["sections"])
    write_summary(run.path, summarize_page(run, page))
    write_whole(run.path / PAGE, fill_template(values))
    return run.path / PAGE


def summarize_run(run: Run) -> Summary:
    """Return the summary of a run: the one that it holds, or else that of its page."""
    return read_summary(run.path) or summarize_page(run, build_page(run))


def summarize_page(run: Run, page: Page) -> Summary:
    """Return a page's sentences (at most three), its first figures and the run's main files.

    Seconds are left out: equal runs have equal summaries.
    """
    measures = metric_names.read_measures(run)
    names_shown = [name for name in page.cards or measures if name in measures]
    shown = [name for name in names_shown if not name.endswith("seconds")]
    verb_class = find_verb(run.verb)
    names = getattr(verb_class, "main_files", ()) or run.manifest.get("outputs", {})
    return Summary(
        first_sentences(page.headline, page.lead),
        tuple(page.lines),
        tuple(summarize_measure(n, measures[n], page.poisoned) for n in shown[:MOST_FIGURES]),
        tuple(name for name in names if (run.path / name).exists())[:MOST_FILES],
    )


def summarize_measure(name: str, measure: Measure, poisoned: bool) -> Figure:
    """Return a metric as a figure of a summary."""
    row = metric_names.metric_row(name, measure, poisoned)
    label = f"{row.label} ({row.group})" if row.group else row.label
    interval = f" [{row.interval}]" if row.interval else ""
    text = f"{row.value}{interval}, n = {row.n}".replace(WORD_JOINER, "")
    return Figure(name, label, measure.value, measure.low, measure.high, measure.n, text)


def write_standalone_page(run: Run, path: Path) -> Path:
    """Write a page for other people, without links to other runs and the runs' directory."""
    text = re.sub(r'<a href="\.\./[^"]*"([^>]*)>(.*?)</a>', r"<span\1>\2</span>", render_page(run))
    text = text.replace(str(escape(f" --runs {shlex.quote(str(run.path.parent))}")), "")
    with refuse_unwritable(path):
        remove_debris_of(path)
        write_whole(path, text)
    return path


def render_page(run: Run) -> str:
    """Return the page of a run as HTML."""
    return fill_template(template_values(run, build_page(run)))


def fill_template(values: dict[str, Any]) -> str:
    """Render a page as HTML from `template_values`."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breaks"] = allow_breaks
    environment.filters["prose"] = mark_code
    environment.filters["plain"] = lambda text: str(text).replace("`", "")
    return environment.get_template("page.jinja").render(values)


def template_values(run: Run, page: Page) -> dict[str, Any]:
    """Return everything the template shows."""
    manifest = run.manifest
    measures = metric_names.read_measures(run)
    rows = {k: metric_names.metric_row(k, m, page.poisoned) for k, m in measures.items()}
    notes = manifest.get("notes", {})
    sections = {title: make_section(make) for title, make in page.sections.items()}
    return {
        "verb": run.verb,
        "name": run.name,
        "status": manifest["status"],
        "error": manifest.get("error"),
        "page": page,
        "cards": [rows[name] for name in page.cards if name in rows],
        "sections": [(title, s) for title, s in sections.items() if s is not None],
        "rows": list(rows.values()),
        "folded": len(rows) > LONGEST_TABLE,
        "parents": group_parents(run),
        "inputs": typed_inputs(run),
        "command": shell_command(run),
        "started": manifest.get("started", ""),
        "seconds": manifest.get("seconds"),
        "memory": manifest.get("peak_memory_bytes"),
        "environment": manifest.get("environment", {}),
        "notes": [(name, note_text(value)) for name, value in notes.items()],
        "outputs": manifest.get("outputs", {}),
        "version": manifest.get("bezoar", ""),
    }


def make_section(make: Callable[[], Section | None]) -> Section | None:
    """Make one section; if that fails, return a section with the error."""
    try:
        return make()
    except Exception as problem:  # files may be gone, and a user's own methods may raise anything
        return Section(
            [Text(f"This section could not be made: {type(problem).__name__}: {problem}")]
        )


@dataclass(frozen=True)
class ParentLink:
    """A run that this one was made from. `href` is empty for one that lies elsewhere or is gone."""

    name: str
    href: str = ""
    headline: str = ""


def group_parents(run: Run) -> dict[str, list[ParentLink]]:
    """Return links to the parents of a run, by input or verb."""
    roles: dict[str, str] = {}
    for field, value in run.manifest.get("ask", {}).items():
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, dict) and isinstance(entry.get("run"), str):
                roles[entry["run"]] = field.replace("_", " ")
    groups: dict[str, list[ParentLink]] = {}
    for name in dict.fromkeys(map(str, run.manifest.get("parents", []))):
        role = roles.get(name) or f"{name.partition('-')[0]} run"
        groups.setdefault(role, []).append(parent_link(run, name))
    return groups


def typed_inputs(run: Run) -> dict[str, str]:
    """Return the inputs that are no runs, as the user typed them: data, encoders, methods."""
    verb_class = find_verb(run.verb)
    ask = run.manifest.get("ask", {})
    marks = {} if verb_class is None else field_marks(verb_class)
    texts = {}
    for name, value in run.manifest.get("typed", {}).items():
        answer = ask.get(name)
        is_run = isinstance(answer, dict) and "run" in answer
        if (mark := marks.get(name)) and mark.what and value and not is_run:
            texts[name.replace("_", " ")] = ", ".join(map(str, as_list(value)))
    return texts


def parent_link(run: Run, name: str) -> ParentLink:
    """Return the link to a parent's page: a relative one, and only to a sibling directory."""
    if not RUN_NAME.fullmatch(name):
        return ParentLink(name)
    try:
        parent = run.sibling(name)
        headline = build_page(parent).headline
    except Exception:  # its folder may be gone, or hold anything
        return ParentLink(name, headline="this run is no longer there")
    is_sibling = parent.path.parent == run.path.parent
    return ParentLink(name, f"../{name}/{PAGE}" if is_sibling else "", headline)


def allow_breaks(text: Any) -> Markup:
    """Return escaped text whose lines may break after a comma, as those of long specs must."""
    return escape(text).replace(",", Markup(",<wbr>"))


def mark_code(text: Any, breaks: bool = False) -> Markup:
    """Return escaped text in which words between backticks are code. breaks: see `allow_breaks`."""
    pieces = str(allow_breaks(text) if breaks else escape(text)).split("`")
    if len(pieces) % 2 == 0:  # one backtick has no partner
        return Markup("`".join(pieces))
    marked = [f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces)]
    return Markup("".join(marked))


def note_text(value: Any) -> str:
    """Return a note of the manifest as text."""
    if isinstance(value, dict):
        return ", ".join(f"{k}: {note_text(v)}" for k, v in value.items())
    if isinstance(value, list):
        entries = [note_text(v) for v in value[:LONGEST_LIST]]
        if len(value) > LONGEST_LIST:
            entries.append(f"… ({len(value)})")
        return ", ".join(entries)
    return str(value)
