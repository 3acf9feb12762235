"""What a verb's input stands for: the records of a data set or a run, and the encoder of a run."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bezoar import registry
from bezoar.attacks.plan import Goal, Plan
from bezoar.data.files.paths import printable
from bezoar.data.files.writing import write_whole
from bezoar.data.pairs import Pairs
from bezoar.data.source import as_source
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.runs.reading import note_records
from bezoar.runs.run import Run
from bezoar.runs.verb import fingerprint, input_files

TEST_RECORDS = 2000  # of a test split that is made to order


@dataclass(frozen=True)
class Dataset:
    """A data set and what is poisoned in it. Nothing is read before it is asked for.

    Attributes:
        method: the configured data method.
        plan: what is changed in its records; an empty one changes nothing.
    """

    method: Any
    plan: Plan

    @functools.cached_property
    def clean(self) -> Pairs | StoredPairs:
        """The records as they are, in memory or on disk."""
        return load_records(self.method)

    @functools.cached_property
    def victims(self) -> Pairs | None:
        """The images that the plan adds."""
        return load_victims(self.plan)

    @functools.cached_property
    def pairs(self) -> Pairs:
        """The records as training reads them, the plan applied, in memory."""
        clean = in_memory(self.clean)
        return self.plan.apply(clean, self.victims) if self.plan.edits else clean

    @functools.cached_property
    def records(self) -> Pairs | StoredPairs:
        """The records as training reads them, on disk if the clean ones are."""
        if isinstance(self.clean, StoredPairs):
            return self.plan.over(self.clean, self.victims)
        return self.pairs

    def reading_notes(self) -> dict[str, Any]:
        """For the manifest: how many records were read, and all that was not, with reasons."""
        report = self.clean.report
        if report is None:
            return {}
        notes: dict[str, Any] = {"read": report.read, "skipped": [list(s) for s in report.skipped]}
        if report.renamed:
            notes["renamed"] = len(report.renamed)
        return {"reading": notes}


def open_dataset(data: Any) -> Dataset:
    """Return the data set of a configured data method or of a run.

    Of a poison run these are its data; of a train, scan or evaluate run those that it was made
    from.
    """
    if not isinstance(data, Run):
        return Dataset(data, Plan())
    poison, method = poison_run(data), root_method(data)
    if poison is None:
        return Dataset(method, Plan())
    make_trigger = functools.partial(registry.make, "trigger")
    return Dataset(method, Plan.read(poison.file("plan.jsonl"), make_trigger))


def data_parent(run: Run) -> Run | None:
    """Return the run that a run's records come from, or None if they come from a data set.

    It is the run that was given as its data, else the first that it was made from. The encoder of a
    scan, for example, brings its weights and not the records that poisoned it.
    """
    data = run.manifest["ask"].get("data")
    if data is None:
        return next(iter(run.parents), None)
    return run.sibling(data["run"]) if "run" in data else None


def poison_run(run: Run) -> Run | None:
    """Return the poison run whose plan is in a run's records, or None if there is none."""
    if run.verb == "poison":
        return run
    parent = data_parent(run)
    return poison_run(parent) if parent else None


def root_method(run: Run) -> Any:
    """Return the data method that a run goes back to.

    Raises UserError if its files are not what they were.
    """
    data = run.manifest["ask"].get("data")
    if data is None or "run" in data:
        parent = data_parent(run)
        if parent is None:
            raise UserError(f"run {run.name} goes back to no data set")
        return root_method(parent)
    method = registry.make("data", data["spec"])
    if "files" in data and fingerprint(input_files(method)) != data["files"]:
        raise UserError(
            f"the files of {data['spec']} are not those that run {run.name} was made from"
        )
    return method


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
    """Return what a configured data method gives: Pairs, or a source that is read as it goes."""
    return method()


def load_records(method: Any) -> Pairs | StoredPairs:
    """Read all records of a configured data method, and note for the run how they were read.

    Raises UserError if there are none.
    """
    records = _load_records(method)
    note_records(registry.spec(method), records.report)
    return records


@functools.lru_cache(maxsize=6)
def _load_records(method: Any) -> Pairs | StoredPairs:
    """Read all records of a configured data method, into memory or an index.

    Raises UserError if there are none.
    """
    records = as_source(open_source(method)).load_records()
    if records.report is not None and (records.report.skipped or records.report.renamed):
        problems = records.report.skipped[:3] or records.report.renamed[:3]
        first = "; ".join(f"{s.file} {s.member}: {s.reason}" for s in problems)
        print(f"{records.report}; the first: {printable(first)}", file=sys.stderr)
    if not len(records):
        raise UserError(f"{registry.spec(method)} holds no records")
    return records


def read_pairs(method: Any) -> Pairs:
    """Read all records of a configured data method into memory.

    Raises UserError if there are none.
    """
    return in_memory(load_records(method))


def load_victims(plan: Plan) -> Pairs | None:
    """Load the images that a plan adds from outside the data set; None if it adds none."""
    if plan.victims is None:
        return None
    victims = load_records(registry.make("data", plan.victims))
    wanted = {e.source for e in plan.edits}
    return victims.take([i for i, key in enumerate(victims.ids) if key in wanted])


def in_memory(records: Pairs | StoredPairs) -> Pairs:
    """Return the same records with their images in memory."""
    return records if isinstance(records, Pairs) else records.take(range(len(records)))


def load_encoder(embedder: Any, device: torch.device | str) -> Encoder:
    """Load the encoder of a train, inject or repair run, or of a network with published weights."""
    if isinstance(embedder, Run):
        holder = _find_encoder(embedder)
        if holder is None:
            raise UserError(f"run {embedder.name} holds no encoder")
        return Encoder.load(holder.path, device)
    try:
        encoder: Encoder = embedder(0, ())
    except ValueError as error:  # a fresh network of no size of its own
        raise UserError(
            f"network {registry.spec(embedder)}: {error}; it is not trained; name a train run, or weights: "
            "imported:path=FILE, open_clip:NAME/PRETRAINED"
        ) from error
    return encoder.to(device).eval()


def _find_encoder(run: Run) -> Run | None:
    """Return this run, or the nearest one that it was made from, that holds an encoder."""
    if (run.path / "encoder.json").exists():
        return run
    for parent in run.parents:
        holder = _find_encoder(parent)
        if holder is not None:
            return holder
    return None


def known_goals(artefact: Any) -> list[Goal]:
    """Return what an attacker wants of a run's artefact; nothing is known of others."""
    if not isinstance(artefact, Run):
        return []
    return [Goal.from_json(g) for g in artefact.manifest["goal"]]


def write_json(path: Path, content: Any) -> None:
    """Write one small JSON file."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
