"""Estimates what a verb would cost before it is run: records, trainings and minutes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bezoar import machine, registry
from bezoar.data.files.paths import IMAGE_EXTENSIONS
from bezoar.data.files.tables import cut_blocks
from bezoar.data.files.tars import Group, read_groups
from bezoar.data.source import as_source
from bezoar.errors import UserError
from bezoar.runs import inputs, sweep
from bezoar.runs.run import Run
from bezoar.runs.verb import (
    Settings,
    Trial,
    Verb,
    input_fields,
    input_to_json,
    is_verb,
    resolve_text,
    verb_name,
)

# Pairs a second that clip_small trains on with one core, at 32 px; the time grows with the pixels.
# Measured by `pairs_per_second` in the manifests of trainings on two cores (AMD, AVX-512, bf16).
PAIRS_PER_SECOND = 1100
WIDTH = 32  # of that network; narrower ones are about as much faster as they have fewer channels
SIZE = 32
COUNTED_TARS = 4  # further tars are assumed to hold as many records a byte


def pairs_per_second(size: int) -> float:
    """The approximate training speed of a small model, given the machine's present load."""
    return PAIRS_PER_SECOND * machine.free_cores() * (SIZE / max(size, 1)) ** 2


def describe_plan(verb: Verb, settings: Settings) -> dict[str, Any]:
    """Return what would run: numbers of records and trainings, and minutes of training, or null.

    A verb that runs others names them by `planned_trials(settings)`.

    Raises:
        UserError: for a run or a method of the verb that cannot be had, as running it would.
    """
    _check_inputs(verb, settings)
    planned_trials = getattr(verb, "planned_trials", None)
    trials = [Trial(verb, settings.seed), *(planned_trials(settings) if planned_trials else [])]
    trainings = [t for t in sweep.dependency_graph(trials) if verb_name(t.verb) == "train"]
    counts = [count_records(t.verb.data, settings) for t in trainings]
    return {
        "verb": verb_name(verb),
        **input_to_json(verb),
        "records": next(_record_counts(verb, settings), None),
        "trainings": len(trainings),
        "minutes": _minutes(trainings, counts) if trainings else None,
    }


def _check_inputs(verb: Verb, settings: Settings) -> None:
    """Find each run and make each method that a verb names. Raises UserError for what is wrong."""
    for what, value in input_fields(verb).values():
        for text in value if isinstance(value, (tuple, list)) else (value,):
            if what and isinstance(text, (str, Path)):
                registry.allow(str(text))  # the user wrote it
                resolve_text(str(text), what, settings.runs)


def _record_counts(verb: Verb, settings: Settings) -> Iterator[int]:
    """The numbers of records of a verb's data and their ancestors, as far as they are known."""
    for what, value in input_fields(verb).values():
        if what in ("data", "run", "encoder") and not isinstance(value, (tuple, type(None))):
            count = count_records(value, settings, "encoder" if what == "encoder" else "data")
            if count is not None:
                yield count


def _minutes(trainings: list[Trial], counts: list[int | None]) -> float | None:
    """The approximate minutes of sequential trainings; None if a size is unknown."""
    seconds = 0.0
    for trial, count in zip(trainings, counts, strict=True):
        try:
            objective = trial.verb.objective
            if isinstance(objective, str):
                objective = registry.make("objective", objective)
            method = _method_of(trial.verb.data, Settings())
        except UserError:
            return None
        if count is None:
            return None
        size = getattr(method, "size", None) or SIZE
        network = trial.verb.network
        if isinstance(network, str):
            network = registry.make("network", network)
        width = network.width if registry.method_name(type(network)) == "clip_small" else WIDTH
        seconds += count * objective.epochs / pairs_per_second(size) * width / WIDTH
    return round(seconds / 60, 1)


def count_records(value: Any, settings: Settings, what: str = "data") -> int | None:
    """The number of records of an input, counted without decoding images; None if that takes long.

    what: "encoder" if a text may name weights, which have no records.
    """
    try:
        method = _method_of(value, settings, what)
        return None if method is None else _count(method)
    except (UserError, OSError):
        return None


def _method_of(value: Any, settings: Settings, what: str = "data") -> Any:
    """The data method at the root of an input; an encoder that is no run is returned unchanged."""
    while isinstance(value, Trial) or is_verb(value):
        inner = value.verb if isinstance(value, Trial) else value
        value = next((getattr(inner, name) for name, _ in input_fields(inner).items()), None)
    if isinstance(value, (str, Path)):
        value = resolve_text(str(value), what, settings.runs)
    return inputs.root_method(value) if isinstance(value, Run) else value


def _count(method: Any) -> int | None:
    """The number of records of a data method, if its files state it cheaply."""
    if isinstance(count := getattr(method, "count", None), int):
        return count
    limit = getattr(method, "limit", None)
    name = registry.method_name(type(method))
    found: int | None = None
    if name == "table":
        found = sum(block.rows or 0 for path in method.files() for block in cut_blocks(path))
    elif name == "shards" and method.captions == "first":
        found = _count_shards(method.files())
    elif name in ("folder", "embeddings"):
        found = sum(unit.weight for unit in as_source(method()).units())
    return found if limit is None or found is None else min(found, limit)


def _count_shards(paths: list[Path]) -> int:
    """The images of tars by their headers; of many tars about, by their bytes."""
    counted = paths[:COUNTED_TARS]
    groups = [group for path in counted for group in read_groups(path, ())]
    images = sum(
        isinstance(group, Group) and any(e in group.offsets for e in IMAGE_EXTENSIONS)
        for group in groups
    )
    sizes = [path.stat().st_size for path in paths]
    return round(images * sum(sizes) / max(1, sum(sizes[:COUNTED_TARS])))
