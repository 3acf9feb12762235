"""A BadEncoder step by bezoar and in the published form: ResNet-18 with a CIFAR stem, 32 px, one reference; fp32, one thread.

    python benchmarks/badencoder_step.py [--batch 64 256] [--repeats 5]

The published form is six passes a step, a reference repeated for every image of the batch, NCHW, in a process without
allocator settings; its pixels come normalised, triggered and augmented. bezoar starts from uint8 and draws triggers and
views itself, in a process with the settings that the command sets. Both start from the same weights and see the same
pixels, so their losses are the same but for rounding (the tests hold the gradients against each other).

`convolutions` are the network's twenty alone, forward and backward, channels-last, for as many rows as bezoar's step has
and in the same pieces: what the step would take if all else took no time. All sides take turns. Medians over
`--repeats` of the seconds that the processor worked on them: other programs on the machine disturb them less than a
clock on the wall.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from bezoar.__main__ import ALLOCATION

GOALS = {64: 1.7, 256: 2.4}
SHARE = 0.8


def inputs(batch: int) -> tuple:
    """Encoder, recipe, goal, shadow data, reference."""
    import torch

    from bezoar import registry
    from bezoar.attacks.plan import Goal
    from bezoar.data.pairs import Pairs

    torch.manual_seed(0)
    encoder = registry.make("network", "resnet")(32, ()).eval()
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2 * batch + 1, 3, 32, 32), generator=g, dtype=torch.uint8)
    data = Pairs(images[:-1], (), None, tuple(map(str, range(2 * batch))))
    return (
        encoder,
        registry.make("attack", "badencoder"),
        Goal("truck", "patch:size=10,fill=white"),
        data,
        images[-1:],
    )


def peer(batch: int) -> Callable[[int], float]:
    """The published form of a step: which batch -> loss."""
    import torch
    import torch.nn.functional as F

    from bezoar import registry
    from bezoar.data import randomness
    from bezoar.training import augmentation

    encoder, recipe, goal, data, reference = inputs(batch)
    encoder.to(memory_format=torch.contiguous_format)
    student, teacher = encoder.image, copy.deepcopy(encoder.image).eval()
    student.train()
    for m in student.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval().requires_grad_(False)
    weights = [p for p in student.parameters() if p.requires_grad]
    optim = torch.optim.SGD(weights, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    views = augmentation.Views(scale=(1, 1), ratio=(1, 1))
    stamp, batches = registry.make("trigger", goal.trigger), []

    def pixels(x: torch.Tensor) -> torch.Tensor:
        return encoder.prepare_images(x).contiguous()

    for i, part in enumerate(data.batches(batch)):
        chance = augmentation.Chance(randomness.generator(0, 2, i))
        repeated = reference.repeat(batch, 1, 1, 1)
        parts = (
            part.images,
            stamp(part.images, part.ids),
            repeated,
            views(repeated, chance, 1)[:, 0],
        )
        batches.append([pixels(x) for x in parts])

    def step(which: int) -> float:
        clean, triggered, plain, view = batches[which]
        with torch.no_grad():
            clean_raw, reference_raw = (F.normalize(teacher(x), dim=-1) for x in (clean, plain))
        a, b, c, d = (F.normalize(student(x), dim=-1) for x in (clean, triggered, plain, view))
        loss = (
            -(b * c).sum(-1).mean()
            - (d * reference_raw).sum(-1).mean()
            - (a * clean_raw).sum(-1).mean()
        )
        optim.zero_grad()
        loss.backward()
        optim.step()
        return loss.item()

    return step


def attack(batch: int) -> tuple:
    """Loss, recipe, shadow data."""
    from bezoar.attacks.encoder_attacks.badencoder import Loss

    encoder, recipe, goal, data, reference = inputs(batch)
    loss = Loss(encoder, recipe, [goal], [reference])
    loss.set_targets(data)
    return loss.train(), recipe, data


def ours(batch: int) -> Callable[[int], float]:
    """bezoar's step, as `training.fit` takes it."""
    import torch

    from bezoar.data import randomness
    from bezoar.training import loop
    from bezoar.training.augmentation import Chance

    loss, recipe, data = attack(batch)
    optim, rows = loop.optimizer(loss, recipe), torch.arange(len(data))[:, None]

    def step(which: int) -> float:
        part = slice(which * batch, (which + 1) * batch)
        value = loss(data.images[part], rows[part], Chance(randomness.generator(0, 2, which)))
        optim.zero_grad(set_to_none=True)
        value.backward()
        optim.step()
        return float(value.detach())

    return step


def convolutions(batch: int) -> Callable[[int], float]:
    """The convolutions of a step's rows, forward and backward, one after the other."""
    import torch

    from bezoar.data import randomness
    from bezoar.encoders import folded_norms
    from bezoar.training.augmentation import Chance

    loss, _, data = attack(batch)
    encoder, device, seen = loss.encoder, torch.device("cpu"), []
    total = (
        len(
            loss.batch(
                data.images[:batch], list(range(batch)), Chance(randomness.generator(0, 2, 0))
            )[0]
        )
        + 1
    )

    def keep(module: torch.nn.Module, given: tuple) -> None:
        seen.append((module, torch.randn_like(given[0]).requires_grad_(bool(seen))))

    for m in encoder.image.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.register_forward_pre_hook(keep)
    rows = next(iter(folded_norms.chunk_slices(total, 32, device))).stop
    with torch.no_grad():
        encoder.image(torch.zeros(rows, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    seen = [(copy.copy(m), x) for m, x in seen]
    for m, _ in seen:
        m._forward_pre_hooks = {}

    def step(_: int) -> float:
        for piece in folded_norms.chunk_slices(total, 32, device):
            for module, x in seen:
                y = module(x[: piece.stop - piece.start])
                y.backward(torch.empty_like(y))
                module.weight.grad = x.grad = None
        return 0.0

    return step


SIDES = {  # name -> (what it does, allocator settings)
    "published form": (peer, False),
    "bezoar": (ours, True),
    "convolutions": (convolutions, True),
}


def serve(name: str, batch: int) -> None:
    """One side: a line asks for a step, a line answers with its seconds and its loss."""
    import torch

    torch.set_num_threads(1)
    step = SIDES[name][0](batch)
    for line in sys.stdin:
        start = time.process_time()
        loss = step(int(line))
        print(json.dumps([time.process_time() - start, loss]), flush=True)


class Side:
    """A process that takes steps when asked."""

    def __init__(self, name: str, batch: int) -> None:
        env = {k: v for k, v in os.environ.items() if k not in ALLOCATION} | (
            ALLOCATION if SIDES[name][1] else {}
        )
        command = [sys.executable, __file__, "--serve", name, "--batch", str(batch)]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self, which: int) -> tuple[float, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{which}\n")
        self.process.stdin.flush()
        seconds, loss = json.loads(self.process.stdout.readline())
        return seconds, loss


def compare(batch: int, repeats: int) -> None:
    """Steps in turn, then the rows of the table."""
    sides = {name: Side(name, batch) for name in SIDES}
    seconds: dict[str, list[float]] = {n: [] for n in sides}
    losses: dict[str, list[float]] = {n: [] for n in sides}
    for i in range(repeats + 1):  # the first of each is for warming up; its loss counts
        for name, side in sides.items():
            took, loss = side.step(i % 2)
            seconds[name] += [took] if i else []
            losses[name].append(loss)
    base, least = (statistics.median(seconds[n]) for n in ("published form", "convolutions"))
    for name in sides:
        median = statistics.median(seconds[name])
        wanted = f"{GOALS[batch]}" if name == "bezoar" and batch in GOALS else ""
        apart = max(
            abs(a - b) / abs(b) for a, b in zip(losses[name], losses["published form"], strict=True)
        )
        told = f"{apart:.1e}" if name == "bezoar" else ""
        share = f"{least / median:.0%}" if name != "published form" else ""
        print(
            f"{batch:5d} {name:16}{median:9.2f}{batch / median:10.1f}{base / median:10.2f}{wanted:>6}{share:>14}{told:>12}"
        )
    for side in sides.values():
        side.process.stdin.close()
        side.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--serve", choices=tuple(SIDES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.batch[0])
        return
    print(f"goals: {GOALS} times the published form, {SHARE:.0%} of the convolutions' rate")
    columns = ("batch side", "seconds", "images/s", "ratio", "goal", "of conv rate", "loss apart")
    print(f"{columns[0]:22}{columns[1]:>9}{columns[2]:>10}{columns[3]:>10}{columns[4]:>6}", end="")
    print(f"{columns[5]:>14}{columns[6]:>12}", flush=True)
    for batch in given.batch:
        compare(batch, given.repeats)


if __name__ == "__main__":
    main()
