"""The command line: one sub-command a verb, with an option for each field, and a few others.

It contains no name of a verb or method. A verb's sub-command is made from the verb's source text
(see `runs.verb_source`); the verb, and torch with it, is imported after the arguments were checked.
"""

import dataclasses
import errno
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from bezoar.cli import commands, forms
from bezoar.cli.checks import check_arguments
from bezoar.cli.endings import (
    open_page,
    print_ending,
    print_json,
    print_plan,
    summary_json,
    warn_lines,
)
from bezoar.errors import UserError, suggest
from bezoar.runs import verb_source
from bezoar.runs.verb import Settings, join_inputs, load_verb, verb_names
from bezoar.runs.verb_source import VerbSource
from bezoar.terminal import warn

DONE, USER_ERROR, FAILED_ON, INCOMPLETE, UNDECIDED = 0, 2, 3, 4, 5
INTERRUPTED, BROKEN_PIPE = 130, 141
DISK_ERRORS = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return its exit status.

    0: done. 1: a bug. 2: wrong input. 3: `--fail-on` found its case. 4: done, except for parts that
    could not be read or asked, which the run's notes (`incomplete`) name. 5: `--fail-on` could not
    be decided. 130: interrupted. 141: the reader of the output has ended.
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
    except BrokenPipeError:  # the reader has ended: `bezoar list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in DISK_ERRORS and error.filename is None:
            raise
        warn(f"bezoar: {error.filename or 'disk'}: {error.strerror}")
        return USER_ERROR


def run_command(words: Sequence[str]) -> int:
    """Parse a command line and execute it. Returns the exit status."""
    name = words[0] if words else "--help"
    if name == "--version":
        print(f"bezoar {version('bezoar')}")
        return DONE
    if name in COMMANDS:
        form, action = COMMANDS[name]
        action(forms.parse(form, name, words[1:]))
        return DONE
    if name in verb_names():
        source = verb_source.read_verb(name)
        return run_verb(source, forms.parse(forms.command_form(source), name, words[1:]))
    if name in ("-h", "--help"):
        forms.show_overview({command: form for command, (form, _) in COMMANDS.items()})
        return DONE
    names = [*verb_names(), *COMMANDS]
    raise UserError(f"no command {name!r}{suggest(name, names)}; there are: {', '.join(names)}")


def run_verb(source: VerbSource, arguments: Any) -> int:
    """Run a verb. The output ends with the run's directory, or is one JSON object."""
    for field in source.fields:
        if field.takes.several:
            joined = join_inputs(getattr(arguments, field.name), field.takes.what)
            arguments = dataclasses.replace(arguments, **{field.name: joined})
    check_arguments(source, arguments)
    # From here on torch is imported, which wrong arguments and the other commands do without.
    verb_class = load_verb(source.name)
    verb = verb_class(**{field.name: getattr(arguments, field.name) for field in source.fields})
    settings = Settings(arguments.runs, arguments.seed, arguments.device, arguments.fresh)
    if source.class_variables.get("sweeps"):
        settings = dataclasses.replace(settings, workers=arguments.workers, ray=arguments.ray)
    if arguments.dry:
        from bezoar.runs.estimates import describe_plan

        plan = describe_plan(verb, settings)
        print_plan(plan) if arguments.json == "no" else print_json(plan)
        return DONE
    from bezoar.reports.page import execute, summarize_run

    run = execute(verb, settings)
    manifest = run.manifest
    case = getattr(arguments, "fail_on", "never")
    status, undecided = exit_status(verb_class, case, manifest)
    if arguments.json == "full":
        print_json(manifest)
    elif arguments.json == "short":
        print_json(summary_json(run, summarize_run(run), status, undecided))
    else:
        print_ending(run, summarize_run(run))
    sys.stdout.flush()
    warn_lines(source.name, manifest["notes"].get("incomplete") or [])  # of an older run, too
    if status == UNDECIDED:
        warn_lines(source.name, [f"--fail-on {case}: could not tell: {line}" for line in undecided])
    if arguments.open:
        open_page(run)
    return status


def exit_status(verb_class: Any, case: str, manifest: Mapping[str, Any]) -> tuple[int, list[str]]:
    """The exit status of a run, and why a verb that decides something could not decide it here."""
    undecided = verb_class.undecided(manifest) if hasattr(verb_class, "undecided") else []
    if case != "never" and verb_class.fails(case, manifest):
        return FAILED_ON, undecided
    if case != "never" and undecided:
        return UNDECIDED, undecided
    return (INCOMPLETE if manifest["notes"].get("incomplete") else DONE), undecided


def print_completion(arguments: forms.Completion) -> None:
    """`bezoar completion SHELL`."""
    commands.print_completion(arguments, {name: form for name, (form, _) in COMMANDS.items()})


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "list": (forms.List, commands.show_methods),
    "runs": (forms.Runs, commands.show_runs),
    "show": (forms.Show, commands.show_run),
    "verify": (forms.Verify, commands.verify_run),
    "completion": (forms.Completion, print_completion),
}
