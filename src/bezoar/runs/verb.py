"""Verbs: the values of their fields, how these are written as JSON, and the settings of a run.

A *verb* is a frozen dataclass in a file of `bezoar/verbs`, named like the file. Its fields are the
question; its `work` answers it in a run. This module imports no torch: the command line needs it
before it imports a verb.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import importlib
import os
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from bezoar import method_source, registry
from bezoar.data.files.paths import IMAGE_SUFFIXES, open_regular
from bezoar.errors import UserError, describe_neighbours, suggest
from bezoar.runs.run import Run, find_run, get_run, newest_runs

if TYPE_CHECKING:
    from bezoar.evaluation.scores import Measure

VERBS = registry.PACKAGE / "verbs"
HASHED_WHOLE = 64 << 20  # bytes; larger files are hashed in pieces
PIECES, PIECE = 64, 1 << 20  # how many, and bytes of each
ENCODER = "encoder.json"  # a run that holds it holds an encoder
TABLES = (".csv", ".tsv", ".jsonl", ".parquet", ".arrow")
# Tables in a folder: saved by `datasets` as one set or several splits; Parquet files, alone or as
# on the Hugging Face Hub.
SAVED_TABLES = ("data-*.arrow", "dataset.arrow", "*/data-*.arrow")
PARQUET_TABLES = ("*.parquet", "data/*.parquet")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
HUB = "hf-hub:"  # prefix of names of the Hugging Face hub

# The value of a field for data, an encoder, a run or a method: a spec, the start of a run's name, a
# Run, a configured method, or a verb (or a Trial) in place of its run.
Input = typing.Any


class Verb(Protocol):
    """The interface of a verb, a frozen dataclass in a file of `bezoar/verbs`.

    Class variables describe it further. `joint`: every rank of torchrun does the work. `sweeps`: it
    runs many trials, so the command line offers `--workers` and `--ray`. `main_files`: the run's
    files for the user. `fail_on`: cases in which the command line may end with status 3; the static
    method `fails(case, manifest)` decides. Such a verb lists by `undecided(manifest)`, in
    sentences, why a case could not be decided; the status is then 5. `gate_needs`: for a case, a
    field and a class variable that one of the field's methods must have.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def work(self, job: Any) -> dict[str, Measure]:
        """Answer what is asked: write files into `job.folder`, and return the metrics by name.

        job: a `runs.execute.Job`; that module imports this one.
        """
        ...


@dataclass(frozen=True)
class Takes:
    """Annotation of a verb's field: the values that it accepts."""

    # `data`, `encoder`, `run` or a kind of method; "" for a plain value. A `bank` may also be a run
    # that holds one
    what: str = ""
    positional: bool = False  # whether the command line takes it without an option's name
    # whether the command line accepts several files, which `join_inputs` makes one input
    several: bool = False


@dataclass(frozen=True)
class Trial:
    """A verb with its seed. Verbs in its fields that are no trials have the same seed."""

    verb: Any
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    """Settings of a run that do not change its answer, apart from the seed.

    Attributes:
        runs: directory of the runs, as a path or a text.
        seed: seed of all randomness, 0 to 2**32 - 1.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        fresh: run again even if a finished run answers the question.
        quiet: print no progress.
        finish: called with a finished run; writes its page.
        workers: number of workers of a sweep; 0 means one for each GPU, or for each core.
        ray: whether a sweep runs on Ray.
    """

    runs: Path = Path("runs")
    seed: int = 0
    device: str = "auto"
    fresh: bool = False
    quiet: bool = False
    finish: Callable[[Run], Any] | None = None
    workers: int = 0
    ray: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", Path(self.runs))


def verb_names() -> list[str]:
    """The names of all verbs, in alphabetical order."""
    return sorted(path.stem for path in VERBS.glob("*.py") if not path.stem.startswith("_"))


def load_verb(name: str) -> type[Any]:
    """Import the class of a verb. Raises UserError if there is no such verb."""
    if name not in verb_names():
        raise UserError(f"no verb {name!r}; there are: {', '.join(verb_names())}")
    module = importlib.import_module(f"bezoar.verbs.{name}")
    return typing.cast(type[Any], getattr(module, registry.class_name(name)))


def verb_name(verb: Verb) -> str:
    """The name of a verb: `poison` for `Poison(...)`."""
    return type(verb).__name__.lower()


def is_verb(value: Any) -> bool:
    """Whether a field's value is a verb, which stands for its run."""
    return dataclasses.is_dataclass(value) and hasattr(value, "work")


def check_verb(verb: Any) -> Any:
    """The verb, one value in place of several put into a tuple.

    Raises UserError for what is no verb, and for a value that its field cannot take.
    """
    if isinstance(verb, type) or not is_verb(verb):
        what = verb.__name__ if isinstance(verb, type) else type(verb).__name__
        raise UserError(f"expected a verb such as Scan(...); got {what}")
    hints = typing.get_type_hints(type(verb))
    changes: dict[str, Any] = {}
    for name, (what, value) in input_fields(verb).items():
        takes_several = typing.get_origin(hints[name]) is tuple
        if takes_several and not isinstance(value, (tuple, list)):
            value = changes[name] = (value,)
        for item in value if isinstance(value, (tuple, list)) else (value,):
            _check_value(f"{type(verb).__name__}: {name}", what, item, hints[name])
    return dataclasses.replace(verb, **changes) if changes else verb


def _check_value(where: str, what: str, value: Any, hint: Any) -> None:
    """Raise UserError for a value that a field does not accept. what: see `Takes`."""
    if what:
        is_input = value is None or isinstance(value, (str, Path, Run, Trial))
        if not is_input and (isinstance(value, type) or not dataclasses.is_dataclass(value)):
            raise UserError(
                f"{where} takes a spec, a path, a Run, a verb or a configured method; got "
                f"{value!r:.80}"
            )
        return
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal and value not in options:
        raise UserError(f"{where} must be one of {', '.join(map(str, options))}; got {value!r:.80}")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {int: number and value == value // 1, float: number, str: isinstance(value, str)}
    if hint in fits and not fits[hint]:
        raise UserError(f"{where} must be {hint.__name__}; got {value!r:.80}")


def input_to_json(value: Any) -> Any:
    """Write a field's value as JSON: runs by name, methods as specs, verbs as objects."""
    if isinstance(value, Run):
        return value.name
    if isinstance(value, (tuple, list)):
        return [input_to_json(v) for v in value]
    if isinstance(value, Trial):
        return {**input_to_json(value.verb), "seed": value.seed}
    if is_verb(value):
        fields = {f.name: input_to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"verb": verb_name(value), **fields}
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return registry.spec(value)


def input_name(value: Any) -> str:
    """The name of a run or a configured method in texts: the run's name, or the method's spec."""
    return value.name if isinstance(value, Run) else registry.spec(value)


def input_spec(value: Any) -> str:
    """The text that asks for a run or a method: the run's directory, or the spec; "" for None.

    A text is returned as it is.
    """
    if value is None or isinstance(value, str):
        return value or ""
    return str(value.path) if isinstance(value, Run) else registry.spec(value)


def input_fields(verb: Verb) -> dict[str, tuple[str, Any]]:
    """For each field of a verb, the kind that it takes ("" for a plain value) and its value."""
    marks = field_marks(type(verb))
    return {name: (mark.what, getattr(verb, name)) for name, mark in marks.items()}


def positional_fields(verb: type[Verb]) -> tuple[str, ...]:
    """The fields that the command line takes without an option's name, in order."""
    return tuple(name for name, mark in field_marks(verb).items() if mark.positional)


def field_marks(verb: type[Verb]) -> dict[str, Takes]:
    """The `Takes` of each field of a verb; that of a plain value where the annotation has none."""
    hints = typing.get_type_hints(verb, include_extras=True)
    marks = {}
    for field in dataclasses.fields(verb):
        metadata = getattr(hints[field.name], "__metadata__", ())
        marks[field.name] = next((m for m in metadata if isinstance(m, Takes)), Takes())
    return marks


def fingerprint(files: Iterable[Path | tuple[str, Path]]) -> str:
    """Hash (sha256, 16 digits) the names, sizes and contents of files.

    Files above 64 MiB are represented by 64 evenly spread pieces of one MiB.
    """
    digest = hashlib.sha256()
    for name, path in ((f.name, f) if isinstance(f, Path) else f for f in files):
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{name}:{size}:".encode("utf-8", "surrogateescape"))
            if size <= HASHED_WHOLE:
                digest.update(file.read())
                continue
            for i in range(PIECES):
                file.seek(i * (size - PIECE) // (PIECES - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


def spec_of_weights(text: str) -> str:
    """The spec of a network for a bare path or a name of the Hugging Face hub."""
    if text.startswith(HUB):
        return f"hub:name={registry.spec_value(text.removeprefix(HUB))}"
    if (
        os.path.lexists(text)
        and text not in registry.method_names("network")
        and not text.endswith(".py")
    ):
        return f"weights:path={registry.spec_value(f'./{text}' if text[0] in '([{' else text)}"
    return text


def find_input(text: str, what: str, runs: Path) -> Run | tuple[str, str]:
    """The run that a text names, or the kind and the spec of a method. Raises UserError.

    Args:
        text: the user's text.
        what: see `Takes`.
        runs: the directory in which runs are looked up.
    """
    if what not in ("data", "encoder", "run", "bank"):
        return what, text
    is_bare_name = ":" not in text and not text.endswith(".py")
    # os.path, because Path.exists raises for a text that no name can be.
    is_weights = what == "encoder" and os.path.lexists(text) and find_run(runs, text) is None
    if what == "run" or (what == "encoder" and is_bare_name and not is_weights):
        return get_run(runs, text, ENCODER if what == "encoder" else "")
    kind = "network" if what == "encoder" else what
    if run := find_run(runs, text):
        return run
    spec = spec_of_path(kind, text)
    if what == "data" and is_bare_name and spec == text and text not in registry.method_names(kind):
        names = [
            *registry.method_names(kind),
            *os.listdir(),
            *(run.name for run in newest_runs(runs)),
        ]
        raise UserError(
            f"no file, folder or run {text!r}{suggest(text, names)}; `bezoar list data` names the "
            "data that need none"
        )
    return kind, spec


def resolve_text(text: str, what: str, runs: Path) -> Any:
    """The run or configured method that a text names; see `find_input`."""
    resolved = find_input(text, what, runs)
    if isinstance(resolved, Run):
        return resolved
    return find_inner_runs(registry.make(*resolved), runs)


def find_inner_runs(configured: Any, runs: Path) -> Any:
    """A verb or a method, with the directory of a run where a field holds the start of its name.

    The fields are those of its class variable `run_fields`, each with what it takes (see `Takes`);
    they hold texts. Raises UserError as `find_input` does.
    """
    changes = {}
    for name, what in getattr(configured, "run_fields", {}).items():
        text = getattr(configured, name)
        if not text or os.path.isfile(text):
            continue
        if isinstance(resolved := find_input(text, what, runs), Run):
            changes[name] = str(resolved.path)
    return dataclasses.replace(configured, **changes) if changes else configured


def join_inputs(texts: Sequence[str], what: str) -> str:
    """Join files of one kind, such as tars from a shell's glob. Raises UserError for others."""
    if len(texts) == 1:
        return texts[0]
    if not texts:
        raise UserError(
            f"name a {what} set before the options, some of which take several words: a folder, "
            "tars, a table, a run or a spec"
        )
    methods = {spec_of_path(what, text).partition(":")[0] for text in texts}
    if len(methods) > 1 or not methods <= {"shards", "table"}:
        raise UserError(
            f"{len(texts)} inputs, such as {texts[0]} and {texts[1]}: give one, or several tars, "
            "or several tables"
        )
    folders = {os.path.dirname(text) for text in texts}
    folder = folders.pop() if len(folders) == 1 else ""
    names = [os.path.basename(text) if folder else text for text in texts]
    if special := [text for text in texts if set(text) & set('{},"()[]\\')]:
        raise UserError(
            f"{special[0]}: name it alone, or its folder, because of the signs in its name"
        )
    joined = f"{methods.pop()}:path={folder + '/' if folder else ''}{{{','.join(names)}}}"
    if len(joined) > registry.MAX_SPEC:
        raise UserError(
            f'{len(texts)} files have too long names; give a glob in quotes: "DIR/*.tar"'
        )
    return joined


def find_tables(folder: Path) -> str:
    """The glob of the tables of a folder; "" for any other folder.

    Parquet files beside images, or beside folders of images as img2dataset writes them, do not
    count.
    """
    for pattern in SAVED_TABLES:
        if any(folder.glob(pattern)):
            return pattern
    for pattern in PARQUET_TABLES:
        first = next(iter(folder.glob(pattern)), None)
        if first is not None:
            others = first.parent.iterdir()
            if not any(p.is_dir() or p.suffix.lower() in IMAGE_SUFFIXES for p in others):
                return pattern
    return ""


def stands_alone(kind: str, text: str) -> bool:
    """Whether a text names a method without required fields, not a file of that name."""
    if text not in registry.method_names(kind):
        return False
    return all(f.default for f in method_source.describe(registry.method_path(kind, text)).fields)


def spec_of_path(kind: str, text: str) -> str:
    """The spec for a bare path; any other text is returned unchanged.

    Tar files are shards, a .csv a table, a .npy embeddings, a .json a bank; a folder holds tars,
    tables (Parquet files, or data saved by Hugging Face's `datasets`) or images.
    """
    if kind == "network":
        return spec_of_weights(text)
    path = Path(text.partition(":")[0])
    is_there = os.path.lexists(text) and not stands_alone(kind, text)
    if is_there:
        path = Path(text)  # whose name may hold a colon
        text = registry.spec_value(f"./{text}" if text[0] in "([{" else text)
    elif ":" in text or text in registry.method_names(kind):
        return text
    if path.suffix in TABLES:
        return f"table:path={text}"
    if path.suffix == ".npz":
        return f"npz:path={text}"
    if path.suffix == ".json":
        return f"file:path={text}"
    if path.name.endswith((".tar", *PACKED)):  # which of the latter are refused there
        return f"shards:path={text}"
    if path.suffix == ".npy" or os.path.isdir(path / "img_emb"):
        return f"embeddings:path={text}"
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return f"image:path={text}"
    if os.path.isdir(path):
        is_plain = not glob.has_magic(text) and "{" not in text and '"' not in text
        if any(path.glob("*.tar")):
            return f"shards:path={text}/*.tar" if is_plain else f"shards:path={text}"
        tables = find_tables(path) if is_plain else ""
        return f"table:path={text}/{tables}" if tables else f"folder:path={text}"
    if "/" in text and path.suffix != ".py":
        if is_there:
            raise UserError(f"{text}: its ending does not say what it is; write METHOD:{text}")
        raise UserError(f"no file or folder {text!r}{describe_neighbours(text)}")
    return text
