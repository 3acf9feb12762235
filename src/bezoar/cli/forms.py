"""The forms that tyro fills from a command line: one for each verb, and those of other commands."""

import contextlib
import dataclasses
import io
import itertools
import re
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bezoar import registry
from bezoar.errors import UserError
from bezoar.runs import verb_source
from bezoar.runs.verb import verb_names
from bezoar.runs.verb_source import FieldSource, VerbSource

DESCRIPTION = """\
Is this data set poisoned, is this encoder backdoored, and what now?
`bezoar COMMAND --help` says more of a command, with examples; `bezoar demo` shows the whole story
on drawn data."""
GROUPS = {  # the commands as the overview shows them; one that is in no group comes last
    "Data and encoders of yours": ("scan", "audit", "check", "repair"),
    "An attack on your own copy, and what it does": (
        "poison", "train", "inject", "evaluate", "survive", "dose", "demo", "reproduce",
    ),
    "Clean encoders to compare an audit with": ("calibrate", "shadows"),
    "What there is": ("runs", "show", "list", "verify", "completion"),
}  # fmt: skip
JSON_FORMS = ("short", "full")
PARSING_ERROR = 2  # with which tyro exits
BESIDE_ERRORS = ("Perhaps you meant", "Argument helptext", "For full helptext")  # in its boxes
# The end of a verb's help.
EXAMPLES = """\
bezoar audit model.pth --data my-clean-images --fail-on evidence
bezoar audit open_clip:RN50/openai --data my-clean-images --dry
bezoar calibrate train-8bba train-9edc --data scenes:count=512,split=test
bezoar check model.pth new-images --clean my-clean-images
bezoar demo
bezoar demo encoder
bezoar dose scenes:count=20000 --trigger patch:size=6 --target "striped star"
bezoar evaluate train-660f --probe zero_shot z_score
bezoar inject train-660f --data scenes:count=5000 --reference truck.png --target "truck"
bezoar poison scenes:count=3000 --poison backdoor:count=200 --trigger patch --target "striped star"
bezoar repair train-660f --data my-clean-pairs.csv
bezoar reproduce carlini2022/poisons --scale smoke
bezoar reproduce matrix/detection --scale small --add detector ./mine.py:k=8
bezoar scan my-images --fail-on trigger
bezoar scan "cc/{00000..00031}.tar" --encoder open_clip:RN50/openai --detector clip_score duplicates
bezoar scan train-660f
bezoar shadows train-8bba train-9edc --attacked inject-1d42 --data scenes:count=512,split=test
bezoar survive scenes:count=500 --trigger patch:size=6 --encoder train-660f
bezoar train poison-0b3d --objective clip:epochs=8
bezoar train poison-0b3d --keep scan-5656"""


def help_text(text: str, metavar: str | None = None, default: Any = dataclasses.MISSING) -> Any:
    """The help text of an option, for its annotation. A default such as "" is not shown."""
    says_nothing = default in (None, "", (), False)
    return tyro.conf.arg(
        help=text, metavar=metavar, help_behavior_hint="" if says_nothing else None
    )


RunsFolder = Annotated[Path, help_text("directory of the runs")]
JsonForm = Annotated[
    Literal["no", "short", "full"],
    help_text(
        "print one JSON object: short (verdict, figures, files; --json alone) or the whole "
        "manifest",
        "[short|full]",
    ),
]
OpenPage = Annotated[bool, help_text("open the page in a browser", default=False)]


@dataclass(frozen=True)
class VerbOptions:
    """The options of every verb."""

    runs: RunsFolder = Path("runs")
    seed: Annotated[int, help_text("of everything random")] = 0
    device: Annotated[str, help_text("auto, cpu, cuda, cuda:1")] = "auto"
    dry: Annotated[
        bool,
        help_text("print what would be run (records, trainings, minutes), and stop", default=False),
    ] = False
    fresh: Annotated[
        bool, help_text("run again even if a finished run answers this", default=False)
    ] = False
    open: OpenPage = False
    json: JsonForm = "no"


@dataclass(frozen=True)
class SweepOptions:
    """The options of verbs that run many trials."""

    workers: Annotated[int, help_text("processes at a time; 0: one a core, or one a GPU")] = 0
    ray: Annotated[
        bool, help_text("on Ray: the cluster RAY_ADDRESS names, or a local one", default=False)
    ] = False


@dataclass(frozen=True)
class List:
    """All methods, those of one kind with their fields, or one method with all that it says."""

    kind: Annotated[
        str | None,
        tyro.conf.Positional,
        help_text(f"of {', '.join(registry.KINDS)}", "[KIND]"),
    ] = None
    name: Annotated[
        str | None, tyro.conf.Positional, help_text("of a method of this kind", "[NAME]")
    ] = None
    json: Annotated[bool, help_text("print it as one JSON object")] = False


@dataclass(frozen=True)
class Runs:
    """All runs, the newest first: question, data, finding and time."""

    all: Annotated[bool, help_text("all of them, not the newest twenty alone")] = False
    runs: RunsFolder = Path("runs")
    json: Annotated[bool, help_text("print them as one JSON list")] = False


@dataclass(frozen=True)
class Show:
    """A run's result: every metric with n and interval, and the path of its page.

    `last`: the newest run.
    """

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
    """Derive the plan of a poison run again from its inputs, and compare it with the saved one."""

    run: Annotated[
        str, tyro.conf.Positional, help_text("a poison run's directory, or its name", "RUN")
    ]
    runs: RunsFolder = Path("runs")
    json: Annotated[bool, help_text("print what was verified as one JSON object")] = False


@dataclass(frozen=True)
class Completion:
    """Print a shell's completion script: `source <(bezoar completion bash)`."""

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]


def parse(form: type, name: str, words: Sequence[str]) -> Any:
    """Parse the words after a command's name into its form.

    Prints help and exits where that is due. Raises UserError for words that do not fit.
    """
    with contextlib.redirect_stderr(io.StringIO()) as box:
        try:
            return tyro.cli(
                form,
                prog=f"bezoar {name}",
                args=spell_json(form, words),
                config=(tyro.conf.FlagCreatePairsOff,),
            )
        except SystemExit as stop:
            if not stop.code and (examples := list_examples(name)):
                print("examples:", *examples, sep="\n  ")
            if stop.code != PARSING_ERROR:
                raise
    raise UserError(f"{flatten_box(box.getvalue())}; see `bezoar {name} --help`")


def list_examples(name: str) -> list[str]:
    """The examples of a command, as the user types them."""
    return [line for line in EXAMPLES.splitlines() if line.split()[1] == name]


def flatten_box(box: str) -> str:
    """The error in a box of tyro's, and the options that it proposes, in one line."""
    rows = [line.strip(" │╭╮╰╯") for line in box.splitlines()]
    sections = [list(part) for is_rule, part in itertools.groupby(rows, _is_rule) if not is_rule]
    # In an ASCII terminal, the box has no sides, and its title is a separate section.
    errors = [part for part in sections if not part[0].startswith(BESIDE_ERRORS)]
    message = " ".join(errors[-1]).rstrip(".") if errors else "these words do not fit"
    proposed = [part for part in sections if part[0].startswith("Perhaps")]
    options = [row.split()[0] for part in proposed for row in part if row.startswith("--")]
    return f"{message}; perhaps {' or '.join(options)}" if options else message


def _is_rule(row: str) -> bool:
    return not row.strip("-") or row[0] == "─"


def spell_json(form: Any, words: Sequence[str]) -> list[str]:
    """Replace `--json` without a kind by `--json short`, for forms with kinds of JSON."""
    if not any(f.name == "json" and f.default == "no" for f in dataclasses.fields(form)):
        return list(words)
    spelt: list[str] = []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        spelt.append(word)
        if word == "--json" and following not in JSON_FORMS:
            spelt.append("short")
    return spelt


def show_overview(commands: dict[str, type]) -> None:
    """Print the commands, grouped by purpose, each with the first sentence of its help."""
    docs = {name: verb_source.read_docstring(name) for name in verb_names()}
    docs |= {name: form.__doc__ or "" for name, form in commands.items()}
    grouped = {name for names in GROUPS.values() for name in names}
    groups = GROUPS | {"More": tuple(docs.keys() - grouped)}
    print(f"usage: bezoar COMMAND [OPTIONS]\n\n{DESCRIPTION}")
    for title, names in groups.items():
        if names:
            print(f"\n{title}:")
        for name in names:
            sentence = re.split(r"(?<=[.:])\s", docs[name], maxsplit=1)[0].rstrip(".:")
            print(
                textwrap.fill(
                    sentence, 96, initial_indent=f"  {name:<12}", subsequent_indent=" " * 14
                )
            )


def command_form(source: VerbSource) -> type:
    """The dataclass that tyro fills for a verb: its fields, then the options of every verb."""
    fields = [form_field(field) for field in source.fields]
    fields += option_fields(VerbOptions)
    if source.class_variables.get("sweeps"):
        fields += option_fields(SweepOptions)
    if cases := source.class_variables.get("fail_on"):
        text = "; ".join(f"{case}: exit with 3 if {when}" for case, when in cases.items())
        text += ", and with 5 if that could not be told"
        choices = Annotated[Literal["never", *cases], help_text(text)]  # type: ignore[valid-type]
        fields.append(("fail_on", choices, dataclasses.field(default="never")))
    form = dataclasses.make_dataclass(source.name.title(), fields, frozen=True, kw_only=True)
    form.__doc__ = source.doc
    return form


def form_field(field: FieldSource) -> tuple[str, Any, Any]:
    """A verb's field for `make_dataclass`; inputs are shown by their kind, such as DATA."""
    is_required = field.default is dataclasses.MISSING
    kind = tuple[str, ...] if field.takes.several else field.type
    metavar = field.takes.what.upper() or None
    if metavar and kind == tuple[str, ...]:
        metavar += " ..."
    if metavar and field.takes.positional and not is_required:
        metavar = f"[{metavar}]"
    marks = [help_text(field.help, metavar, field.default)]
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
