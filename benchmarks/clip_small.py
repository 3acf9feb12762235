"""A training step of clip_small, and what share of it oneDNN's convolutions alone would take; one thread.

    python benchmarks/clip_small.py [--batch 128] [--size 32] [--repeats 15]

The step is the training loop's: augmentation of uint8 images, both towers, the loss, backward, fused AdamW; in fp32, and
in bf16 where the processor multiplies bfloat16. The limit is what cannot be saved while the network stays what it is:
its four 3x3 convolutions, at the same shapes and in the same precision, channels last and in memory already; forward,
the gradient of every filter, and of every input but the pixels. No batch norm, no casts, no text, no optimiser. Steps
and limits are taken in turn, in a process with the allocator settings that the command sets; medians of the seconds
that the processor worked on them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bezoar import registry
from bezoar.__main__ import ALLOCATION
from bezoar.data import randomness
from bezoar.encoders.encoder import precision_for
from bezoar.training import loop
from bezoar.training.augmentation import Chance

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def step(precision: str, batch: int, size: int) -> Callable[[], None]:
    """One step of training, ready to be taken again and again."""
    pairs = registry.make("data", f"scenes:count={batch},size={size}")()
    network, recipe = (
        registry.make("network", "clip_small"),
        registry.make("objective", f"clip:batch={batch}"),
    )
    encoder = network(size, network.vocabulary(pairs.captions))
    encoder.precision = precision
    tokens, loss = encoder.tokenize(pairs.captions), recipe(encoder).train()
    optim = loop.optimizer(loss, recipe)

    def call() -> None:
        value = loss(pairs.images, tokens, Chance(randomness.generator(0, 2, 0)))
        optim.zero_grad(set_to_none=True)
        value.backward()
        optim.step()
        value.item()

    return call


def limit(precision: str, batch: int, size: int) -> tuple[Callable[[], None], float]:
    """The convolutions of one step, and their floating-point operations."""
    encoder = registry.make("network", "clip_small")(size)
    kind, last = TYPES[precision], torch.channels_last
    work: list[tuple[nn.Module, Tensor, Tensor]] = []
    operations, x = 0.0, torch.randn(batch, 3, size, size)
    for layer in encoder.image.modules():
        if isinstance(layer, nn.Conv2d):
            y = layer(x).detach()
            operations += 2.0 * y.numel() * layer.weight[0].numel() * (3 if work else 2)
            given = x.to(kind, memory_format=last).requires_grad_(bool(work))
            work.append((layer.to(kind), given, torch.randn_like(y).to(kind, memory_format=last)))
            x = y

    def call() -> None:
        for layer, given, grad in work:
            layer.weight.grad = given.grad = None
            layer(given).backward(grad)

    return call, operations


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    precisions = ["fp32"] + ["bf16"] * (precision_for(torch.device("cpu")) == "bf16")
    calls: dict[tuple[str, str], Callable[[], None]] = {}
    operations = 0.0
    for precision in precisions:
        calls[precision, "step"] = step(precision, given.batch, given.size)
        calls[precision, "limit"], operations = limit(precision, given.batch, given.size)
    seconds: dict[tuple[str, str], list[float]] = {k: [] for k in calls}
    for i in range(given.repeats + 2):  # the first two are for warming up
        for key, call in calls.items():
            start = time.process_time()
            call()
            seconds[key] += [time.process_time() - start] if i > 1 else []
    print(
        f"{'precision':11}{'pairs/s':>9}{'limit pairs/s':>15}{'limit GFLOP/s':>15}{'share of the limit':>20}"
    )
    for precision in precisions:
        took, least = (statistics.median(seconds[precision, k]) for k in ("step", "limit"))
        rates = (
            f"{given.batch / took:9.0f}{given.batch / least:15.0f}{operations / least / 1e9:15.0f}"
        )
        print(f"{precision:11}{rates}{least / took:20.0%}")


if __name__ == "__main__":
    if sys.platform == "linux" and any(k not in os.environ for k in ALLOCATION):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATION})
    main()
