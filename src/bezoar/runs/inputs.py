"""What a verb's input stands for: the records of a data set or of a run's plan over it, and the encoder of a run."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bezoar import registry
from bezoar.attacks.plan import Goal, Plan
from bezoar.data import stored_pairs
from bezoar.data.pairs import Pairs, load_pairs
from bezoar.data.shards import ShardSource
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.runs.run import Run
from bezoar.runs.verb import fingerprint, input_files


@dataclass(frozen=True)
class Dataset:
    """A data set and what is poisoned in it. Nothing is read before it is asked for."""

    method: Any
    plan: Plan

    @functools.cached_property
    def clean(self) -> Pairs | StoredPairs:
        """The records as they are, in memory or by index."""
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
        """The same, by index where the clean ones are."""
        return (
            self.plan.over(self.clean, self.victims)
            if isinstance(self.clean, StoredPairs)
            else self.pairs
        )

    def reading_notes(self) -> dict[str, Any]:
        """For the manifest: how many records were read, and every file, member and reason of what was not."""
        report = self.clean.report
        if report is None:
            return {}
        return {"reading": {"read": report.read, "skipped": [list(s) for s in report.skipped]}}


def open_dataset(given: Any) -> Dataset:
    """A configured data method, or a run: a poison run's data, or those that a train, scan or evaluate run was made from."""
    if not isinstance(given, Run):
        return Dataset(given, Plan())
    poison, method = poison_run(given), root_method(given)
    if poison is None:
        return Dataset(method, Plan())
    return Dataset(
        method, Plan.read(poison.file("plan.jsonl"), functools.partial(registry.make, "trigger"))
    )


def data_parent(run: Run) -> Run | None:
    """The run that a run's records come from: the one given as its data, else the first it was made from.

    None where it begins with a data set. A scan's encoder, say, brings its weights and not its own poisoned records.
    """
    asked = run.manifest["ask"].get("data")
    if asked is None:
        return next(iter(run.parents), None)
    return run.sibling(asked["run"]) if "run" in asked else None


def poison_run(run: Run) -> Run | None:
    """The poison run whose plan is in a run's records; None where there is none."""
    if run.verb == "poison":
        return run
    source = data_parent(run)
    return poison_run(source) if source else None


def load_victims(plan: Plan) -> Pairs | None:
    """The images that a plan adds from outside the data set."""
    if plan.victims is None:
        return None
    pool, wanted = load_records(registry.make("data", plan.victims)), {e.source for e in plan.edits}
    return pool.take([i for i, k in enumerate(pool.ids) if k in wanted])


def root_method(run: Run) -> Any:
    """The data method that a run goes back to, its files unchanged. Raises UserError when they are not."""
    asked = run.manifest["ask"].get("data")
    if asked is None or "run" in asked:
        source = data_parent(run)
        if source is None:
            raise UserError(f"run {run.name} goes back to no data set")
        return root_method(source)
    method = registry.make("data", asked["spec"])
    if "files" in asked and fingerprint(input_files(method)) != asked["files"]:
        raise UserError(
            f"the files of {asked['spec']} are not those that run {run.name} was made from"
        )
    return method


def test_split(method: Any) -> Any:
    """The test split that belongs to a data method. Raises UserError where it has none."""
    if "split" not in {f.name for f in dataclasses.fields(method)}:
        raise UserError(
            f"{registry.method_name(type(method))} has no test split; name the test data"
        )
    made_to_order = {"count": min(2000, method.count)} if hasattr(method, "count") else {}
    return dataclasses.replace(method, split="test", **made_to_order)


@functools.lru_cache(maxsize=6)
def open_source(method: Any) -> Any:
    """What a configured data method gives: Pairs, or a source that is read as it goes."""
    return method()


@functools.lru_cache(maxsize=6)
def load_records(method: Any) -> Pairs | StoredPairs:
    """All records of a configured data method: in memory, or shards by index. Raises UserError when there are none."""
    found = open_source(method)
    pairs = (
        stored_pairs.open_records(found) if isinstance(found, ShardSource) else load_pairs(found)
    )
    if pairs.report is not None and pairs.report.skipped:
        first = "; ".join(f"{s.file} {s.member}: {s.reason}" for s in pairs.report.skipped[:3])
        print(f"{pairs.report}; the first: {first}", file=sys.stderr)
    if not len(pairs):
        raise UserError(f"{registry.spec(method)} holds no records")
    return pairs


def read_pairs(method: Any) -> Pairs:
    """All records of a configured data method, in memory. Raises UserError when there are none."""
    return in_memory(load_records(method))


def in_memory(records: Pairs | StoredPairs) -> Pairs:
    """The same records with their images at hand."""
    return records if isinstance(records, Pairs) else records.take(range(len(records)))


def load_encoder(given: Any, device: Any) -> Encoder:
    """The encoder of a train, inject or repair run, or of a network with published weights."""
    if isinstance(given, Run):
        holder = _holder(given)
        if holder is None:
            raise UserError(f"run {given.name} holds no encoder")
        return Encoder.load(holder.path, device)
    try:
        made = given(0, ())
    except ValueError as error:  # a fresh network of no size of its own
        weights = "name a train run, or weights: imported:path=FILE, open_clip:NAME/PRETRAINED"
        raise UserError(
            f"network {registry.spec(given)}: {error}; it is not trained; {weights}"
        ) from error
    return made.to(device).eval()


def _holder(run: Run) -> Run | None:
    """This run or the nearest one it was made from that holds an encoder."""
    if (run.path / "encoder.json").exists():
        return run
    return next((found for parent in run.parents if (found := _holder(parent))), None)


def known_goals(given: Any) -> list[Goal]:
    """What an attacker wants of a run's artefact; nothing is known of others."""
    return [Goal.from_json(g) for g in given.manifest["goal"]] if isinstance(given, Run) else []


def write_json(path: Path, content: Any) -> None:
    """One small JSON file, under a temporary name first."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.with_suffix(".tmp").write_text(text, encoding="utf-8", errors="backslashreplace")
    path.with_suffix(".tmp").replace(path)
