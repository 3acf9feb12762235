"""Heads: several small networks on frozen features, trained at once as one stack of matrices; means over heads."""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bezoar.data.randomness import generator
from bezoar.errors import UserError
from bezoar.evaluation import stats, success
from bezoar.evaluation.scores import Measure

ProgressReport = Callable[[int, int, str], Any]  # done, in all, at what
LEVELS = 1 << 16  # a unit is dropped by comparing 16 random bits
KEPT = 8  # stacks that a process remembers
_kept: OrderedDict[str, Stack] = OrderedDict()


class Recipe(Protocol):
    """What `fit` reads of a method's fields. dropout: of the first hidden layer."""

    @property
    def hidden(self) -> tuple[int, ...]: ...
    @property
    def dropout(self) -> float: ...
    @property
    def lr(self) -> float: ...
    @property
    def batch(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def shuffle(self) -> bool: ...
    @property
    def seeds(self) -> int: ...


@dataclass(frozen=True)
class Stack:
    """S heads with ReLU between layers. weights: float32 (S, in, out) a layer. biases: (S, 1, out)."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.weights[0])

    def one(self, head: int) -> Callable[[Tensor], Tensor]:
        """A head by itself: (N, D) -> logits (N, C)."""

        def read(z: Tensor) -> Tensor:
            for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
                z = torch.addmm(b[head], z.relu() if i else z, w[head])
            return z

        return read

    @staticmethod
    def draw(seeds: Sequence[int], widths: Sequence[int], device: torch.device) -> Stack:
        """Uniform in +-1 / sqrt(in), weights and biases, as nn.Linear is; a head's draw depends on its seed alone."""
        layers: list[list[Tensor]] = [[] for _ in range(2 * (len(widths) - 1))]
        for seed in seeds:
            g = generator(seed, 3)
            for i, (wide, out) in enumerate(itertools.pairwise(widths)):
                for j, rows in enumerate((wide, 1)):
                    layers[2 * i + j].append(
                        (torch.rand(rows, out, generator=g) * 2 - 1) / wide**0.5
                    )
        stacked = [torch.stack(parts).to(device) for parts in layers]
        return Stack(tuple(stacked[::2]), tuple(stacked[1::2]))

    def descend(self, x: Tensor, y: Tensor, keep: Tensor | None) -> None:
        """Leave the gradient of each head's mean cross-entropy in the parameters' `grad`, where there is room for it.

        x: (S, B, D). y: int64 (S, B). keep: (S, B, first hidden), what that layer's output is multiplied by, or None.
        Written out, because autograd would make new gradients, a megabyte each, at every step.
        """
        inputs = [x]
        for w, b in zip(self.weights[:-1], self.biases[:-1], strict=True):
            h = torch.baddbmm(b, inputs[-1], w).relu_()
            inputs.append(h.mul_(keep) if keep is not None and len(inputs) == 1 else h)
        slope = torch.baddbmm(self.biases[-1], inputs[-1], self.weights[-1]).softmax(2)
        slope.scatter_add_(2, y[..., None], slope.new_full((), -1.0).expand(*y.shape, 1)).div_(
            y.shape[1]
        )
        for i in reversed(range(len(inputs))):
            torch.bmm(inputs[i].transpose(1, 2), slope, out=self.weights[i].grad)
            torch.sum(slope, 1, keepdim=True, out=self.biases[i].grad)
            if i:
                slope = torch.bmm(slope, self.weights[i].transpose(1, 2)).mul_(
                    inputs[i].sign()
                )  # 1 where a unit was on
                slope = slope.mul_(keep) if keep is not None and i == 1 else slope


def no_report(done: int, total: int, text: str) -> None:
    """A report to nobody."""


def fit(
    x: Tensor, y: Tensor, classes: int, recipe: Recipe, report: ProgressReport = no_report
) -> Stack:
    """Train `recipe.seeds` heads on features x (N, D) and their classes y int64 (N,), where x is; Adam, last epoch.

    Each head has its own start, order and dropout, which depend on its number alone: a stack is its heads trained one by
    one. The last batch of an epoch is what is left. Inside `success.remembering` the same numbers are not fitted again: a
    sweep reads many attacked encoders beside the same clean one. Raises UserError when a head is not finite.
    """
    if not success.is_caching():
        return _fit(x, y, classes, recipe, report)
    asked = hashlib.sha256(repr((recipe, classes, x.shape, x.dtype, str(x.device))).encode())
    for part in (x, y):
        asked.update(part.contiguous().cpu().numpy().tobytes())
    key = asked.hexdigest()
    if key not in _kept:
        _kept[key] = _fit(x, y, classes, recipe, report)
    _kept.move_to_end(key)
    while len(_kept) > KEPT:
        _kept.popitem(last=False)
    return _kept[key]


def _fit(x: Tensor, y: Tensor, classes: int, recipe: Recipe, report: ProgressReport) -> Stack:
    seeds, n, device = range(recipe.seeds), len(x), x.device
    stack = Stack.draw(seeds, (x.shape[1], *recipe.hidden, classes), device)
    parameters = [*stack.weights, *stack.biases]
    for p in parameters:
        p.grad = torch.empty_like(p)
    optim = torch.optim.Adam(parameters, recipe.lr, fused=True)
    masks = Masks(recipe, device) if recipe.hidden and recipe.dropout else None
    for epoch in range(recipe.epochs):
        for rows in orders(recipe, epoch, n).to(device).split(recipe.batch, 1):
            stack.descend(x[rows], y[rows], masks(rows.shape[1]) if masks else None)
            optim.step()
        report(epoch + 1, recipe.epochs, f"{recipe.seeds} heads, epoch {epoch + 1}")
    for p in parameters:
        p.grad = None
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise UserError(
            f"a head's weights are not finite after {recipe.epochs} epochs; give a lower learning rate"
        )
    return stack


def orders(recipe: Recipe, epoch: int, n: int) -> Tensor:
    """int64 (S, n): in which order each head sees the records."""
    if not recipe.shuffle:
        return torch.arange(n).expand(recipe.seeds, n)
    return torch.stack(
        [torch.randperm(n, generator=generator(seed, 4, epoch)) for seed in range(recipe.seeds)]
    )


class Masks:
    """Dropout: 0, or 1 / (1 - p), p to the next 2^-16; a stream a head."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.width = recipe.hidden[0]
        self.dropped = round(LEVELS * recipe.dropout)
        self.streams = [
            torch.Generator(device).manual_seed(generator(s, 5).initial_seed())
            for s in range(recipe.seeds)
        ]
        self.device = device

    def __call__(self, batch: int) -> Tensor:
        """float32 (S, batch, width)."""
        count = batch * self.width
        bits = torch.empty(len(self.streams), -(-count // 4), dtype=torch.int64, device=self.device)
        for row, stream in zip(bits, self.streams, strict=True):
            row.random_(-(1 << 63), None, generator=stream)
        kept = bits.view(torch.int16)[:, :count] >= self.dropped - LEVELS // 2
        return (
            kept.view(len(bits), batch, self.width).float().mul_(LEVELS / (LEVELS - self.dropped))
        )


def average_measures(found: Iterable[Mapping[str, Measure]], what: str) -> dict[str, Measure]:
    """What several heads found on the same images, as their means. what: who they are, `3 heads`.

    Student's t over the heads, on neither side short of what one head's images allow: a share has Wilson's interval over
    them, a mean the heads' own intervals, averaged. The images are the same for all heads, so n is not their sum.
    """
    rows = list(found)
    if len(rows) == 1:
        return dict(rows[0])
    out = {}
    for name, first in rows[0].items():
        each = [row[name] for row in rows]
        values, n = np.array([m.value for m in each]), first.n
        low, high = stats.mean_interval(values)
        if "rank" in name:
            own = float(np.mean([m.low for m in each])), float(np.mean([m.high for m in each]))
            low, high = min(low, own[0]), max(high, own[1])
        else:
            own = stats.wilson_interval(min(n, float(values.mean()) * n), n)
            low, high = max(0.0, min(low, own[0])), min(1.0, max(high, own[1]))
        how = f"{first.how}; mean of {what}, Student's t over them, at least the interval over the images"
        out[name] = Measure(float(values.mean()), n, low, high, how)
    return out
