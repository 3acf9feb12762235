"""The forms that tyro fills out of a command line: one for each verb, made from its source text, and those of other commands."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bezoar import registry
from bezoar.runs import verb_source
from bezoar.runs.verb import verb_names
from bezoar.runs.verb_source import FieldSource, VerbSource

DESCRIPTION = (
    "Is this data set poisoned, is this encoder backdoored, and what now? "
    "`bezoar COMMAND --help` says more of a command, `bezoar --version` which version this is."
)
JSON_FORMS = ("short", "full")


def help_text(text: str, metavar: str | None = None) -> Any:
    """The help of an option, for its annotation."""
    return tyro.conf.arg(help=text, metavar=metavar)


RunsFolder = Annotated[Path, help_text("directory of the runs")]
JsonForm = Annotated[
    Literal["no", "short", "full"],
    help_text(
        "print one JSON object: short (verdict, figures, files; --json alone) or the whole manifest",
        "[short|full]",
    ),
]
OpenPage = Annotated[bool, help_text("open the page in a browser")]


@dataclass(frozen=True)
class VerbOptions:
    """The options of every verb."""

    runs: RunsFolder = Path("runs")
    seed: Annotated[int, help_text("of everything random")] = 0
    device: Annotated[str, help_text("auto, cpu, cuda, cuda:1")] = "auto"
    dry: Annotated[
        bool, help_text("print what would be run: records, trainings, minutes; and stop")
    ] = False
    fresh: Annotated[bool, help_text("run again even if a finished run answers this")] = False
    open: OpenPage = False
    json: JsonForm = "no"


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
class Runs:
    """The runs there are, the newest first: what was asked, on what, what was found, when."""

    all: Annotated[bool, help_text("all of them, not the newest twenty alone")] = False
    runs: RunsFolder = Path("runs")
    json: Annotated[bool, help_text("print them as one JSON list")] = False


@dataclass(frozen=True)
class Show:
    """What a run found: every metric with n and interval, and where its page is. `last`: the newest run."""

    run: Annotated[
        str,
        tyro.conf.Positional,
        help_text("a run's directory, the start of its name, or `last`", "RUN"),
    ]
    page: Annotated[
        Path | None,
        help_text("write its page here, to hand around: without links to other runs", "FILE"),
    ] = None
    open: OpenPage = False
    runs: RunsFolder = Path("runs")
    json: JsonForm = "no"


@dataclass(frozen=True)
class Verify:
    """Derive the plan of a poison run again from its inputs, and compare it with the one on disk bit by bit."""

    run: Annotated[
        str, tyro.conf.Positional, help_text("a poison run's directory, or its name", "RUN")
    ]
    runs: RunsFolder = Path("runs")
    json: Annotated[bool, help_text("print what was verified as one JSON object")] = False


@dataclass(frozen=True)
class Completion:
    """Print what makes a shell complete commands and options: `source <(bezoar completion bash)`."""

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]


def parse(form: type, name: str, words: Sequence[str]) -> Any:
    """Parse the words after a command's name into its form. Prints help or an error and exits where that is due."""
    return tyro.cli(
        form,
        prog=f"bezoar {name}",
        args=spell_json(form, words),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def spell_json(form: Any, words: Sequence[str]) -> list[str]:
    """The words with `--json short` for a `--json` that no kind of JSON follows, for a form that has kinds of it."""
    if not any(f.name == "json" and f.default == "no" for f in dataclasses.fields(form)):
        return list(words)
    spelt: list[str] = []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        spelt.append(word)
        if word == "--json" and following not in JSON_FORMS:
            spelt.append("short")
    return spelt


def show_overview(words: Sequence[str], commands: dict[str, type]) -> None:
    """Print which commands there are and exit."""
    docs = {name: verb_source.read_docstring(name) for name in verb_names()}
    docs |= {name: form.__doc__ or "" for name, form in commands.items()}
    forms: dict[str, Any] = {}
    for name, doc in docs.items():
        forms[name] = dataclasses.make_dataclass(name.title(), [])
        forms[name].__doc__ = doc
    tyro.extras.subcommand_cli_from_dict(
        forms, prog="bezoar", description=DESCRIPTION, args=list(words)
    )


def command_form(source: VerbSource) -> type:
    """The dataclass that tyro fills for a verb: its fields, then the options of every verb."""
    fields = [form_field(field) for field in source.fields]
    fields += option_fields(VerbOptions)
    if source.class_variables.get("sweeps"):
        fields += option_fields(SweepOptions)
    if cases := source.class_variables.get("fail_on"):
        text = "exit with 3 on " + "; on ".join(f"{case}: {when}" for case, when in cases.items())
        text += "; with 5 where that could not be told"
        choices = Annotated[Literal["never", *cases], help_text(text)]  # type: ignore[valid-type]
        fields.append(("fail_on", choices, dataclasses.field(default="never")))
    form = dataclasses.make_dataclass(source.name.title(), fields, frozen=True, kw_only=True)
    form.__doc__ = source.doc
    return form


def form_field(field: FieldSource) -> tuple[str, Any, Any]:
    """A verb's field for `make_dataclass`; inputs are shown by what they take, such as DATA."""
    is_required = field.default is dataclasses.MISSING
    kind = tuple[str, ...] if field.takes.several else field.type
    metavar = field.takes.what.upper() or None
    if metavar and kind == tuple[str, ...]:
        metavar += " ..."
    if metavar and field.takes.positional and not is_required:
        metavar = f"[{metavar}]"
    marks = [help_text(field.help, metavar)]
    if field.takes.positional:
        marks.insert(0, tyro.conf.Positional)
    hint = kind | None if field.default is None else kind
    return field.name, Annotated[hint, *marks], dataclasses.field(default=field.default)


def option_fields(options: type) -> list[tuple[str, Any, Any]]:
    """The fields of a dataclass of options, for `make_dataclass`."""
    hints = typing.get_type_hints(options, include_extras=True)
    return [
        (f.name, hints[f.name], dataclasses.field(default=f.default))
        for f in dataclasses.fields(options)
    ]
