"""A step of trigger inversion by bezoar and in the plain form: DECREE's and Neural Cleanse's, fp32, one thread, 32 px.

    python benchmarks/inversion.py [--network clip_small resnet] [--repeats 5]

Both look for the same triggers from the same starts on the same images. The plain form is the published one: one trigger
after the other, the gradient reaching every weight (which nobody reads), batch norms computed at rest, NCHW, torch's Adam,
a process without allocator settings. bezoar's is a step of `trigger_inversion.invert_triggers`, in a process with the settings that the
command sets. `apart` is the largest difference of a gradient at the first step, as a share of the largest gradient: where
two pixels of a feature map are equal but for rounding, it decides which of them a maximum passes a gradient on to (in
double precision, in the tests, the two are equal). The sides take turns. Medians over `--repeats` of the seconds that the
processor worked on them: other programs on the machine disturb them less than a clock on the wall.
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

GOALS = {"decree": 1.9, "cleanse": 1.6}
COUNTS = {  # triggers and images a step: an audit's own where it takes seconds, fewer triggers of the same where it does not
    ("clip_small", "decree"): (16, 12),
    ("clip_small", "cleanse"): (40, 8),
    ("resnet", "decree"): (4, 12),
    ("resnet", "cleanse"): (10, 8),
}
SIZE, WEIGHT = 32, 1e-3


def inputs(network: str, audit: str) -> tuple[Any, ...]:
    """Encoder with batch norms that do something, a linear head, images in 0..1, where to start."""
    import torch

    from bezoar import registry
    from bezoar.auditing.trigger_search import initial_parameters

    count, images = COUNTS[network, audit]
    torch.manual_seed(0)
    encoder = registry.make("network", network)(SIZE, ()).eval()
    for m in encoder.image.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            assert m.running_mean is not None and m.running_var is not None
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    x = torch.rand(images, 3, SIZE, SIZE)
    with torch.no_grad():
        head = torch.nn.functional.normalize(
            torch.randn(count, encoder.encode_images(x).shape[1]), dim=1
        )
    return encoder, head, x, initial_parameters(count, SIZE, SIZE, 0)


def plain(network: str, audit: str) -> Callable[[], list[float]]:
    """The published form: a step of every trigger -> its gradients."""
    import torch
    import torch.nn.functional as F

    encoder, head, x, start = inputs(network, audit)
    encoder.to(memory_format=torch.contiguous_format)
    free = [u.clone().requires_grad_() for u in start]
    optims = [torch.optim.Adam([u], 0.1, betas=(0.5, 0.9)) for u in free]

    def step() -> list[float]:
        for i, (u, optim) in enumerate(zip(free, optims, strict=True)):
            t = (torch.tanh(u) + 1) / 2
            mask, pattern = t[:1], t[1:]
            pixels = (((1 - mask) * x + mask * pattern) - encoder.mean) / encoder.std
            z = F.normalize(encoder.image(pixels.contiguous()), dim=1)
            if audit == "decree":
                cosines = z @ z.T
                loss = -(cosines.sum() - cosines.diagonal().sum()) / (len(z) * (len(z) - 1))
            else:
                loss = F.cross_entropy(10 * z @ head.T, torch.full((len(z),), i))
            optim.zero_grad()
            (loss + WEIGHT * mask.sum()).backward()
            optim.step()
        return torch.stack([u.grad for u in free if u.grad is not None]).flatten().tolist()

    return step


def ours(network: str, audit: str) -> Callable[[], list[float]]:
    """bezoar's step, as `invert_triggers` takes it."""
    from bezoar.auditing import trigger_inversion
    from bezoar.auditing.audits import cleanse, decree
    from bezoar.auditing.trigger_search import InversionRecipe, TriggerSearch
    from bezoar.evaluation.classifiers import Classifier

    encoder, head, x, start = inputs(network, audit)
    classifier = Classifier(
        encoder, lambda z: 10 * z @ head.T, tuple(map(str, range(len(start)))), "drawn"
    )
    objective = decree.collapse if audit == "decree" else cleanse.reach_class(classifier)
    frozen = trigger_inversion.freeze_tower(encoder)
    tower = frozen.__enter__()  # for as long as the process lives: `step` holds on to it
    recipe = InversionRecipe(1, len(x), weight=WEIGHT, patience=1 << 20)
    search = TriggerSearch(start.clone(), recipe)
    done = 0

    def step() -> list[float]:
        nonlocal done
        assert frozen is not None
        grad, success, norm = trigger_inversion.compute_gradients(search, x, tower, objective)
        search.record(success, norm)
        search.adam_step(grad, done)
        done += 1
        return grad.flatten().tolist()

    return step


SIDES = {"plain form": (plain, False), "bezoar": (ours, True)}


def serve(side: str, network: str, audit: str) -> None:
    """One side: a line asks for a step, a line answers with its seconds and its gradients."""
    import torch

    torch.set_num_threads(1)
    step = SIDES[side][0](network, audit)
    for _ in sys.stdin:
        start = time.process_time()
        grads = step()
        print(json.dumps([time.process_time() - start, grads]), flush=True)


class Side:
    """A process that takes steps when asked."""

    def __init__(self, name: str, network: str, audit: str) -> None:
        env = {k: v for k, v in os.environ.items() if k not in ALLOCATION} | (
            ALLOCATION if SIDES[name][1] else {}
        )
        command = [sys.executable, __file__, "--serve", name, network, audit]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> tuple[float, list[float]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        seconds, grads = json.loads(self.process.stdout.readline())
        return seconds, grads


def compare(network: str, audit: str, repeats: int) -> None:
    """Steps in turn, then the rows of the table."""
    sides = {name: Side(name, network, audit) for name in SIDES}
    seconds: dict[str, list[float]] = {n: [] for n in sides}
    grads: dict[str, list[float]] = {}
    for i in range(repeats + 1):  # the first of each is for warming up
        for name, side in sides.items():
            took, found = side.step()
            seconds[name] += [took] if i else []
            grads.setdefault(name, found)
    count, images = COUNTS[network, audit]
    base = statistics.median(seconds["plain form"])
    pairs = list(zip(grads["plain form"], grads["bezoar"], strict=True))
    apart = max(abs(a - b) for a, b in pairs) / max(abs(a) for a, _ in pairs)
    for name in sides:
        median = statistics.median(seconds[name])
        goal, told = (f"{GOALS[audit]}", f"{apart:.1e}") if name == "bezoar" else ("", "")
        row = f"{network:12}{audit:9}{count:3} x {images:3}  {name:12}{median:9.3f}{count * images / median:10.0f}"
        print(f"{row}{base / median:8.2f}{goal:>6}{told:>10}", flush=True)
    for side in sides.values():
        assert side.process.stdin is not None
        side.process.stdin.close()
        side.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--network", nargs="+", choices=("clip_small", "resnet"), default=["clip_small", "resnet"]
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(*given.serve)
        return
    print(f"goals: {GOALS} times the plain form")
    columns = f"{'seconds':>9}{'images/s':>10}{'ratio':>8}{'goal':>6}{'apart':>10}"
    print(f"{'network':12}{'audit':9}{'triggers':9}  {'side':12}{columns}")
    for network in given.network:
        for audit in GOALS:
            compare(network, audit, given.repeats)


if __name__ == "__main__":
    main()
