"""The command line: a sub-command for each verb, with an option for each of its fields; and `list`, `show`, `verify`.

It knows no verb and no method by name. A verb's sub-command is made from the verb's source text (see
`runs.verb_source`); the verb, and torch with it, is imported once the arguments are known to be right.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bezoar import registry
from bezoar.errors import UserError
from bezoar.runs import verb_source
from bezoar.runs.run import PAGE, Run, get_run
from bezoar.runs.verb import Settings, input_to_json, load_verb, verb_name, verb_names
from bezoar.runs.verb_source import FieldSource, VerbSource
from bezoar.terminal import clean_json, clean_line, print_line, warn

DESCRIPTION = (
    "Is this data set poisoned, is this encoder backdoored, and what now? "
    "`bezoar COMMAND --help` says more of a command, `bezoar --version` which version this is."
)
LONGEST_NAME = 160  # characters of a metric
MOST_LINES = 100  # of what is incomplete
DONE, USER_ERROR, FAILED_ON, INCOMPLETE, INTERRUPTED, BROKEN_PIPE = 0, 2, 3, 4, 130, 141
DISK_ERRORS = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)


def help_text(text: str, metavar: str | None = None) -> Any:
    """The help of an option, for its annotation."""
    return tyro.conf.arg(help=text, metavar=metavar)


RunsFolder = Annotated[Path, help_text("directory of the runs")]


@dataclass(frozen=True)
class VerbOptions:
    """The options of every verb."""

    runs: RunsFolder = Path("runs")
    seed: Annotated[int, help_text("of everything random")] = 0
    device: Annotated[str, help_text("auto, cpu, cuda, cuda:1")] = "auto"
    dry: Annotated[bool, help_text("print what would be run, and stop")] = False
    fresh: Annotated[bool, help_text("run again even if a finished run answers this")] = False
    json: Annotated[bool, help_text("print the manifest as one JSON object")] = False


@dataclass(frozen=True)
class SweepOptions:
    """The options of verbs that run many trials."""

    workers: Annotated[int, help_text("processes at a time; 0: one a core, or one a GPU")] = 0
    ray: Annotated[bool, help_text("on Ray: the cluster RAY_ADDRESS names, or a local one")] = False


@dataclass(frozen=True)
class List:
    """What there is, with every field: all methods, or those of one kind."""

    kind: Annotated[
        str | None,
        tyro.conf.Positional,
        help_text(f"of {', '.join(registry.KINDS)}", "[KIND]"),
    ] = None
    json: Annotated[bool, help_text("print it as one JSON object")] = False


@dataclass(frozen=True)
class Show:
    """What a run found: its metrics with n and interval, and where its report is."""

    run: Annotated[
        str, tyro.conf.Positional, help_text("a run's directory, or the start of its name", "RUN")
    ]
    page: Annotated[
        Path | None,
        help_text("write its page here, to hand around: without links to other runs", "FILE"),
    ] = None
    runs: RunsFolder = Path("runs")
    json: Annotated[bool, help_text("print the manifest as one JSON object")] = False


@dataclass(frozen=True)
class Verify:
    """Derive the plan of a poison run again from its inputs, and compare it with the one on disk bit by bit."""

    run: Annotated[
        str, tyro.conf.Positional, help_text("a poison run's directory, or its name", "RUN")
    ]
    runs: RunsFolder = Path("runs")
    json: Annotated[bool, help_text("print what was verified as one JSON object")] = False


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return its exit status.

    0: done. 1: a bug. 2: the user's input is at fault. 3: `--fail-on` has found its case. 4: done, except for what could not
    be read or asked, which the run's notes (`incomplete`) name. 130: interrupted. 141: nobody reads what it prints.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file need not be UTF-8
    try:
        try:
            return run_command(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # the console that prints help
            return BROKEN_PIPE
        raise
    except UserError as error:
        warn(f"bezoar: {error}")
        return USER_ERROR
    except (MemoryError, RecursionError) as error:
        what = "memory" if isinstance(error, MemoryError) else "depth"
        warn(f"bezoar: what is asked, or a file that is read, takes more {what} than there is")
        return USER_ERROR
    except KeyboardInterrupt:
        warn("bezoar: stopped; the same command goes on from here")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read has seen enough: `bezoar list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in DISK_ERRORS and error.filename is None:
            raise
        warn(f"bezoar: {error.filename or 'disk'}: {error.strerror}")
        return USER_ERROR


def run_command(words: Sequence[str]) -> int:
    """Parse the words of a command line and do what they ask. Returns the exit status."""
    name = words[0] if words else ""
    if name == "--version":
        print(f"bezoar {version('bezoar')}")
        return DONE
    if name in COMMANDS:
        form, action = COMMANDS[name]
        return action(parse(form, name, words[1:]))
    if name in verb_names():
        source = verb_source.read_verb(name)
        return run_verb(source, parse(command_form(source), name, words[1:]))
    return show_overview(words)


def parse(form: type, name: str, words: Sequence[str]) -> Any:
    """Parse the words after a command's name into its form. Prints help or an error and exits where that is due."""
    return tyro.cli(
        form, prog=f"bezoar {name}", args=list(words), config=(tyro.conf.FlagCreatePairsOff,)
    )


def show_overview(words: Sequence[str]) -> int:
    """Print which commands there are, or that the words name none, and exit."""
    docs = {name: verb_source.read_docstring(name) for name in verb_names()}
    docs |= {name: form.__doc__ or "" for name, (form, _) in COMMANDS.items()}
    forms: dict[str, Any] = {}
    for name, doc in docs.items():
        forms[name] = dataclasses.make_dataclass(name.title(), [])
        forms[name].__doc__ = doc
    tyro.extras.subcommand_cli_from_dict(
        forms, prog="bezoar", description=DESCRIPTION, args=list(words)
    )
    return USER_ERROR


# Verbs


def command_form(source: VerbSource) -> type:
    """The dataclass that tyro fills for a verb: its fields, then the options of every verb."""
    fields = [form_field(field) for field in source.fields]
    fields += option_fields(VerbOptions)
    if source.class_variables.get("sweeps"):
        fields += option_fields(SweepOptions)
    if cases := source.class_variables.get("fail_on"):
        text = "exit with 3 on " + "; on ".join(f"{case}: {when}" for case, when in cases.items())
        choices = Annotated[Literal["never", *cases], help_text(text)]  # type: ignore[valid-type]
        fields.append(("fail_on", choices, dataclasses.field(default="never")))
    form = dataclasses.make_dataclass(source.name.title(), fields, frozen=True, kw_only=True)
    form.__doc__ = source.doc
    return form


def form_field(field: FieldSource) -> tuple[str, Any, Any]:
    """A verb's field for `make_dataclass`; inputs are shown by what they take, such as DATA."""
    is_required = field.default is dataclasses.MISSING
    metavar = field.takes.what.upper() or None
    if metavar and field.type == tuple[str, ...]:
        metavar += " ..."
    if metavar and field.takes.positional and not is_required:
        metavar = f"[{metavar}]"
    marks = [help_text(field.help, metavar)]
    if field.takes.positional:
        marks.insert(0, tyro.conf.Positional)
    hint = field.type | None if field.default is None else field.type
    return field.name, Annotated[hint, *marks], dataclasses.field(default=field.default)


def option_fields(options: type) -> list[tuple[str, Any, Any]]:
    """The fields of a dataclass of options, for `make_dataclass`."""
    hints = typing.get_type_hints(options, include_extras=True)
    return [
        (f.name, hints[f.name], dataclasses.field(default=f.default))
        for f in dataclasses.fields(options)
    ]


def run_verb(source: VerbSource, arguments: Any) -> int:
    """Run the verb that was asked for. What it prints ends with the run's directory, or is the manifest."""
    verb_class = load_verb(source.name)
    verb = verb_class(**{field.name: getattr(arguments, field.name) for field in source.fields})
    if arguments.dry:
        print_json({"verb": verb_name(verb), **input_to_json(verb)})
        return DONE
    # Imported here because it imports torch, which wrong arguments and `list` do without.
    from bezoar.reports.page import execute

    settings = Settings(arguments.runs, arguments.seed, arguments.device, arguments.fresh)
    if source.class_variables.get("sweeps"):
        settings = dataclasses.replace(settings, workers=arguments.workers, ray=arguments.ray)
    run = execute(verb, settings)
    manifest = run.manifest
    incomplete = manifest["notes"].get("incomplete") or []
    status = INCOMPLETE if incomplete else DONE
    case = getattr(arguments, "fail_on", "never")
    if case != "never" and verb_class.fails(case, manifest):
        status = FAILED_ON
    if arguments.json:
        print_json(manifest)
    else:
        print_metrics(manifest)
        print_line(f"report: {run.path / PAGE}")
        print_line(run.path)
    sys.stdout.flush()
    for line in incomplete[:MOST_LINES]:  # of a run that was done before, too
        warn(f"{source.name}: {line}")
    if len(incomplete) > MOST_LINES:
        warn(f"{source.name}: and {len(incomplete) - MOST_LINES} more")
    return status


# The other commands


def show_methods(arguments: List) -> int:
    """`bezoar list [KIND]`."""
    if arguments.kind not in (None, *registry.KINDS):
        kinds = ", ".join(registry.KINDS)
        raise UserError(f"no kind {arguments.kind!r} of methods; there are: {kinds}")
    methods = {
        kind: [describe_method(kind, name) for name in registry.method_names(kind)]
        for kind in ([arguments.kind] if arguments.kind else registry.KINDS)
    }
    if arguments.json:
        raw = {
            kind: [dataclasses.asdict(d) for d in descriptions]
            for kind, descriptions in methods.items()
        }
        print(json.dumps(raw, indent=1))
        return DONE
    for kind, descriptions in methods.items():
        print(kind)
        for method in descriptions:
            print(f"  {method.name}: {method.summary}")
            for field in method.fields if arguments.kind else ():
                default = f" = {field.default}" if field.default else ""
                print(f"      {field.name}: {field.type}{default}  {field.help}")
    return DONE


def describe_method(kind: str, name: str) -> registry.Description:
    """What a method's source text says of it, under its name in specs."""
    path = registry.PACKAGE / registry.KINDS[kind] / f"{name}.py"
    return dataclasses.replace(registry.describe(path), name=name)


def show_run(arguments: Show) -> int:
    """`bezoar show RUN`."""
    run = get_run(arguments.runs, arguments.run)
    manifest = run.manifest
    if arguments.json:
        print_json(manifest)
        return DONE
    page = ensure_page(run, arguments.page)  # first: where it cannot be made, nothing is printed
    error = f" ({manifest['error']})" if manifest.get("error") else ""
    print_line(f"{run.name}: {manifest['status']}{error}")
    print_metrics(manifest)
    if page is not None:
        print_line(f"report: {page}")
    return DONE


def ensure_page(run: Run, path: Path | None) -> Path | None:
    """Write a run's page to a path, or into the run where it is done and has none.

    Returns the path of the page; None where there is none.
    """
    page = run.path / PAGE
    if path is None and (page.exists() or not run.is_done):
        return page if page.exists() else None
    # Imported here because it imports torch, which a run that has its page does without.
    from bezoar.reports.page import write_page, write_standalone_page

    return write_page(run) if path is None else write_standalone_page(run, path)


def verify_run(arguments: Verify) -> int:
    """`bezoar verify RUN`."""
    run = get_run(arguments.runs, arguments.run)
    # Imported here because it imports torch, which a name that is wrong does without.
    from bezoar.verbs.poison import verify_plan

    verified = verify_plan(run)
    if arguments.json:
        print(json.dumps(verified))
    else:
        print_line(f"{run.name} verifies: {verified['records']} records, plan {verified['plan']}")
    return DONE


def print_json(manifest: dict[str, Any]) -> None:
    """Print a manifest as one JSON object."""
    print(clean_json(json.dumps(manifest, indent=1, ensure_ascii=False)))


def print_metrics(manifest: dict[str, Any]) -> None:
    """Print a run's verdict, where there is one, and its metrics with n and 95 % interval."""
    if verdict := manifest.get("notes", {}).get("verdict"):
        print_line(verdict)
    table = Table("metric", "value", "95 % interval", "n", box=None, pad_edge=False)
    for name, measure in manifest["metrics"].items():
        value, low, high = (float(measure[key]) for key in ("value", "low", "high"))
        table.add_row(
            escape(clean_line(name, LONGEST_NAME)),
            f"{value:.4g}",
            f"{low:.4g} .. {high:.4g}",
            str(measure["n"]),
        )
    if table.rows:
        # Wide and unwrapped, because nobody can ask for a metric whose name is cut off.
        Console(soft_wrap=True, width=200).print(table)


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "list": (List, show_methods),
    "show": (Show, show_run),
    "verify": (Verify, verify_run),
}
