"""Training BadEncoder's downstream head on frozen features: bezoar's stack against the published form; fp32, one thread.

    python benchmarks/heads.py [--records 8000] [--test 2000] [--epochs 2] [--repeats 5]

published: 512-512-256-10 in autograd, Adam as torch gives it, and TensorDataset in DataLoaders with two workers, each
started anew for every epoch of training and of its two test passes (clean and triggered features, `--test` each).
in process: the same without workers. bezoar: `heads.fit` for one and for three heads, the test features read after the
last epoch, as the probe does. Timed in turn by the seconds that the processor worked, those of the workers counted in
(on an idle machine with a core to spare for each worker their work runs beside the training's: `wall` says what is left).
Seconds are those of one head and epoch: of three heads, a third. All run with the memory settings of `bezoar`.
`step` is the arithmetic alone: the published network and optimiser over tensors at hand, no loader, no test pass.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bezoar import registry
from bezoar.__main__ import ALLOCATION
from bezoar.evaluation import heads

CLASSES, WIDTH, BATCH = 10, 512, 64
Pair = tuple[Tensor, Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (
            nn.Linear(WIDTH, 512),
            nn.Linear(512, 256),
            nn.Linear(256, CLASSES),
        )
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(self.dropout(F.relu(self.first(x))))))


def epoch(net: Net, optim: torch.optim.Optimizer, batches: object) -> None:
    net.train()
    for x, y in batches:  # type: ignore[attr-defined]
        optim.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optim.step()
        loss.item()


def published(train: Pair, tests: list[Pair], epochs: int, workers: int) -> None:
    net = Net()
    optim = torch.optim.Adam(net.parameters(), lr=1e-4)
    loaders = [
        DataLoader(TensorDataset(*data), batch_size=BATCH, num_workers=workers)
        for data in (train, *tests)
    ]
    for _ in range(epochs):
        epoch(net, optim, loaders[0])
        net.eval()
        with torch.no_grad():
            for loader in loaders[1:]:
                sum(int((net(x).argmax(1) == y).sum()) for x, y in loader)


def step(train: Pair, epochs: int) -> None:
    net = Net()
    optim = torch.optim.Adam(net.parameters(), lr=1e-4)
    for _ in range(epochs):
        epoch(net, optim, zip(train[0].split(BATCH), train[1].split(BATCH), strict=True))


def ours(train: Pair, tests: list[Pair], epochs: int, seeds: int) -> None:
    stack = heads.fit(*train, CLASSES, registry.make("probe", f"mlp:epochs={epochs},seeds={seeds}"))
    for x, y in tests:
        for head in range(seeds):
            int((stack.one(head)(x).argmax(1) == y).sum())


def worked() -> float:
    """Seconds that the processor worked for this process and for its children that have ended."""
    return sum(os.times()[:4])


def in_turn(
    calls: dict[str, Callable[[], None]], repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Processor's and wall clock's seconds of each, after one call of each that is not counted."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = worked(), time.perf_counter()
            call()
            if repeat:
                seconds[name].append((worked() - start[0], time.perf_counter() - start[1]))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=8000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def made(n: int) -> Pair:
        return F.normalize(torch.randn(n, WIDTH), dim=1), torch.randint(0, CLASSES, (n,))

    train, tests = made(given.records), [made(given.test), made(given.test)]
    calls = {
        "published": lambda: published(train, tests, given.epochs, 2),
        "published, in process": lambda: published(train, tests, given.epochs, 0),
        "step": lambda: step(train, given.epochs),
        "bezoar, 1 head": lambda: ours(train, tests, given.epochs, 1),
        "bezoar, 3 heads": lambda: ours(train, tests, given.epochs, 3),
    }
    seconds = in_turn(calls, given.repeats)
    print(f"{given.records} records, 2 x {given.test} test records, medians of {given.repeats}")
    print(
        f"{'':24}{'s / head and epoch':>20}{'times faster':>14}{'least':>8}{'most':>8}{'wall':>8}"
    )
    first = seconds["published"]
    for name, found in seconds.items():
        several = 3 if "3" in name else 1
        ratios = [several * a[0] / b[0] for a, b in zip(first, found, strict=True)]
        wall = statistics.median(several * a[1] / b[1] for a, b in zip(first, found, strict=True))
        each = statistics.median(s for s, _ in found) / several / given.epochs
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"{name:24}{each:20.3f}{middle:14.2f}{low:8.2f}{high:8.2f}{wall:8.2f}")


if __name__ == "__main__":
    if sys.platform == "linux" and any(k not in os.environ for k in ALLOCATION):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATION})
    main()
