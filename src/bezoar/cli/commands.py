"""The commands beside the verbs: `list`, `runs`, `show`, `verify`, `completion`."""

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bezoar import method_source, registry
from bezoar.cli import forms
from bezoar.cli.endings import open_page, print_ending, print_json, print_metrics, summary_json
from bezoar.errors import UserError, suggest
from bezoar.runs import verb_source
from bezoar.runs.run import PAGE, Run, get_run, newest_runs
from bezoar.runs.summary import read_summary
from bezoar.runs.verb import verb_names
from bezoar.terminal import clean_line, print_line

NEWEST = 20  # runs that are listed unless all are wanted
LONGEST = {"run": 40, "of": 48, "status": 12, "when": 20, "finding": 120}  # characters of a cell


def show_methods(arguments: forms.List) -> None:
    """`bezoar list [KIND] [NAME]`."""
    if arguments.kind not in (None, *registry.KINDS):
        kinds = ", ".join(registry.KINDS)
        holders = [k for k in registry.KINDS if arguments.kind in registry.method_names(k)]
        hint = "".join(f" (did you mean `list {k} {arguments.kind}`?)" for k in holders[:1])
        hint = hint or suggest(str(arguments.kind), registry.KINDS)
        raise UserError(f"no kind {arguments.kind!r} of methods{hint}; there are: {kinds}")
    methods = {
        kind: [
            describe_method(kind, name)
            for name in ([arguments.name] if arguments.name else registry.method_names(kind))
        ]
        for kind in ([arguments.kind] if arguments.kind else registry.KINDS)
    }
    if arguments.json:
        raw = {
            kind: [dataclasses.asdict(d) for d in descriptions]
            for kind, descriptions in methods.items()
        }
        print(json.dumps(raw, indent=1))
        return
    for kind, descriptions in methods.items():
        print(kind)
        for method in descriptions:
            print(f"  {method.name}: {method.summary}")
            if arguments.name and method.text:
                print("", textwrap.indent(method.text, "    "), "", sep="\n")
            for field in method.fields if arguments.kind else ():
                default = f" = {field.default}" if field.default else ""
                print(f"      {field.name}: {field.type}{default}  {field.help}")


def describe_method(kind: str, name: str) -> method_source.Description:
    """A method's description from its source text, under its name in specs."""
    return dataclasses.replace(method_source.describe(registry.method_path(kind, name)), name=name)


def show_runs(arguments: forms.Runs) -> None:
    """`bezoar runs`."""
    runs = newest_runs(arguments.runs)
    rows = [describe_run(run) for run in runs[: None if arguments.all else NEWEST]]
    if arguments.json:
        print_json(rows)
        return
    if not rows:
        print_line(f"no runs in {arguments.runs}")
        return
    table = Table(*LONGEST, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(shorten(row[key], most)) for key, most in LONGEST.items()))
    Console(soft_wrap=True, width=240).print(table)
    if len(rows) < len(runs):
        print_line(f"and {len(runs) - len(rows)} older ones: bezoar runs --all")


def shorten(text: str, most: int) -> str:
    """One line of a text, cut at its end."""
    line = clean_line(text)
    return line if len(line) <= most else f"{line[: most - 1]}…"


def describe_run(run: Run) -> dict[str, str]:
    """The inputs of a run, how and when it ended, and the first sentence of its finding."""
    row = {"run": run.name, "of": "", "status": "unreadable", "when": "", "finding": ""}
    try:
        manifest = run.manifest
        finding = str(manifest.get("error") or "not finished; the same command goes on from here")
        if manifest["status"] == "done":
            summary = read_summary(run.path)
            finding = summary.finding if summary else str(manifest["notes"].get("verdict", ""))
        of = inputs_text(manifest["verb"], manifest.get("typed", {}))
        status, when = manifest["status"], str(manifest.get("started", ""))
        return row | {"of": of, "status": status, "when": when, "finding": finding}
    except UserError as error:
        return row | {"finding": str(error)}


def inputs_text(verb: str, typed: dict[str, Any]) -> str:
    """The inputs that a verb takes without an option's name, as text."""
    if verb not in verb_names():
        return ""
    names = [f.name for f in verb_source.read_verb(verb).fields if f.takes.positional]
    return " ".join(input_text(typed[name]) for name in names if typed.get(name) is not None)


def input_text(value: Any) -> str:
    """A field's value from a manifest, in a few words."""
    if isinstance(value, list):
        return " ".join(map(input_text, value))
    if isinstance(value, dict):  # a verb in place of its run
        return f"{value.get('verb', '')}({inputs_text(str(value.get('verb', '')), value)})"
    return str(value)


def show_run(arguments: forms.Show) -> None:
    """`bezoar show RUN`."""
    run = get_run(arguments.runs, arguments.run)
    manifest = run.manifest
    if arguments.json == "full":
        print_json(manifest)
        return
    page = ensure_page(run, arguments.page)  # first: where it cannot be made, nothing is printed
    summary = read_summary(run.path) if run.is_done else None
    if arguments.json == "short":
        if summary is None:
            raise UserError(
                f"run {run.name} is {manifest['status']}; --json full prints its manifest"
            )
        print_json(summary_json(run, summary, 0, ()))
        return
    error = f" ({manifest['error']})" if manifest.get("error") else ""
    print_line(f"{run.name}: {manifest['status']}{error}")
    print_metrics(manifest)
    if page is not None and page.parent != run.path:
        print_line(f"page: {page}")
    if summary is not None:
        print_ending(run, summary)
    if arguments.open and page is not None:
        open_page(run)


def ensure_page(run: Run, path: Path | None) -> Path | None:
    """Write a run's page to a path, or into a finished run that lacks its page or summary.

    Returns the path of the page, or None.
    """
    page = run.path / PAGE
    is_whole = page.exists() and read_summary(run.path) is not None
    if path is None and (is_whole or not run.is_done):
        return page if page.exists() else None
    # Imported here because it imports torch, which a run that has its page does without.
    from bezoar.reports.page import write_page, write_standalone_page

    if not is_whole and run.is_done:
        write_page(run)
    return page if path is None else write_standalone_page(run, path)


def verify_run(arguments: forms.Verify) -> None:
    """`bezoar verify RUN`."""
    run = get_run(arguments.runs, arguments.run)
    # Imported here because it imports torch, which a name that is wrong does without.
    from bezoar.verbs.poison import verify_plan

    verified = verify_plan(run)
    if arguments.json:
        print(json.dumps(verified))
    else:
        print_line(f"{run.name} verifies: {verified['records']} records, plan {verified['plan']}")


BASH = """_bezoar() {{
  local words="$1"
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  if [ "$COMP_CWORD" -eq 1 ]; then words="{commands}"; fi
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
  if [ "$COMP_CWORD" -gt 1 ]; then COMPREPLY+=($(compgen -f -- "${{COMP_WORDS[COMP_CWORD]}}")); fi
}}
complete -o filenames -F _bezoar bezoar
"""


def print_completion(arguments: forms.Completion, others: dict[str, type]) -> None:
    """`bezoar completion SHELL`. others: the forms of the commands beside the verbs."""
    command_forms = {n: forms.command_form(verb_source.read_verb(n)) for n in verb_names()} | others
    options = {
        name: [f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(form)]
        for name, form in command_forms.items()
    }
    if arguments.shell == "fish":
        for name, names in options.items():
            print(f"complete -c bezoar -n __fish_use_subcommand -a {name}")
            for option in names:
                condition = f"'__fish_seen_subcommand_from {name}'"
                print(f"complete -c bezoar -n {condition} -l {option.removeprefix('--')}")
        return
    cases = "\n".join(
        f'    {name}) words="{" ".join(names)}" ;;' for name, names in options.items()
    )
    zsh = "autoload -U bashcompinit && bashcompinit\n" if arguments.shell == "zsh" else ""
    print(zsh + BASH.format(cases=cases, commands=" ".join(options)), end="")
