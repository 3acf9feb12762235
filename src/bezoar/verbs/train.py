"""Train an encoder on a data set, poisoned or not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from bezoar import registry
from bezoar.errors import UserError
from bezoar.run import Input, Job, Takes


@dataclass(frozen=True)
class Train:
    """Train an encoder. A checkpoint is kept: a run that was cut off goes on to the same bits."""

    joint: ClassVar[bool] = True  # under torchrun every rank does this verb's work

    data: Annotated[Input, Takes("data"), "data set, or a poison run"]
    network: Annotated[Input, Takes("network"), "see `bezoar list network`"] = "clip_small"
    objective: Annotated[Input, Takes("objective"), "loss and recipe: see `bezoar list objective`"] = "clip"
    keep: Annotated[Input, Takes("run"), "scan run whose keep-list chooses the records"] = None
    follow: Annotated[Input, Takes("data"), "measure zero-shot success on these data after every epoch"] = None

    def work(self, job: Job) -> dict[str, Any]:
        """-> encoder.json + encoder.safetensors, log.jsonl, exposures.safetensors (how often each record was drawn)."""
        import torch
        from safetensors.torch import save_file

        from bezoar import distributed, feed, indexed, inputs, training
        from bezoar.encoder import precision_for
        from bezoar.scores import Measure, average

        given, parts = job.inputs, inputs.dataset(job.inputs["data"])
        pairs = parts.records
        if not pairs.captions:
            raise UserError("these data have no captions to train on")
        if given["keep"] is not None:
            kept = set(given["keep"].file("keep.txt").read_text().split("\n"))
            pairs = indexed.subset(pairs, [i for i, k in enumerate(pairs.ids) if k in kept])
        torch.manual_seed(job.seed)
        network, recipe = given["network"], given["objective"]
        try:
            encoder = network(pairs.size, network.vocabulary(pairs.captions)).to(job.device)
        except ValueError as error:
            raise UserError(str(error)) from error
        encoder.precision = precision_for(job.device)
        encoder.about |= {"objective": registry.spec(recipe), "poisoned": bool(parts.plan.edits)}
        if parts.plan.edits:
            encoder.about |= {"plan": parts.plan.digest(), "goals": [vars(g) for g in parts.plan.goals]}
        loss = recipe(encoder).to(job.device)
        rank, world = distributed.place()

        def order(epoch: int) -> torch.Tensor:
            return distributed.own(training.order(job.seed, epoch, len(pairs), recipe.batch))

        with feed.fed(pairs, job.device, order, recipe.epochs) as data:
            log = training.fit(
                loss,
                recipe,
                data,
                indexed.tokens(encoder, pairs.captions),
                job.seed,
                job.folder / "checkpoint.safetensors",
                lambda step, steps, value: job.progress.step(step, steps, f"loss {value:.3f}"),
                self._follow(job, encoder, parts),
            )
        if rank > 0:
            return {}
        encoder.save(job.folder)
        save_file({"exposures": log.exposures, "losses": torch.tensor(log.losses)}, job.folder / "ledger.safetensors")
        (job.folder / "log.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in log.epochs))
        (job.folder / "checkpoint.safetensors").unlink(missing_ok=True)
        seconds, steps = log.seconds, len(log.losses)
        rate, tail = steps * recipe.batch / max(seconds, 1e-9), log.losses[-max(1, steps // 20) :]
        job.notes = parts.reading() | {
            "records": len(pairs),
            "steps": steps,
            "pairs_per_second": round(rate),
            "precision": encoder.precision,
            "ranks": world,
            "images": data.told() if isinstance(data, feed.Feed) else "in memory",
        }
        poisons = torch.from_numpy(parts.plan.mask(pairs.ids))
        out = {"final_loss": average(torch.tensor(tail), "mean loss of the last twentieth of the steps")}
        n = int(poisons.sum())
        if parts.plan.edits:
            drawn = int(log.exposures[poisons].sum())
            out["poisons_kept"] = Measure(n, len(pairs), n, n, "poisons among the records trained on, counted")
            out["poison_exposures"] = Measure(drawn, n, drawn, drawn, "times that training drew a poison, counted")
        return out

    def _follow(self, job: Job, encoder: Any, parts: Any) -> Any:
        """After every epoch: accuracy and success on `follow`, for the curves."""
        if job.inputs["follow"] is None:
            return None
        from bezoar import inputs

        probe = registry.make("probe", "zero_shot")
        test = inputs.read(job.inputs["follow"])
        test = test.take(range(min(1000, len(test))))

        def measure(epoch: int) -> dict:
            found = probe(encoder, None, test, parts.plan.goals, parts.victims)
            return {k: m.value for k, m in found.items() if k.startswith(("clean_acc", "attack_success", "targeted_s"))}

        return measure
