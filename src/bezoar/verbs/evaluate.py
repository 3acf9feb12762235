"""Measure an encoder: accuracy, attack success, what it was before the attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from bezoar.errors import UserError
from bezoar.run import Input, Job, Run, Takes


@dataclass(frozen=True)
class Evaluate:
    """Measure an encoder with one or more probes. Trigger and target are learnt from the encoder's parents."""

    encoder: Annotated[Input, Takes("encoder"), "a train run, or a network with published weights"]
    test: Annotated[Input, Takes("data"), "test data; without it, the test split of the training data"] = None
    probe: Annotated[tuple[Input, ...], Takes("probe"), "one or more: see `bezoar list probe`"] = ("zero_shot", "z_score")
    baseline: Annotated[Input, Takes("encoder"), "the clean twin, for attack_success_baseline (ASR-B)"] = None
    attack: Annotated[Input, Takes("run"), "poison run whose goals are measured, when the encoder's parents have none"] = None

    def work(self, job: Job) -> dict[str, Any]:
        """-> the metrics of the manifest."""
        from bezoar import inputs, registry

        given = job.inputs
        run = given["encoder"]
        attack = given["attack"] or (run if isinstance(run, Run) else None)
        goals = inputs.goals(attack)
        poison = attack.ancestor("poison") if attack else None
        victims = inputs.dataset(poison).victims if poison else None
        if poison and victims is None and any(g.victims for g in goals):
            parts = inputs.dataset(poison)
            wanted = {v for g in goals for v in g.victims}
            victims = parts.clean.take([i for i, k in enumerate(parts.clean.ids) if k in wanted])
        method = given["test"]
        if method is None:
            if not isinstance(run, Run):
                raise UserError("name the TEST data: this encoder's training data are not known")
            method = inputs.held_out(inputs.root(run))
        parts = inputs.dataset(method)
        test = parts.pairs.to(job.device)
        job.notes = parts.reading() | {
            "test": registry.spec(method) if not isinstance(method, Run) else method.name,
            "records": len(test),
        }
        job.goals = [vars(g) for g in goals]
        encoder = inputs.encoder(run, job.device)
        out: dict[str, Any] = {}
        for i, probe in enumerate(given["probe"]):
            job.progress.step(i, len(given["probe"]), registry.source_name(type(probe)))
            out |= probe(encoder, None, test, goals, victims)
        if given["baseline"] is not None:
            twin = inputs.encoder(given["baseline"], job.device)
            for probe in given["probe"]:
                found = probe(twin, None, test, goals, victims)
                renamed = {name.replace("attack_success", "attack_success_baseline", 1): m for name, m in found.items()}
                out |= {k: m for k, m in renamed.items() if k.startswith("attack_success_baseline")}
                out |= {"baseline." + k: m for k, m in found.items() if k == "clean_accuracy" or k.startswith("targeted_s")}
        return out
