"""A SimCLR training step by bezoar and by the form that published CIFAR-10 code has; ResNet-18 at 32 px, one thread.

    python benchmarks/simclr.py [--batch 64] [--repeats 5]

Both: 3x3 stem without a max-pool, head 512-512-128, temperature 0.5, Adam at 1e-3 with weight decay 1e-6, the same random
images. published form: every image through PIL and torchvision's transforms, twice; each view through the network by
itself, NCHW; all 2B x 2B similarities by exp, mask and sum; torch's unfused Adam; a process with no allocator settings.
bezoar: its network, objective and optimiser as its training loop drives them, from uint8, in a process with the settings
that the command sets. Each side is a process of its own, and the sides take one step each in turn. Medians over
`--repeats` steps of the seconds that the processor worked on them: other programs on the machine disturb them less than a
clock on the wall. bf16 is there where the processor multiplies it, and counts as more than a faster way to the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from bezoar.__main__ import ALLOCATION

SIDES = {  # name -> (kind, precision, allocator settings)
    "published form": ("peer", "fp32", False),
    "bezoar": ("ours", "fp32", True),
    "bezoar, no allocator settings": ("ours", "fp32", False),
    "bezoar, bf16": ("ours", "bf16", True),
}
PARTS = ("augmentation", "network", "optimiser")
Step = Callable[
    [], tuple[float, ...]
]  # takes one step; where the time stood at the end of each part


def images(batch: int) -> Any:
    """uint8 (B, 3, 32, 32), smooth: of noise every crop is alike."""
    import torch

    coarse = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (
        (torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear") * 255)
        .round()
        .to(torch.uint8)
    )


def peer(batch: int, precision: str) -> Step:
    """The published form of a step."""
    import torch
    from PIL import Image
    from torch import nn
    from torchvision import transforms
    from torchvision.models import resnet18

    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(32),
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    trunk = resnet18()
    trunk.conv1, trunk.maxpool, trunk.fc = (
        nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        nn.Identity(),
        nn.Identity(),
    )
    head = nn.Sequential(
        nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128)
    )
    model = nn.Sequential(trunk, head).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-6)
    arrays = images(batch).permute(0, 2, 3, 1).contiguous().numpy()

    def step() -> tuple[float, ...]:
        pairs = [(pipeline(image), pipeline(image)) for image in map(Image.fromarray, arrays)]
        one, two = (torch.stack(views) for views in zip(*pairs, strict=True))
        augmented = time.process_time()
        z = [nn.functional.normalize(model(x), dim=1) for x in (one, two)]
        every = torch.cat(z)
        others = ~torch.eye(2 * batch, dtype=torch.bool)
        similar = torch.exp(every @ every.T / 0.5)[others].view(2 * batch, -1).sum(1)
        paired = torch.exp((z[0] * z[1]).sum(1) / 0.5).repeat(2)
        loss = -torch.log(paired / similar).mean()
        optimizer.zero_grad()
        loss.backward()
        learnt = time.process_time()
        optimizer.step()
        loss.item()
        return augmented, learnt, time.process_time()

    return step


def ours(batch: int, precision: str) -> Step:
    """bezoar's step, as `training.fit` takes it."""
    from bezoar import registry
    from bezoar.data import randomness
    from bezoar.training import loop
    from bezoar.training.augmentation import Chance

    encoder, recipe = (
        registry.make("network", "resnet")(32),
        registry.make("objective", f"simclr:batch={batch}"),
    )
    encoder.precision = precision
    loss, data = recipe(encoder).train(), images(batch)
    optim = loop.optimizer(loss, recipe)
    tokens, views, taken, augmented = data.new_zeros(batch, 0), loss.views, 0, 0.0

    def timed(x: Any, chance: Chance) -> Any:
        nonlocal augmented
        out = views(x, chance)
        augmented = time.process_time()
        return out

    loss.views = timed

    def step() -> tuple[float, ...]:
        nonlocal taken
        value = loss(data, tokens, Chance(randomness.generator(0, 2, taken)))
        optim.zero_grad(set_to_none=True)
        value.backward()
        learnt, taken = time.process_time(), taken + 1
        optim.step()
        value.item()
        return augmented, learnt, time.process_time()

    return step


def serve(kind: str, precision: str, batch: int) -> None:
    """One side: a line asks for a step, a line answers with the seconds of its parts."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    step = {"peer": peer, "ours": ours}[kind](batch, precision)
    for _ in sys.stdin:
        start = time.process_time()
        ends = step()
        print(
            json.dumps([end - begin for begin, end in zip((start, *ends), ends, strict=False)]),
            flush=True,
        )


class Side:
    """A process that takes steps when asked."""

    def __init__(self, name: str, batch: int) -> None:
        kind, precision, allocation = SIDES[name]
        env = {k: v for k, v in os.environ.items() if k not in ALLOCATION} | (
            ALLOCATION if allocation else {}
        )
        command = [sys.executable, __file__, "--serve", kind, precision, "--batch", str(batch)]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> list[float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(*given.serve, given.batch)
        return
    import torch

    from bezoar.encoders.encoder import precision_for

    names = [
        n
        for n, (_, precision, _) in SIDES.items()
        if precision in ("fp32", precision_for(torch.device("cpu")))
    ]
    sides = {name: Side(name, given.batch) for name in names}
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    for i in range(given.repeats + 1):  # the first is for warming up
        for name, side in sides.items():
            took = side.step()
            seconds[name] += [took] if i else []
    for side in sides.values():
        side.end()
    totals = {name: [sum(parts) for parts in took] for name, took in seconds.items()}
    base = totals["published form"]
    print(
        f"{'side':32}{'images/s':>9}{'times':>7}{'in each turn':>14}"
        + "".join(f"{part:>20}" for part in PARTS)
    )
    for name in names:
        median = statistics.median(totals[name])
        turns = sorted(b / t for b, t in zip(base, totals[name], strict=True))
        shares = "".join(
            f"{1000 * part:10.0f} ms{part / median:7.1%}"
            for part in map(statistics.median, zip(*seconds[name], strict=True))
        )
        ratio = f"{statistics.median(base) / median:7.2f}{turns[0]:8.2f}..{turns[-1]:.2f}"
        print(f"{name:32}{given.batch / median:9.1f}{ratio}{shares}")


if __name__ == "__main__":
    main()
