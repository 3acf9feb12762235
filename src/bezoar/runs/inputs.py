"""Loads a verb's inputs: the records of a data set or a run, and the encoder of a run."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bezoar import registry
from bezoar.attacks.plan import Goal, Plan
from bezoar.attacks.triggers import Trigger
from bezoar.data import stored_pairs
from bezoar.data.pairs import Pairs
from bezoar.data.source import as_source
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders import normalisation
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.runs.reading import note_records
from bezoar.runs.run import Run, follow
from bezoar.runs.verb import ENCODER, fingerprint
from bezoar.terminal import warn

TEST_RECORDS = 2000  # of a test split that is made to order
COPIED = 1 << 30  # bytes of images that may be copied in memory to be poisoned


@dataclass(frozen=True)
class Dataset:
    """A data set and its poisons. Nothing is read before it is needed."""

    method: Any  # the configured data method
    plan: Plan  # the changes to its records; an empty plan changes nothing
    poisoned_by: Run | None = None  # the run that the plan was read from, if there is one

    @functools.cached_property
    def clean(self) -> Pairs | StoredPairs:
        """The clean records, in memory or on disk."""
        return load_records(self.method)

    @functools.cached_property
    def uncopied(self) -> Pairs | StoredPairs:
        """The clean records, as an index if their images are too large to be copied."""
        clean = self.clean
        if isinstance(clean, Pairs) and clean.images.nbytes > COPIED:
            return stored_pairs.hold(clean)
        return clean

    @functools.cached_property
    def victims(self) -> Pairs | None:
        """The images that the plan adds."""
        return load_victims(self.plan, self.poisoned_by)

    @functools.cached_property
    def pairs(self) -> Pairs:
        """The records as training reads them, the plan applied, in memory."""
        clean = in_memory(self.clean)
        return self.plan.apply(clean, self.victims) if self.plan.edits else clean

    @functools.cached_property
    def records(self) -> Pairs | StoredPairs:
        """The records as training reads them, the plan applied: an index if `uncopied` is one."""
        if isinstance(self.uncopied, StoredPairs):
            return self.plan.over(self.uncopied, self.victims)
        return self.pairs

    def reading_notes(self) -> dict[str, Any]:
        """For the manifest: how many records were read, and what was not, with reasons."""
        report = self.clean.report
        if report is None:
            return {}
        return {"reading": report.notes()}


def open_dataset(data: Any) -> Dataset:
    """Return the data set of a configured data method or of a run.

    The data set of a train, scan or evaluate run is the one that it was made from.
    """
    if not isinstance(data, Run):
        return Dataset(data, Plan())
    poison, method = poison_run(data), root_method(data)
    if poison is None:
        return Dataset(method, Plan())
    return Dataset(method, read_plan(poison), poison)


def read_plan(run: Run) -> Plan:
    """Return the plan of a poison run; see `recorded_trigger`."""
    return Plan.read(run.file("plan.jsonl"), functools.partial(recorded_trigger, run=run))


def data_parent(run: Run) -> Run | None:
    """Return the run that a run's records come from, or None if they come from a data set.

    It is the run that was given as its data, else the first that it was made from. The encoder of a
    scan, for example, brings its weights and not the records that poisoned it.
    """
    data = run.asked_for("data")
    if data is None:
        return next(iter(run.parents), None)
    return run.sibling(data["run"]) if "run" in data else None


def poison_run(run: Run) -> Run | None:
    """Return the poison run whose plan changed a run's records, or None."""
    return next((source for source in follow(run, data_parent) if source.verb == "poison"), None)


def root_method(run: Run) -> Any:
    """Return the data method at the root of a run. Raises UserError if its files have changed."""
    *_, root = follow(run, data_parent)
    data = root.asked_for("data")
    if data is None:
        raise UserError(f"run {root.name} goes back to no data set")
    return recorded_method(data, root)


def recorded_method(record: Mapping[str, Any], run: Run) -> Any:
    """Return the data method of a spec in a run's manifest.

    A run may come from anybody, so only the files of the recorded fingerprint are opened, and
    nothing is downloaded.

    Args:
        record: the manifest's entry for the input.
        run: the run of the manifest.

    Raises:
        UserError: if the files have changed, or the manifest does not name them.
    """
    method = registry.make("data", record["spec"])
    if getattr(method, "download", False):
        method = dataclasses.replace(method, download=False)
    files = registry.input_files(method)
    if (fingerprint(files) if files else None) != record.get("files"):
        raise UserError(
            f"the files of {record['spec']} are not those that run {run.name} was made from"
        )
    return method


def recorded_trigger(spec: str, run: Run) -> Trigger:
    """Return the trigger of a spec that a run's plan or manifest holds.

    Its files must be those of a trigger that the run, or one that it was made from, was asked for
    with; see `recorded_method`. Raises UserError for others.
    """
    trigger: Trigger = registry.make("trigger", spec)
    files = registry.input_files(trigger)
    if files:
        content = fingerprint(files)
        recorded = [source.manifest["ask"].get("trigger") for source in run.lineage()]
        records = [r for one in recorded for r in (one if isinstance(one, list) else [one])]
        if not any(isinstance(r, dict) and r.get("files") == content for r in records):
            raise UserError(
                f"the files of trigger {spec} are not those that run {run.name} was made from"
            )
    return trigger


def recorded_victims(spec: str, run: Run) -> Any:
    """Return the data method of the victims that a run's plan names.

    Raises UserError unless the run, or one that it adds to, was asked for with them.
    """
    for source in follow(run, data_parent):
        victims = source.asked_for("victims") if source.verb == "poison" else None
        if victims is not None and victims.get("spec") == spec:
            return recorded_method(victims, source)
    raise UserError(f"the plan of run {run.name} names victims that the run was not asked for")


def test_split(method: Any) -> Any:
    """Return the test split that belongs to a data method. Raises UserError if it has none."""
    if "split" not in {f.name for f in dataclasses.fields(method)}:
        raise UserError(
            f"{registry.method_name(type(method))} has no test split; name the test data"
        )
    changes: dict[str, Any] = {"split": "test"}
    if hasattr(method, "count"):
        changes["count"] = min(TEST_RECORDS, method.count)
    return dataclasses.replace(method, **changes)


@functools.lru_cache(maxsize=6)
def open_source(method: Any) -> Any:
    """Call a configured data method: returns Pairs, or a source that is read in parts."""
    return method()


def load_records(method: Any) -> Pairs | StoredPairs:
    """Read all records, and note in the run how they were read. Raises UserError without any."""
    records = _load_records(method)
    note_records(registry.spec(method), records.report)
    return records


@functools.lru_cache(maxsize=6)
def _load_records(method: Any) -> Pairs | StoredPairs:
    """Read all records into memory or an index. Raises UserError if there are none."""
    pixels = 3 * getattr(method, "count", 0) * (getattr(method, "size", None) or 0) ** 2
    if hasattr(method, "render") and pixels > COPIED:
        return stored_pairs.index_drawn(method)
    records = as_source(open_source(method)).load_records()
    if records.report is not None and (records.report.skipped or records.report.renamed):
        problems = records.report.skipped[:3] or records.report.renamed[:3]
        first = "; ".join(f"{s.file} {s.member}: {s.reason}" for s in problems)
        warn(f"{records.report}; the first: {first}")
    if not len(records):
        raise UserError(f"{registry.spec(method)} holds no records")
    return records


def read_pairs(method: Any) -> Pairs:
    """Read all records of a data method into memory. Raises UserError if there are none."""
    return in_memory(load_records(method))


def load_victims(plan: Plan, poisoned_by: Run | None) -> Pairs | None:
    """Load the images that a plan adds from outside the data set; None if it adds none.

    Args:
        plan: the plan.
        poisoned_by: the run that holds the plan; None for a new plan.
    """
    if plan.victims is None:
        return None
    if poisoned_by is None:
        victims = load_records(registry.make("data", plan.victims))
    else:
        victims = load_records(recorded_victims(plan.victims, poisoned_by))
    return victims.take(victims.find_rows({e.source for e in plan.edits}))


def in_memory(records: Pairs | StoredPairs) -> Pairs:
    """Return the same records with their images in memory."""
    return records if isinstance(records, Pairs) else records.take(range(len(records)))


def load_encoder(embedder: Any, device: torch.device | str, clean: Pairs | None = None) -> Encoder:
    """Load the encoder of a train, inject or repair run, or of a network with published weights.

    The kind of a file of weights, and what was assumed about it, is printed once.

    Args:
        embedder: a run, or a configured network.
        device: the device of the encoder.
        clean: clean records by which an unstated normalisation is chosen; None keeps the guess.
    """
    if isinstance(embedder, Run):
        holder = find_encoder(embedder)
        if holder is None:
            raise UserError(f"run {embedder.name} holds no encoder")
        return Encoder.load(holder.path, device)
    try:
        encoder: Encoder = embedder(0, ())
    except ValueError as error:  # a fresh network that needs a size
        raise UserError(
            f"network {registry.spec(embedder)}: {error}; it is not trained; name a train run, or "
            "weights: imported:path=FILE, open_clip:NAME/PRETRAINED"
        ) from error
    encoder = encoder.to(device).eval()
    doubt = ""
    if clean is not None and not clean.text_only and encoder.reads_images:
        doubt = normalisation.settle_mean_std(encoder, clean.images)
    line = "; ".join(filter(None, (describe_weights(encoder), doubt)))
    if line and line not in _printed:
        _printed.add(line)
        warn(line)
    return encoder


_printed: set[str] = set()  # lines about files of weights that this process has printed


def describe_weights(encoder: Encoder) -> str:
    """Describe an imported encoder and what was assumed about it; "" for others."""
    imported = encoder.about.get("imported")
    if not imported:
        return ""
    what = imported.get("what") or f"an encoder in the layout {imported['layout']}"
    if not encoder.reads_images:
        return "; ".join([f"{imported['file']}: {what}", *imported["assumed"]])
    parts = [f"{imported['file']}: {what}, {encoder.preprocess.size} px"]
    if encoder.head is not None and "head" not in what:
        parts[0] += f", with its head of {len(encoder.about['classes'])} classes"
    mean_std = normalisation.mean_std_name(encoder.preprocess)
    if imported.get("mean_std") or f"{normalisation.GUESS}{mean_std}" not in imported["assumed"]:
        parts.append(f"normalisation {imported.get('mean_std') or mean_std}")
    if imported["assumed"]:
        parts.append(f"guessed, as no file states it: {', '.join(imported['assumed'])}")
    if imported["left_out"]:
        parts.append(f"left out: {', '.join(imported['left_out'])}")
    return "; ".join(parts)


def find_encoder(run: Run) -> Run | None:
    """Return this run, or the nearest one that it was made from, that holds an encoder.

    The surrogate that a poison run was made with is not an encoder of its data.
    """
    lineage = run.lineage(lambda each: each.verb != "poison")
    return next((each for each in lineage if (each.path / ENCODER).exists()), None)


def was_trained_on(encoder: Run, data: Any) -> bool:
    """Whether a run's encoder was trained on these data, or on the same records and poisons."""
    dataset = open_dataset(data)
    try:
        train = encoder.ancestor("train")
        if train is None:
            return False
        trained_on = open_dataset(train)  # its files are those that the encoder was trained on
    except UserError:
        return False
    same_poisons = trained_on.plan.digest() == dataset.plan.digest()
    return same_poisons and _spec_of_records(trained_on.method) == _spec_of_records(dataset.method)


def _spec_of_records(method: Any) -> str:
    """The spec of a data method without the size and the number of its images."""
    names = {f.name for f in dataclasses.fields(method)}
    plain: dict[str, Any] = {"limit": None} if "limit" in names else {}
    if getattr(method, "size", None) is not None:
        plain["size"] = 64
    return registry.spec(dataclasses.replace(method, **plain))


def known_goals(artefact: Any) -> list[Goal]:
    """The attacker's goals for a run's artefact, without covers, which have no target."""
    if not isinstance(artefact, Run):
        return []
    goals = [Goal.from_json(g) for g in artefact.manifest["goal"]]
    return [goal for goal in goals if not goal.is_cover]


def goals_to_stamp(artefact: Any) -> list[Goal]:
    """Return the goals of `known_goals`. Raises UserError as `recorded_trigger` does."""
    goals = known_goals(artefact)
    for goal in goals:
        if goal.trigger:
            recorded_trigger(goal.trigger, artefact)
    return goals
