"""Train an encoder on a data set, poisoned or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from bezoar import registry
from bezoar.errors import UserError
from bezoar.runs.execute import Job
from bezoar.runs.run import CHECKPOINT
from bezoar.runs.verb import Input, Takes

if TYPE_CHECKING:
    from torch import Tensor

    from bezoar.attacks.plan import Goal, Plan
    from bezoar.data.pairs import Pairs
    from bezoar.data.stored_pairs import StoredPairs
    from bezoar.encoders.encoder import Encoder
    from bezoar.evaluation.scores import Measure
    from bezoar.runs.inputs import Dataset
    from bezoar.runs.run import Run
    from bezoar.training.loop import TrainingLog

NEIGHBOURS, VOTERS = (
    200,
    10_000,
)  # of a kNN monitor: how many vote, of how many labelled records at most


@dataclass(frozen=True)
class Train:
    """Train an encoder. A checkpoint is kept: a run that was cut off goes on to the same bits."""

    joint: ClassVar[bool] = True  # under torchrun every rank does this verb's work

    data: Annotated[Input, Takes("data", positional=True), "data set, or a poison run"]
    network: Annotated[Input, Takes("network"), "see `bezoar list network`"] = "clip_small"
    objective: Annotated[
        Input, Takes("objective"), "loss and recipe: see `bezoar list objective`"
    ] = "clip"
    keep: Annotated[Input, Takes("run"), "scan run whose keep-list chooses the records"] = None
    follow: Annotated[
        Input, Takes("data"), "measure success on these data after every epoch, zero-shot or by kNN"
    ] = None

    def work(self, job: Job) -> dict[str, Any]:
        """-> encoder.json + encoder.safetensors, log.jsonl, ledger.safetensors (losses; how often each record was drawn)."""
        import torch
        from safetensors.torch import save_file

        from bezoar.encoders.encoder import precision_for
        from bezoar.runs import inputs
        from bezoar.training import collectives, loop, prefetch

        given, parts = job.inputs, inputs.open_dataset(job.inputs["data"])
        pairs = parts.records if given["keep"] is None else kept(parts.records, given["keep"])
        torch.manual_seed(job.seed)
        network, recipe = given["network"], given["objective"]
        try:
            encoder = network(pairs.size, network.vocabulary(pairs.captions)).to(job.device)
        except ValueError as error:
            raise UserError(str(error)) from error
        tokens = tokens_for(encoder, recipe, pairs.captions, len(pairs))
        encoder.precision = precision_for(job.device)
        encoder.about |= {"objective": registry.spec(recipe), "poisoned": bool(parts.plan.edits)}
        if parts.plan.edits:
            encoder.about |= {
                "plan": parts.plan.digest(),
                "goals": [vars(g) for g in parts.plan.goals],
            }
        loss, following = recipe(encoder).to(job.device), self._follow(job, encoder, parts)
        rank, world = collectives.rank_and_world()

        def order(epoch: int) -> torch.Tensor:
            return collectives.local_rows(
                loop.epoch_batches(job.seed, epoch, len(pairs), recipe.batch)
            )

        with prefetch.training_data(pairs, job.device, order, recipe.epochs) as data:
            log = loop.fit(
                loss,
                recipe,
                data,
                tokens,
                job.seed,
                job.folder / CHECKPOINT,
                lambda step, steps, value: job.progress.step(step, steps, f"loss {value:.3f}"),
                following,
            )
        if rank > 0:
            return {}
        encoder.save(job.folder)
        save_file(
            {"exposures": log.exposures, "losses": torch.tensor(log.losses)},
            job.folder / "ledger.safetensors",
        )
        (job.folder / "log.jsonl").write_text(
            "".join(json.dumps(epoch) + "\n" for epoch in log.epochs)
        )
        (job.folder / CHECKPOINT).unlink(missing_ok=True)
        job.notes = parts.reading_notes() | {
            "records": len(pairs),
            "steps": len(log.losses),
            "pairs_per_second": round(len(log.losses) * recipe.batch / max(log.seconds, 1e-9)),
            "precision": encoder.precision,
            "ranks": world,
            "images": data.describe() if isinstance(data, prefetch.Prefetcher) else "in memory",
        }
        return measured(log, parts.plan, pairs.ids)

    def _follow(self, job: Job, encoder: Any, parts: Any) -> Any:
        """After every epoch: accuracy and success on `follow`, for the curves; by kNN where the encoder reads no text."""
        if job.inputs["follow"] is None:
            return None
        from bezoar.runs import inputs

        followed = inputs.open_dataset(job.inputs["follow"])
        test, known, probe = (
            inputs.in_memory(followed.clean),
            None,
            registry.make("probe", "zero_shot"),
        )
        if encoder.text is None:
            test, known = monitored(followed, parts.plan.goals)
            probe = registry.make(
                "probe", f"knn:k={min(NEIGHBOURS, max(1, len(known) // 10))},temperature=0.5"
            )
        test = test.take(range(min(1000, len(test))))

        def measure(epoch: int) -> dict:
            found = probe(encoder, known, test, parts.plan.goals, parts.victims)
            short = {k.removeprefix("knn."): m.value for k, m in found.items()}
            return {
                k: v
                for k, v in short.items()
                if k.startswith(("clean_acc", "attack_success", "targeted_s"))
            }

        return measure


def kept(records: Pairs | StoredPairs, scan: Run) -> Pairs | StoredPairs:
    """The records that a scan's keep-list names."""
    from bezoar.data import stored_pairs

    names = set(scan.file("keep.txt").read_text(encoding="utf-8").split("\n"))
    return stored_pairs.subset(records, [i for i, k in enumerate(records.ids) if k in names])


def measured(log: TrainingLog, plan: Plan, ids: Sequence[str]) -> dict[str, Measure]:
    """The last loss; of a poisoned set, how many poisons were trained on, and how often one was drawn."""
    import torch

    from bezoar.evaluation.scores import Measure, average

    tail = torch.tensor(log.losses[-max(1, len(log.losses) // 20) :])
    out = {"final_loss": average(tail, "mean loss of the last twentieth of the steps")}
    if plan.edits:
        poisons = torch.from_numpy(plan.mask(ids))
        n, drawn = int(poisons.sum()), int(log.exposures[poisons].sum())
        out["poisons_kept"] = Measure(
            n, len(ids), n, n, "poisons among the records trained on, counted"
        )
        out["poison_exposures"] = Measure(
            drawn, n, drawn, drawn, "times that training drew a poison, counted"
        )
    return out


def tokens_for(encoder: Encoder, recipe: Any, captions: Sequence[str], count: int) -> Tensor:
    """int64 (count, L), the captions; L is 0 for an objective that reads none (its attribute `captions` is False).

    Raises UserError when the objective, the data and the encoder do not fit each other.
    """
    import torch

    from bezoar.encoders.encoder import tokenize_captions

    objective, network = (
        registry.method_name(type(recipe)),
        encoder.about["network"].partition(":")[0],
    )
    if getattr(recipe, "captions", True):
        if not captions:
            raise UserError(
                f"these data have no captions to train on, and objective {objective} needs them"
            )
        if encoder.text is None:
            raise UserError(
                f"objective {objective} reads captions, and network {network} has no text tower"
            )
        return tokenize_captions(encoder, captions)
    if encoder.text is not None:
        raise UserError(
            f"objective {objective} trains images alone, and network {network} has a text tower; take one without"
        )
    return torch.zeros(count, 0, dtype=torch.long, device=encoder.device)


def monitored(followed: Dataset, goals: Sequence[Goal]) -> tuple[Pairs, Pairs]:
    """What a kNN monitor is measured on, and the labelled records that vote: from the training split of the same data.

    Without such a split a fixed fifth of the data, 1000 at most, is measured on, and the others vote. All are clean.
    Raises UserError when no neighbours can be had, before anything is trained.
    """
    from bezoar.data.randomness import sample_rows
    from bezoar.evaluation import success
    from bezoar.runs import inputs
    from bezoar.verbs import evaluate

    test = inputs.in_memory(followed.clean)
    if getattr(followed.method, "split", None) not in (None, "train"):
        train = inputs.read_pairs(evaluate.training_split(followed.method))
    else:
        rows = sample_rows(test.ids, len(test), 0)
        apart = min(1000, len(test) // 5)
        train, test = test.take(rows[apart:]), test.take(rows[:apart])
    return test, success.select_labelled(train, test, goals, VOTERS)
