"""Heads: several small networks on frozen features, trained at once as one stack of matrices.

Trained one by one they would spend their time on starting kernels of a few rows each.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bezoar.data.randomness import generator
from bezoar.errors import UserError
from bezoar.evaluation import stats, success
from bezoar.evaluation.scores import Measure
from bezoar.progress import ProgressReport, no_report

DROPOUT_LEVELS = 1 << 16  # a unit is dropped by comparing 16 random bits
MOST_CACHED = 8  # stacks that a process keeps
_cached_stacks: OrderedDict[str, Stack] = OrderedDict()


class Recipe(Protocol):
    """The fields of a method that `fit` reads. dropout: of the first hidden layer."""

    hidden: tuple[int, ...]
    dropout: float
    lr: float
    batch: int
    epochs: int
    shuffle: bool
    seeds: int


@dataclass(frozen=True)
class Stack:
    """S heads, with ReLU between their layers."""

    weights: tuple[Tensor, ...]  # for each layer float32 (S, in, out)
    biases: tuple[Tensor, ...]  # for each layer float32 (S, 1, out)

    def __len__(self) -> int:
        return len(self.weights[0])

    def one(self, head: int) -> Callable[[Tensor], Tensor]:
        """Return one head as a function of vectors (N, D) that gives logits (N, C)."""

        def logits(z: Tensor) -> Tensor:
            for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
                z = torch.addmm(b[head], z.relu() if i else z, w[head])
            return z

        return logits

    @staticmethod
    def draw(seeds: Sequence[int], widths: Sequence[int], device: torch.device) -> Stack:
        """Draw the start of one head a seed; a head's draw depends on its seed alone.

        Weights and biases are uniform in +-1 / sqrt(in), as nn.Linear's are. widths: of the input,
        the hidden layers and the output.
        """
        layers = list(itertools.pairwise(widths))
        weights: list[list[Tensor]] = [[] for _ in layers]
        biases: list[list[Tensor]] = [[] for _ in layers]
        for seed in seeds:
            g = generator(seed, 3)
            for i, (inputs, outputs) in enumerate(layers):
                for rows, parts in ((inputs, weights[i]), (1, biases[i])):
                    uniform = torch.rand(rows, outputs, generator=g) * 2 - 1
                    parts.append(uniform / inputs**0.5)
        return Stack(
            tuple(torch.stack(parts).to(device) for parts in weights),
            tuple(torch.stack(parts).to(device) for parts in biases),
        )

    def descend(self, x: Tensor, y: Tensor, keep: Tensor | None) -> None:
        """Write the gradients of each head's mean cross-entropy into the parameters' `grad`.

        Autograd would allocate new gradients, a megabyte each, at every step.

        Args:
            x: float32 (S, B, D), each head's batch.
            y: int64 (S, B), its classes.
            keep: (S, B, first hidden), dropout factors of that layer's output; None without
                dropout.
        """
        inputs = [x]
        for w, b in zip(self.weights[:-1], self.biases[:-1], strict=True):
            h = torch.baddbmm(b, inputs[-1], w).relu_()
            inputs.append(h.mul_(keep) if keep is not None and len(inputs) == 1 else h)
        # gradient by the logits: (softmax - one-hot) / B, (S, B, C)
        slope = torch.baddbmm(self.biases[-1], inputs[-1], self.weights[-1]).softmax(2)
        slope.scatter_add_(2, y[..., None], slope.new_full((), -1.0).expand(*y.shape, 1))
        slope.div_(y.shape[1])
        for i in reversed(range(len(inputs))):
            torch.bmm(inputs[i].transpose(1, 2), slope, out=self.weights[i].grad)
            torch.sum(slope, 1, keepdim=True, out=self.biases[i].grad)
            if i:
                is_active = inputs[i].sign()
                slope = torch.bmm(slope, self.weights[i].transpose(1, 2)).mul_(is_active)
                if keep is not None and i == 1:
                    slope = slope.mul_(keep)


def fit(
    x: Tensor, y: Tensor, classes: int, recipe: Recipe, report: ProgressReport = no_report
) -> Stack:
    """Train a stack of heads with Adam; the weights are those after the last epoch.

    Start, order and dropout of each head depend only on its number: the result is the same as
    training the heads one by one. The last batch of an epoch may be smaller. Within an
    `embedding_cache` the same features are fitted once: a sweep measures many attacked encoders
    beside one clean one.

    Args:
        x: features, float32 (N, D). Heads are trained on their device.
        y: int64 (N,), their classes.
        classes: number of classes.
        recipe: widths, dropout, learning rate, batch, epochs and number of heads.
        report: called after each epoch.

    Raises:
        UserError: if a head's weights are not finite.
    """
    if not success.is_caching():
        return _fit(x, y, classes, recipe, report)
    digest = hashlib.sha256(repr((recipe, classes, x.shape, x.dtype, str(x.device))).encode())
    for tensor in (x, y):
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    key = digest.hexdigest()
    if key not in _cached_stacks:
        _cached_stacks[key] = _fit(x, y, classes, recipe, report)
    _cached_stacks.move_to_end(key)
    while len(_cached_stacks) > MOST_CACHED:
        _cached_stacks.popitem(last=False)
    return _cached_stacks[key]


def _fit(x: Tensor, y: Tensor, classes: int, recipe: Recipe, report: ProgressReport) -> Stack:
    device = x.device
    stack = Stack.draw(range(recipe.seeds), (x.shape[1], *recipe.hidden, classes), device)
    parameters = [*stack.weights, *stack.biases]
    for p in parameters:
        p.grad = torch.empty_like(p)
    optimizer = torch.optim.Adam(parameters, recipe.lr, fused=True)
    masks = DropoutMasks(recipe, device) if recipe.hidden and recipe.dropout else None
    for epoch in range(recipe.epochs):
        for rows in epoch_orders(recipe, epoch, len(x)).to(device).split(recipe.batch, 1):
            stack.descend(x[rows], y[rows], masks(rows.shape[1]) if masks else None)
            optimizer.step()
        report(epoch + 1, recipe.epochs, f"{recipe.seeds} heads, epoch {epoch + 1}")
    for p in parameters:
        p.grad = None
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise UserError(
            f"a head's weights are not finite after {recipe.epochs} epochs; "
            "give a lower learning rate"
        )
    return stack


def epoch_orders(recipe: Recipe, epoch: int, n: int) -> Tensor:
    """Return each head's order of the n records in an epoch, int64 (S, n)."""
    if not recipe.shuffle:
        return torch.arange(n).expand(recipe.seeds, n)
    return torch.stack(
        [torch.randperm(n, generator=generator(seed, 4, epoch)) for seed in range(recipe.seeds)]
    )


class DropoutMasks:
    """Dropout of the first hidden layer, by a stream for each head, at a multiple of 2^-16."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.device = device
        self.width = recipe.hidden[0]
        self.dropped_levels = round(DROPOUT_LEVELS * recipe.dropout)
        self.streams = [
            torch.Generator(device).manual_seed(generator(seed, 5).initial_seed())
            for seed in range(recipe.seeds)
        ]

    def __call__(self, batch: int) -> Tensor:
        """Draw float32 (S, batch, width), each 0 or 1 / (1 - rate)."""
        count = batch * self.width
        # Four 16-bit numbers are drawn at a time.
        shape = (len(self.streams), -(-count // 4))
        bits = torch.empty(shape, dtype=torch.int64, device=self.device)
        for row, stream in zip(bits, self.streams, strict=True):
            row.random_(-(1 << 63), None, generator=stream)
        levels = bits.view(torch.int16)[:, :count]
        keep = levels >= self.dropped_levels - DROPOUT_LEVELS // 2
        scale = DROPOUT_LEVELS / (DROPOUT_LEVELS - self.dropped_levels)
        return keep.view(len(bits), batch, self.width).float().mul_(scale)


def average_measures(rows: Iterable[Mapping[str, Measure]], what: str) -> dict[str, Measure]:
    """Average the measures of several heads on the same images.

    The interval is Student's t over the heads, but at least the interval that one head's images
    give: for a share Wilson's interval over them, for a mean the average of the heads' own
    intervals. The images are the same for all heads, so n is not their sum.

    Args:
        rows: the measures of each head, by the same names.
        what: name of the rows, such as `3 heads`.
    """
    rows = list(rows)
    if len(rows) == 1:
        return dict(rows[0])
    averages = {}
    for name, first in rows[0].items():
        measures = [row[name] for row in rows]
        values = np.array([m.value for m in measures])
        low, high = stats.mean_interval(values)
        if "rank" in name:
            low = min(low, float(np.mean([m.low for m in measures])))
            high = max(high, float(np.mean([m.high for m in measures])))
        else:
            low, high = stats.mean_rate_interval(values, float(values.mean()) * first.n, first.n)
        how = (
            f"{first.how}; mean of {what}, Student's t over them, "
            "at least the interval over the images"
        )
        averages[name] = Measure(float(values.mean()), first.n, low, high, how)
    return averages
