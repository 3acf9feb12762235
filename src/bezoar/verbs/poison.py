"""Plans a poisoning of a data set: the records, their captions and the trigger."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch

from bezoar import registry
from bezoar.attacks import patch_search
from bezoar.attacks.plan import Goal, Plan, differences
from bezoar.data import shards
from bezoar.data.files.writing import remove_folder
from bezoar.data.pairs import Pairs
from bezoar.data.stored_pairs import StoredPairs
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure
from bezoar.progress import ProgressReport, no_report
from bezoar.runs import inputs
from bezoar.runs.devices import select_device
from bezoar.runs.execute import MAX_SEED, Job
from bezoar.runs.inputs import Dataset
from bezoar.runs.run import Run
from bezoar.runs.verb import Input, Takes

# Inputs that a plan is derived from, beside the data, and the kinds of methods that they are.
PLAN_INPUTS = {"poison": "poison", "trigger": "trigger", "victims": "data"}


@dataclass(frozen=True)
class Poison:
    """Plan a poisoning of a data set. Over a poison run it adds to that run's plan."""

    main_files: ClassVar[tuple[str, ...]] = ("plan.jsonl", "shards")

    data: Annotated[
        Input,
        Takes("data", positional=True),
        "a folder, tars, a table, a spec such as scenes:count=2000, or a poison run to add to",
    ]
    poison: Annotated[Input, Takes("poison"), "how: see `bezoar list poison`"] = "backdoor"
    trigger: Annotated[Input, Takes("trigger"), "what is stamped on images"] = None
    target: Annotated[str, "class or word that poisoned images are to be read as"] = ""
    victims: Annotated[
        Input, Takes("data"), "held-out data that targeted victims are drawn from"
    ] = None
    surrogate: Annotated[
        Input,
        Takes("encoder"),
        "encoder on which the patch is optimised towards the target first (BadCLIP)",
    ] = None
    write: Annotated[
        Literal["plan", "shards"], "the plan alone, or webdataset shards with it applied"
    ] = "plan"
    stored: Annotated[
        Literal["png", "jpeg"], "how shards are written; jpeg alters small triggers"
    ] = "png"

    def work(self, job: Job) -> dict[str, Measure]:
        """Write plan.jsonl, the ground truth, and with `write` poisoned shards, marked as such."""
        dataset = inputs.open_dataset(job.inputs["data"])
        derived = derive_plan(
            job.inputs, dataset, self.target, job.seed, job.device, job.progress.step
        )
        plan = dataset.plan.merge(derived)
        plan.write(job.folder / "plan.jsonl")
        job.goals = [vars(goal) for goal in plan.goals]
        replaced = int(plan.mask(dataset.clean.ids).sum())
        records = len(dataset.clean) + len(plan) - replaced
        job.notes = dataset.reading_notes() | {
            "plan": plan.digest(),
            "poisoned": True,
            "records": records,
            "classes": list(dataset.clean.classes),
        }
        if self.write == "shards":
            proven_by = dataset.poisoned_by if self.victims is None else None
            self._write_shards(job, replace(dataset, plan=plan, poisoned_by=proven_by))
        how = "poisoned records / all records, counted"
        return {
            "poisons": Measure.exact(len(plan), records, "poisoned records, counted"),
            "poison_rate": Measure.exact(len(plan) / records, records, how),
        }

    def _write_shards(self, job: Job, dataset: Dataset) -> None:
        folder = job.folder / "shards"
        partial = job.folder / "shards.part"
        for path in (folder, partial):  # of an attempt that was cut off, or that is replaced
            remove_folder(path)
        shards.write_shards(partial, dataset.records, format=self.stored)
        partial.rename(folder)
        job.notes["stored"] = self.stored


def derive_plan(
    plan_inputs: Mapping[str, Any],
    dataset: Dataset,
    target: str,
    seed: int,
    device: torch.device | str = "cpu",
    report: ProgressReport = no_report,
) -> Plan:
    """Make the plan of a poison method for data. It is a function of the arguments alone.

    Args:
        plan_inputs: a configured poison, trigger, victims and a surrogate; the last three may be
            None.
        dataset: the data, and the poisons in them already; those records are left alone.
        target: class or word.
        seed: seed of the draws.
        device: device on which a patch is optimised.
        report: called at every step of the optimisation.

    Raises:
        UserError: if the data or the victims cannot be poisoned this way.
    """
    poison = plan_inputs["poison"]
    trigger = plan_inputs["trigger"]
    victims = plan_inputs["victims"]
    clean = dataset.uncopied
    if not clean.captions:
        raise UserError("these data have no captions to poison")
    if isinstance(victims, Run):
        raise UserError(
            f"victims are drawn from a data set, not from run {victims.name}; name its test data"
        )
    # A targeted poison draws targets, and cover has none.
    if not target and not (registry.has_fields(poison, "victims") or hasattr(poison, "is_cover")):
        raise UserError("give a --target: the class or word that poisoned images are to be read as")
    source = clean
    pool = None if victims is None else inputs.read_pairs(victims)
    if dataset.plan.edits:
        is_poison = dataset.plan.mask(clean.ids)
        source = clean.select([i for i, bad in enumerate(is_poison) if not bad])
        if pool is not None:
            used = {edit.source for edit in dataset.plan.edits}
            pool = pool.take([i for i, k in enumerate(pool.ids) if k not in used])
    if plan_inputs.get("surrogate") is not None:
        trigger = optimise_trigger(plan_inputs, source, target, seed, device, report)
    goal = Goal(target, registry.spec(trigger) if trigger else None)
    plan: Plan = poison(source, goal, seed, pool)
    source_ids = {edit.source for edit in plan.edits}
    if pool is not None and (clash := source_ids.intersection(clean.ids)):
        raise UserError(
            f"victim {min(clash)!r} has the id of a record of the data, so that a plan cannot tell "
            "their images apart; give one of the two sets ids of its own"
        )
    stamps = [registry.make("trigger", g.stamp) if g.stamp else None for g in plan.goals]
    victims_spec = None if victims is None else registry.spec(victims)
    plan = replace(plan, stamps=tuple(stamps), victims=victims_spec)
    sources = source.take(source.find_rows(source_ids))
    if pool is not None:
        sources = Pairs.concat([sources, captioned(pool, sources)])
    return plan.with_hashes(sources)


def optimise_trigger(
    plan_inputs: Mapping[str, Any],
    source: Pairs | StoredPairs,
    target: str,
    seed: int,
    device: torch.device | str,
    report: ProgressReport,
) -> Any:
    """Return the patch trigger with pixels that the surrogate reads as the target.

    Raises UserError for another trigger, or records that the patch cannot be optimised on.
    """
    trigger = plan_inputs["trigger"]
    if trigger is None or registry.method_name(type(trigger)) != "patch":
        raise UserError("a surrogate optimises a patch; give --trigger patch:size=6")
    encoder = inputs.load_encoder(plan_inputs["surrogate"], device)
    patch = patch_search.optimise_patch(encoder, source, target, trigger, seed, report)
    digits = bytes(patch.permute(1, 2, 0).flatten().tolist()).hex()
    return replace(trigger, fill=f"#{digits}")


def captioned(victims: Pairs, sources: Pairs) -> Pairs:
    """The victims, with empty captions if need be. Raises UserError for images of another size."""
    sides = tuple(victims.images.shape[2:])
    source_sides = tuple(sources.images.shape[2:])
    if sides != source_sides:
        raise UserError(f"victims are {sides} px, the data {source_sides} px; give both one size")
    return replace(victims, captions=victims.captions or ("",) * len(victims))


def verify_plan(run: Run) -> dict[str, Any]:
    """Derive a poison run's plan again from its inputs and compare it with the one on disk.

    Returns:
        The run's name, the number of poisoned records, and the plan's digest; for JSON.

    Raises:
        UserError: if the plans differ; it names the first record whose caption, id or pixels do.
    """
    if run.verb != "poison":
        raise UserError(f"{run.name} is a {run.verb} run; only a poison run has a plan to verify")
    ask = run.manifest.object("ask")
    written = inputs.read_plan(run)
    parent = run.input_run("data")
    dataset = inputs.open_dataset(parent if parent is not None else inputs.root_method(run))
    plan_inputs = {
        name: registry.make(kind, ask.object(name).text("spec")) if ask[name] else None
        for name, kind in PLAN_INPUTS.items()
        if name != "victims"
    }
    if ask["trigger"]:
        inputs.recorded_trigger(ask.object("trigger").text("spec"), run)
    if ask.get("surrogate"):
        plan_inputs["surrogate"] = run.input_run("surrogate")
        if plan_inputs["surrogate"] is None:
            raise UserError(f"{run.name}: its patch is derived again from a run's encoder alone")
    victims = ask["victims"]
    plan_inputs["victims"] = inputs.recorded_method(ask.object("victims"), run) if victims else None
    seed = ask["seed"]
    if not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise UserError(f"run {run.name} has no seed from 0 to {MAX_SEED}")
    derived = dataset.plan.merge(
        derive_plan(plan_inputs, dataset, ask.text("target"), seed, select_device("auto"))
    )
    if lines := differences(written, derived):
        raise UserError(
            f"{run.name} does not verify, {len(lines)} differences; the first: {lines[0]}"
        )
    return {"run": run.name, "verified": True, "records": len(written), "plan": written.digest()}
