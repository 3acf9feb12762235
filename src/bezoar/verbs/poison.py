"""Plan a poisoning of a data set: which records, whose pixels, which captions, which trigger."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from bezoar import registry
from bezoar.errors import UserError
from bezoar.runs.execute import Job
from bezoar.runs.run import Run
from bezoar.runs.verb import Input, Takes


@dataclass(frozen=True)
class Poison:
    """Plan a poisoning of a data set. Over a poison run it adds to that run's plan."""

    data: Annotated[Input, Takes("data", positional=True), "data set, or a poison run to add to"]
    poison: Annotated[Input, Takes("poison"), "how: see `bezoar list poison`"] = "backdoor"
    trigger: Annotated[Input, Takes("trigger"), "what is stamped on images"] = None
    target: Annotated[str, "class or word that poisoned images are to be read as"] = ""
    victims: Annotated[
        Input, Takes("data"), "held-out data that targeted victims are drawn from"
    ] = None
    write: Annotated[
        Literal["plan", "shards"], "the plan alone, or webdataset shards with it applied"
    ] = "plan"
    stored: Annotated[
        Literal["png", "jpeg"], "how shards are written; jpeg alters small triggers"
    ] = "png"

    def work(self, job: Job) -> dict[str, Any]:
        """-> plan.jsonl, the ground truth; with `write`, poisoned shards beside it, marked as such."""
        from bezoar.evaluation.scores import Measure
        from bezoar.runs import inputs

        given, parts = job.inputs, inputs.open_dataset(job.inputs["data"])
        plan = parts.plan.merge(derive_plan(given, parts, self.target, job.seed))
        plan.write(job.folder / "plan.jsonl")
        job.goals = [vars(g) for g in plan.goals]
        total = len(parts.clean) + len(plan) - int(plan.mask(parts.clean.ids).sum())
        share = len(plan) / total
        job.notes = parts.reading_notes() | {
            "plan": plan.digest(),
            "poisoned": True,
            "records": total,
            "classes": list(parts.clean.classes),
        }
        if self.write != "plan":
            from bezoar.data.shards import write_shards

            folder, partial = job.folder / "shards", job.folder / "shards.part"
            for left in (
                folder,
                partial,
            ):  # of an attempt that was cut off, or that a fresh one replaces
                shutil.rmtree(left, ignore_errors=True)
            write_shards(partial, replace(parts, plan=plan).records, format=self.stored)
            partial.rename(folder)
            job.notes["stored"] = self.stored
        return {
            "poisons": Measure(len(plan), total, len(plan), len(plan), "poisoned records, counted"),
            "poison_rate": Measure(
                share, total, share, share, "poisoned records / all records, counted"
            ),
        }


def derive_plan(given: dict[str, Any], parts: Any, target: str, seed: int) -> Any:
    """The plan that a poison method makes of these data: a function of the inputs and the seed alone."""
    from bezoar.attacks.plan import Goal
    from bezoar.data import stored_pairs
    from bezoar.data.pairs import Pairs
    from bezoar.runs import inputs

    clean: Pairs | stored_pairs.StoredPairs = parts.clean
    if not clean.captions:
        raise UserError("these data have no captions to poison")
    free = [i for i, taken in enumerate(parts.plan.mask(clean.ids)) if not taken]
    source = stored_pairs.subset(clean, free) if parts.plan.edits else clean
    if isinstance(given["victims"], Run):
        raise UserError(
            f"victims are drawn from a data set, not from run {given['victims'].name}; name its test data"
        )
    pool = inputs.read_pairs(given["victims"]) if given["victims"] is not None else None
    trigger = given["trigger"]
    goal = Goal(target, registry.spec(trigger) if trigger else None)
    if not target and registry.method_name(type(given["poison"])) != "targeted":
        raise UserError("give a --target: the class or word that poisoned images are to be read as")
    if pool is not None and parts.plan.edits:
        used = {e.source for e in parts.plan.edits}
        pool = pool.take([i for i, k in enumerate(pool.ids) if k not in used])
    made = given["poison"](source, goal, seed, pool)
    if pool is not None and (both := {e.source for e in made.edits}.intersection(clean.ids)):
        raise UserError(
            f"victim {min(both)!r} has the id of a record of the data, so that a plan cannot tell their images apart; "
            "give one of the two sets ids of its own"
        )
    stamps = tuple(registry.make("trigger", g.trigger) if g.trigger else None for g in made.goals)
    made = replace(
        made, stamps=stamps, victims=registry.spec(given["victims"]) if pool is not None else None
    )
    wanted = {e.source for e in made.edits}
    sources = source.take([i for i, k in enumerate(source.ids) if k in wanted])
    return made.with_hashes(sources if pool is None else Pairs.concat([sources, _same(pool, sources)]))


def _same(pool: Any, source: Any) -> Any:
    """Victim images beside the source's: fields that only one of them has are left out."""
    if pool.images.shape[2:] != source.images.shape[2:]:
        sizes = f"{tuple(pool.images.shape[2:])} px, the data {tuple(source.images.shape[2:])} px"
        raise UserError(f"victims are {sizes}; give both one size")
    return replace(pool, captions=pool.captions or ("",) * len(pool))


def verify_plan(run: Run) -> dict[str, Any]:
    """Derive a poison run's plan anew from its inputs and hold it against the written one.

    Raises UserError that names the first record whose caption, id or pixels differ.
    """
    from bezoar.attacks.plan import Plan, differences
    from bezoar.runs import inputs

    if run.verb != "poison":
        raise UserError(f"{run.name} is a {run.verb} run; --verify takes a poison run")
    manifest = run.manifest
    ask = manifest["ask"]
    written = Plan.read(run.file("plan.jsonl"), functools.partial(registry.make, "trigger"))
    above = ask["data"].get("run")
    parts = (
        inputs.open_dataset(run.sibling(above))
        if above
        else inputs.open_dataset(inputs.root_method(run))
    )
    said = {k: ask[k]["spec"] if ask[k] else "" for k in KINDS}
    made = {
        k: registry.make(k if k != "victims" else "data", spec) if spec else None
        for k, spec in said.items()
    }
    derived = parts.plan.merge(derive_plan(made, parts, ask["target"], ask["seed"]))
    if found := differences(written, derived):
        raise UserError(
            f"{run.name} does not verify, {len(found)} differences; the first: {found[0]}"
        )
    return {"run": run.name, "verified": True, "records": len(written), "plan": written.digest()}


KINDS = ("poison", "trigger", "victims")
