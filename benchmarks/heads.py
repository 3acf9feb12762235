"""Training BadEncoder's downstream head on frozen features: bezoar's stack against the published
form; fp32, one thread.

    python benchmarks/heads.py [--records 8000] [--test 2000] [--epochs 2] [--repeats 5]

published: 512-512-256-10 in autograd, Adam as torch gives it, and TensorDataset in DataLoaders with
two workers, each started anew for every epoch of training and of its two test passes (clean and
triggered features, `--test` each). in process: the same without workers. bezoar: `heads.fit` for
one and for three heads, the test features read after the last epoch, as the probe does. Timed in
turn by the seconds that the processor worked, those of the workers included (on an idle machine
with a core to spare for each worker their work runs beside the training's: `wall` says what is
left). Seconds are those of one head and epoch: of three heads, a third. All run with the memory
settings of `bezoar`. `step` is the arithmetic alone: the published network and optimiser over
tensors at hand, no loader, no test pass.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from support import make_parser, restart_with_allocator_settings
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bezoar import registry
from bezoar.evaluation import heads

CLASSES, WIDTH, BATCH = 10, 512, 64
LabelledFeatures = tuple[Tensor, Tensor]  # float32 (N, WIDTH), int64 (N,)


class PublishedHead(nn.Module):
    """BadEncoder's downstream classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 512)
        self.second = nn.Linear(512, 256)
        self.last = nn.Linear(256, CLASSES)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(self.dropout(F.relu(self.first(x))))))


def train_epoch(
    net: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[LabelledFeatures]
) -> None:
    net.train()
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        loss.item()


def train_published(
    train: LabelledFeatures, tests: list[LabelledFeatures], epochs: int, workers: int
) -> None:
    net = PublishedHead()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    loaders = [
        DataLoader(TensorDataset(*data), batch_size=BATCH, num_workers=workers)
        for data in (train, *tests)
    ]
    for _ in range(epochs):
        train_epoch(net, optimizer, loaders[0])
        net.eval()
        with torch.no_grad():
            for loader in loaders[1:]:
                sum(int((net(x).argmax(1) == y).sum()) for x, y in loader)


def train_steps(train: LabelledFeatures, epochs: int) -> None:
    net = PublishedHead()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    for _ in range(epochs):
        train_epoch(net, optimizer, zip(train[0].split(BATCH), train[1].split(BATCH), strict=True))


def train_bezoar(
    train: LabelledFeatures, tests: list[LabelledFeatures], epochs: int, seeds: int
) -> None:
    recipe = registry.make("probe", f"mlp:epochs={epochs},seeds={seeds}")
    stack = heads.fit(*train, CLASSES, recipe)
    for x, y in tests:
        for head in range(seeds):
            int((stack.one(head)(x).argmax(1) == y).sum())


def processor_seconds() -> float:
    """Seconds that the processor worked for this process and for its children that have ended."""
    return sum(os.times()[:4])


def time_both_clocks(
    calls: dict[str, Callable[[], None]], repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Processor's and wall clock's seconds of each call, in turn, after one turn that does not
    count.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            processor, wall = processor_seconds(), time.perf_counter()
            call()
            if turn:
                taken = (processor_seconds() - processor, time.perf_counter() - wall)
                seconds[name].append(taken)
    return seconds


def print_table(seconds: dict[str, list[tuple[float, float]]], epochs: int) -> None:
    print(f"{'':24}{'s / head and epoch':>20}{'times faster':>14}", end="")
    print(f"{'least':>8}{'most':>8}{'wall':>8}")
    published = seconds["published"]
    for name, taken in seconds.items():
        count = 3 if "3" in name else 1
        turns = list(zip(published, taken, strict=True))
        ratios = [count * theirs[0] / ours[0] for theirs, ours in turns]
        wall = statistics.median(count * theirs[1] / ours[1] for theirs, ours in turns)
        each = statistics.median(processor for processor, _ in taken) / count / epochs
        row = f"{name:24}{each:20.3f}{statistics.median(ratios):14.2f}"
        print(f"{row}{min(ratios):8.2f}{max(ratios):8.2f}{wall:8.2f}")


def random_features(count: int) -> LabelledFeatures:
    return F.normalize(torch.randn(count, WIDTH), dim=1), torch.randint(0, CLASSES, (count,))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--records", type=int, default=8000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    epochs = options.epochs
    train = random_features(options.records)
    tests = [random_features(options.test), random_features(options.test)]
    calls = {
        "published": lambda: train_published(train, tests, epochs, 2),
        "published, in process": lambda: train_published(train, tests, epochs, 0),
        "step": lambda: train_steps(train, epochs),
        "bezoar, 1 head": lambda: train_bezoar(train, tests, epochs, 1),
        "bezoar, 3 heads": lambda: train_bezoar(train, tests, epochs, 3),
    }
    print(f"{options.records} records, 2 x {options.test} test records, ", end="")
    print(f"medians of {options.repeats}")
    print_table(time_both_clocks(calls, options.repeats), epochs)


if __name__ == "__main__":
    restart_with_allocator_settings()
    main()
