"""The only training loop: steps, schedule, ranks, ledger, checkpoint, resume.

Everything random is a function of (seed, step), so that a run that was cut off goes on to the same bits.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bezoar.data.pairs import Pairs
from bezoar.data.randomness import generator
from bezoar.errors import UserError
from bezoar.training import collectives
from bezoar.training.augmentation import Chance

CHECKPOINT_SECONDS = 20.0
UNREAD = {
    "cpu": 1,
    "cuda": 50,
}  # losses left on a device before they are read: each reading makes the host wait for it


class Recipe(Protocol):
    """What the loop reads of an objective's fields."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup(self) -> float: ...


@dataclass
class TrainingLog:
    """losses: one a step. exposures: int64 (N,), how often each record was drawn. seconds: time in the loop."""

    losses: list[float] = field(default_factory=list)
    exposures: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    seconds: float = 0.0
    epochs: list[dict] = field(default_factory=list)


def optimizer(model: nn.Module, recipe: Recipe, fused: bool = True) -> torch.optim.Optimizer:
    """AdamW, weight decay on matrices and filters alone; for a recipe that says `sgd`, SGD with weight decay on all."""
    if getattr(recipe, "optimizer", "adamw") == "sgd":
        every = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(
            every, recipe.lr, getattr(recipe, "momentum", 0.0), weight_decay=recipe.weight_decay
        )
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), eps=1e-6, fused=fused)


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """Learning rate at a step: linear warm-up, then cosine to zero; for a recipe that says `constant`, the same.

    A recipe may have a say of its own: `rates(step, steps)`, a factor on this.
    """
    own = getattr(recipe, "rates", None)
    return _rate(recipe, step, steps) * (1.0 if own is None else own(step, steps))


def _rate(recipe: Recipe, step: int, steps: int) -> float:
    if getattr(recipe, "schedule", "cosine") == "constant":
        return recipe.lr
    warm = max(1, round(recipe.warmup * steps))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def epoch_batches(seed: int, epoch: int, n: int, batch: int) -> Tensor:
    """int64 (steps, batch): which rows each step of an epoch draws; without replacement, the remainder left out."""
    rows = torch.randperm(n, generator=generator(seed, 1, epoch))
    return rows[: n // batch * batch].view(-1, batch)


def fit(
    loss: nn.Module,
    recipe: Recipe,
    data: Pairs,
    tokens: Tensor,
    seed: int,
    checkpoint: Path | None = None,
    report: Callable[[int, int, float], None] = lambda step, steps, value: None,
    on_epoch_end: Callable[[int], dict] | None = None,
    log: TrainingLog | None = None,
) -> TrainingLog:
    """Train in place. data.images uint8 and tokens int64 (N, L) lie on the device and are never copied.

    checkpoint: where the state is kept while training; an existing one is gone on with. report(step, steps, loss), on a
    GPU not at every step. each_epoch(epoch) -> facts for the log; a fact `stop` that is true ends the training. log: filled
    in and returned. On several ranks each has all data and trains on its rows of every batch; the log is the global one,
    and only rank 0 keeps checkpoints and calls each_epoch. A loss that must know all records, or which of them are in a
    batch, has `begin(data, tokens) -> tokens`, which is called before all else.
    Raises UserError when the data hold less than a batch, ranks do not divide it, or the loss is not finite.
    """
    batch, each = recipe.batch, len(data) // recipe.batch
    rank, world = collectives.rank_and_world()
    if not each:
        raise UserError(
            f"{len(data)} records are fewer than one batch of {batch}; give a smaller batch"
        )
    if batch % world:
        raise UserError(
            f"a batch of {batch} does not divide into {world} ranks; give a multiple of {world}"
        )
    steps, device = recipe.epochs * each, tokens.device
    begin = getattr(loss, "begin", None)
    tokens = tokens if begin is None else begin(data, tokens)
    optim = optimizer(loss, recipe)
    log, step = TrainingLog() if log is None else log, 0
    log.exposures = torch.zeros(len(data), dtype=torch.long)
    if checkpoint is not None and checkpoint.exists():
        step = _restore(checkpoint, loss, optim, log)
    collectives.agree(len(data), step)
    start, saved = time.monotonic() - log.seconds, time.monotonic()
    unread: list[Tensor] = []
    drawn = -1
    with collectives.joined(loss) as model:
        loss.train()
        while step < steps:
            epoch, at = divmod(step, each)
            if epoch != drawn:
                rows, drawn = epoch_batches(seed, epoch, len(data), batch), epoch
                own = collectives.local_rows(rows).to(device)
            for group in optim.param_groups:
                group["lr"] = rate(recipe, step, steps)
            value = model(
                data.images[own[at]], tokens[own[at]], Chance(generator(seed, 2, step), rank, world)
            )
            optim.zero_grad(set_to_none=True)
            value.backward()
            optim.step()
            unread.append(value.detach())
            log.exposures[rows[at]] += 1
            step += 1
            if step % each and len(unread) < UNREAD.get(device.type, 50):
                continue
            log.losses += _read(unread, step)
            report(step, steps, log.losses[-1])
            if step % each == 0:
                facts = on_epoch_end(epoch + 1) if on_epoch_end is not None and rank == 0 else {}
                log.epochs.append(
                    {"epoch": epoch + 1, "loss": sum(log.losses[-each:]) / each, **facts}
                )
                if collectives.average(torch.tensor(float(facts.get("stop", False)))) > 0:
                    steps = step
                loss.train()
            log.seconds = time.monotonic() - start
            due = time.monotonic() - saved > CHECKPOINT_SECONDS
            if checkpoint is not None and rank == 0 and due and step < steps:
                _keep(checkpoint, loss, optim, log, step)
                saved = time.monotonic()
    loss.eval()
    return log


def _read(unread: list[Tensor], step: int) -> list[float]:
    """The losses of the steps up to `step`, over all ranks, taken off the device. Raises UserError when one is not finite."""
    values = collectives.average(torch.stack(unread)).tolist()
    for i, value in enumerate(values, step - len(values)):
        if not math.isfinite(value):
            raise UserError(f"the loss became {value} at step {i}; try a lower learning rate")
    unread.clear()
    return values


def _keep(
    path: Path, loss: nn.Module, optim: torch.optim.Optimizer, log: TrainingLog, step: int
) -> None:
    """Model, optimiser, log and step, in one safetensors file written under a temporary name."""
    tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in loss.state_dict().items()}
    for i, state in optim.state_dict()["state"].items():
        tensors |= {
            f"optim.{i}.{k}": torch.as_tensor(v).detach().cpu().contiguous()
            for k, v in state.items()
        }
    tensors["losses"], tensors["exposures"] = (
        torch.tensor(log.losses, dtype=torch.float64),
        log.exposures,
    )
    facts = {"step": str(step), "seconds": str(log.seconds), "epochs": json.dumps(log.epochs)}
    save_file(tensors, path.with_suffix(".tmp"), metadata=facts)
    os.replace(path.with_suffix(".tmp"), path)


def _restore(path: Path, loss: nn.Module, optim: torch.optim.Optimizer, log: TrainingLog) -> int:
    """Fill everything from a checkpoint; returns the step to go on with."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts: dict[str, Any] = file.metadata()
    tensors = load_file(path)
    loss.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    state = optim.state_dict()
    state["state"] = {}
    weights = [p for group in optim.param_groups for p in group["params"]]
    for key, v in tensors.items():
        if key.startswith("optim."):
            _, i, name = key.split(".", 2)
            # fused AdamW walks weight and moments together: both must lie in memory alike (channels last)
            like = torch.empty_like(weights[int(i)]).copy_(v) if v.ndim else v
            state["state"].setdefault(int(i), {})[name] = like
    optim.load_state_dict(state)
    log.losses[:], log.exposures = tensors["losses"].tolist(), tensors["exposures"]
    log.seconds, log.epochs = float(facts["seconds"]), json.loads(facts["epochs"])
    return int(facts["step"])


@dataclass(frozen=True)
class FixedRecipe:
    """A recipe that is no method of its own: what `fit` reads of a repair's fields."""

    epochs: int
    batch: int
    lr: float
    weight_decay: float = 0.0
    warmup: float = 0.05
