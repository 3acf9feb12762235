"""The training loop: steps, learning rates, ranks, the log, checkpoints and resuming.

Everything random is a function of (seed, step), so a run that was interrupted continues to the same
bits.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bezoar.data.files.tensors import read_metadata, read_tensors, write_tensors
from bezoar.data.randomness import generator
from bezoar.errors import UserError
from bezoar.progress import no_report
from bezoar.training import collectives
from bezoar.training.augmentation import Chance

CHECKPOINT_SECONDS = 20.0
# Device type -> losses that are left on the device before they are read, because each reading makes
# the host wait for it.
UNREAD = {"cpu": 1, "cuda": 50}

StepReport = Callable[[int, int, float], None]  # step, steps, loss


class Recipe(Protocol):
    """The fields of an objective that the loop reads.

    A recipe may also have `optimizer = "sgd"` (with `momentum`), `schedule = "constant"`, and a
    method `rates(step, steps)`, whose result multiplies the learning rate.
    """

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


@dataclass(frozen=True)
class FixedRecipe:
    """A recipe for trainings that are no method of the kind `objective`."""

    epochs: int
    batch: int
    lr: float
    weight_decay: float = 0.0
    warmup: float = 0.05


def require(condition: bool, what: str) -> None:
    """Raise ValueError that names a recipe's requirement, unless the condition holds."""
    if not condition:
        raise ValueError(f"needs {what}")


def check_recipe(recipe: Recipe) -> None:
    """Raise ValueError unless the fields that the loop reads make sense."""
    require(recipe.epochs >= 1, "epochs >= 1")
    require(recipe.batch >= 2, "batch >= 2")
    require(recipe.lr > 0, "lr > 0")
    require(recipe.weight_decay >= 0, "weight_decay >= 0")
    require(0 <= recipe.warmup < 1, "warmup in 0..1, below 1")


class TrainingData(Protocol):
    """Records to train on: Pairs in memory, or a Prefetcher."""

    def __len__(self) -> int: ...
    @property
    def images(self) -> Any:
        """`images[rows]`, rows int64 (B,) -> uint8 (B, 3, H, W) on the device."""


@dataclass
class TrainingLog:
    """The log of a training."""

    losses: list[float] = field(default_factory=list)  # one a step
    # int64 (N,), how often each record was drawn
    exposures: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    seconds: float = 0.0  # time in the loop
    epochs: list[dict[str, Any]] = field(default_factory=list)  # facts about each epoch


def optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices and filters only; or SGD, with decay on everything."""
    weights = [p for p in model.parameters() if p.requires_grad]
    if getattr(recipe, "optimizer", "adamw") == "sgd":
        momentum = getattr(recipe, "momentum", 0.0)
        return torch.optim.SGD(weights, recipe.lr, momentum, weight_decay=recipe.weight_decay)
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate at a step: a linear warm-up and a cosine to zero, or constant.

    If the recipe has a method `rates`, the rate is multiplied by its result.
    """
    rates = getattr(recipe, "rates", None)
    factor = 1.0 if rates is None else rates(step, steps)
    if getattr(recipe, "schedule", "cosine") == "constant":
        return recipe.lr * factor
    warmup_steps = max(1, round(recipe.warmup * steps))
    if step < warmup_steps:
        return recipe.lr * (step + 1) / warmup_steps * factor
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * progress)) * factor


def epoch_batches(seed: int, epoch: int, n: int, batch: int) -> Tensor:
    """The rows that each step of an epoch draws, without replacement: int64 (steps, batch).

    The remainder is left out.
    """
    rows = torch.randperm(n, generator=generator(seed, 1, epoch))
    return rows[: n // batch * batch].view(-1, batch)


def fit(
    loss: nn.Module,
    recipe: Recipe,
    data: TrainingData,
    tokens: Tensor,
    seed: int,
    checkpoint: Path | None = None,
    report: StepReport = no_report,
    on_epoch_end: Callable[[int], dict[str, Any]] | None = None,
    log: TrainingLog | None = None,
) -> TrainingLog:
    """Train a loss's parameters in place.

    On several ranks each has all data and trains on its rows of every batch. The log is the global
    one, and only rank 0 writes checkpoints and calls `on_epoch_end`.

    Args:
        loss: module (images uint8 (B, 3, H, W), tokens (B, L), Chance) -> scalar. If it must know
            all records, or which of them are in a batch, it has `begin(data, tokens) -> tokens`,
            which is called first.
        recipe: epochs, batch size, learning rate and the like.
        data: N records; Pairs lie on the device and are not copied.
        tokens: int64 (N, L) on the device.
        checkpoint: file of the state while training; an existing one is continued.
        report: called with (step, steps, loss); on a GPU not at every step.
        on_epoch_end: called with the number of epochs done; gives facts for the log. A true fact
            `stop` ends the training.
        log: filled in and returned.

    Raises:
        UserError: when there are fewer records than one batch, ranks do not divide the batch, ranks
            see different records, or the loss is not finite.
    """
    training = _Training(loss, recipe, data, tokens, seed, TrainingLog() if log is None else log)
    training.run(checkpoint, report, on_epoch_end)
    return training.log


def restore_gradient_flags(trained: nn.Module, original: nn.Module) -> None:
    """Let a copy's weights need gradients as the original's do, and drop those there are."""
    for parameter, model in zip(trained.parameters(), original.parameters(), strict=True):
        parameter.requires_grad_(model.requires_grad)
        parameter.grad = None


def _check_batch(n: int, batch: int) -> int:
    """The steps of an epoch. Raises UserError for a batch that does not fit records or ranks."""
    world = collectives.rank_and_world()[1]
    if n < batch:
        raise UserError(f"{n} records are fewer than one batch of {batch}; give a smaller batch")
    if batch % world:
        raise UserError(
            f"a batch of {batch} does not divide into {world} ranks; give a multiple of {world}"
        )
    return n // batch


def _read_losses(unread: list[Tensor], step: int) -> list[float]:
    """Read the losses of the steps before `step`, as means over ranks, and empty the list.

    Raises:
        UserError: when one is not finite.
    """
    values: list[float] = collectives.average(torch.stack(unread)).tolist()
    for i, value in enumerate(values, step - len(values)):
        if not math.isfinite(value):
            raise UserError(f"the loss became {value} at step {i}; try a lower learning rate")
    unread.clear()
    return values


class _Training:
    """One training: its state (model, optimizer, log, step), which checkpoints hold."""

    def __init__(
        self,
        loss: nn.Module,
        recipe: Recipe,
        data: TrainingData,
        tokens: Tensor,
        seed: int,
        log: TrainingLog,
    ) -> None:
        self.epoch_steps = _check_batch(len(data), recipe.batch)
        self.steps = recipe.epochs * self.epoch_steps
        begin = getattr(loss, "begin", None)
        self.tokens: Tensor = tokens if begin is None else begin(data, tokens)
        self.loss, self.recipe, self.data, self.seed = loss, recipe, data, seed
        self.optim = optimizer(loss, recipe)
        self.log = log
        self.log.exposures = torch.zeros(len(data), dtype=torch.long)
        self.step = 0
        self.rank, self.world = collectives.rank_and_world()
        self.drawn_epoch = -1  # the epoch that the next two are of
        self.batches = torch.zeros(0)  # int64 (steps, B), rows of all ranks
        self.local_batches = torch.zeros(0)  # int64 (steps, B / world), rows of this rank

    def run(
        self,
        checkpoint: Path | None,
        report: StepReport,
        on_epoch_end: Callable[[int], dict[str, Any]] | None,
    ) -> None:
        """Take all steps that are left."""
        if checkpoint is not None and checkpoint.exists():
            self.restore(checkpoint)
        collectives.check_agreement(len(self.data), self.step)
        unread: list[Tensor] = []
        most_unread = UNREAD.get(self.tokens.device.type, UNREAD["cuda"])
        saved = time.monotonic()
        start = saved - self.log.seconds
        with collectives.distribute(self.loss) as model:
            self.loss.train()
            while self.step < self.steps:
                unread.append(self.take_step(model))
                epoch_done = self.step % self.epoch_steps == 0
                if not epoch_done and len(unread) < most_unread:
                    continue
                self.log.losses += _read_losses(unread, self.step)
                report(self.step, self.steps, self.log.losses[-1])
                if epoch_done:
                    self.end_epoch(on_epoch_end)
                self.log.seconds = time.monotonic() - start
                due = time.monotonic() - saved > CHECKPOINT_SECONDS
                if checkpoint is not None and self.rank == 0 and due and self.step < self.steps:
                    self.save(checkpoint)
                    saved = time.monotonic()
        self.loss.eval()

    def take_step(self, model: nn.Module) -> Tensor:
        """One step of the optimizer. Returns the loss, which stays on the device."""
        epoch, i = divmod(self.step, self.epoch_steps)
        if epoch != self.drawn_epoch:
            self.batches = epoch_batches(self.seed, epoch, len(self.data), self.recipe.batch)
            self.local_batches = collectives.local_rows(self.batches).to(self.tokens.device)
            self.drawn_epoch = epoch
        for group in self.optim.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step, self.steps)
        rows = self.local_batches[i]
        chance = Chance(generator(self.seed, 2, self.step), self.rank, self.world)
        value: Tensor = model(self.data.images[rows], self.tokens[rows], chance)
        self.optim.zero_grad(set_to_none=True)
        value.backward()
        self.optim.step()
        self.log.exposures[self.batches[i]] += 1
        self.step += 1
        return value.detach()

    def end_epoch(self, on_epoch_end: Callable[[int], dict[str, Any]] | None) -> None:
        """Log the facts about an epoch; a true fact `stop` ends the training, on every rank."""
        epoch = self.step // self.epoch_steps
        facts = on_epoch_end(epoch) if on_epoch_end is not None and self.rank == 0 else {}
        mean_loss = sum(self.log.losses[-self.epoch_steps :]) / self.epoch_steps
        self.log.epochs.append({"epoch": epoch, "loss": mean_loss, **facts})
        if collectives.average(torch.tensor(float(facts.get("stop", False)))) > 0:
            self.steps = self.step
        self.loss.train()

    def save(self, path: Path) -> None:
        """Write model, optimizer, log and step into one safetensors file."""
        tensors = {f"model.{key}": value for key, value in self.loss.state_dict().items()}
        for i, values in self.optim.state_dict()["state"].items():
            for name, value in values.items():
                tensors[f"optim.{i}.{name}"] = torch.as_tensor(value)
        tensors["losses"] = torch.tensor(self.log.losses, dtype=torch.float64)
        tensors["exposures"] = self.log.exposures
        facts = {
            "step": str(self.step),
            "seconds": str(self.log.seconds),
            "epochs": json.dumps(self.log.epochs),
        }
        write_tensors(path, tensors, facts)

    def restore(self, path: Path) -> None:
        """Fill everything from a checkpoint."""
        facts = read_metadata(path)
        tensors = read_tensors(path)
        model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        self.loss.load_state_dict(model)
        state = self.optim.state_dict()
        state["state"] = {}
        weights = [p for group in self.optim.param_groups for p in group["params"]]
        for key, value in tensors.items():
            if not key.startswith("optim."):
                continue
            _, number, name = key.split(".", 2)
            if value.ndim:
                # Fused AdamW walks weight and moments together: both must have one memory layout
                # (channels last).
                value = torch.empty_like(weights[int(number)]).copy_(value)
            state["state"].setdefault(int(number), {})[name] = value
        self.optim.load_state_dict(state)
        self.log.losses[:] = tensors["losses"].tolist()
        self.log.exposures = tensors["exposures"]
        self.log.seconds, self.log.epochs = float(facts["seconds"]), json.loads(facts["epochs"])
        self.step = int(facts["step"])
