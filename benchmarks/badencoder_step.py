"""A BadEncoder step by bezoar and in the published form: ResNet-18 with a CIFAR stem, 32 px, one
reference; fp32, one thread.

    python benchmarks/badencoder_step.py [--batch 64 256] [--repeats 5]

The published form is six passes a step, a reference repeated for every image of the batch, NCHW, in
a process without allocator settings; its pixels come normalised, triggered and augmented. bezoar
starts from uint8 and draws triggers and views itself, in a process with the settings that the
command sets. Both start from the same weights and see the same pixels, so their losses are the same
but for rounding (the tests compare the gradients).

`convolutions` are the network's twenty alone, forward and backward, channels-last, for as many rows
as bezoar's step has and in the same chunks: what the step would take if all else took no time. All
sides take turns. Medians over `--repeats` of the seconds that the processor worked.
"""

import argparse
import copy
import statistics
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from support import Side, Step, make_parser, serve_steps
from torch import Tensor, nn

from bezoar import registry
from bezoar.attacks.encoder_attacks.badencoder import Loss
from bezoar.attacks.plan import Goal
from bezoar.data import randomness
from bezoar.data.pairs import Pairs
from bezoar.encoders import folded_norms
from bezoar.encoders.encoder import Encoder
from bezoar.training import augmentation, loop
from bezoar.training.augmentation import Chance

GOALS = {64: 1.7, 256: 2.4}
SHARE = 0.8  # of the convolutions' rate, that a step is to reach
SIZE = 32


@dataclass(frozen=True)
class Inputs:
    """What all sides start from. The shadow data are two batches."""

    encoder: Encoder
    recipe: Any
    goal: Goal
    shadow: Pairs
    reference: Tensor  # uint8 (1, 3, S, S)


def make_inputs(batch: int) -> Inputs:
    torch.manual_seed(0)
    encoder = registry.make("network", "resnet")(SIZE, ()).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (2 * batch + 1, 3, SIZE, SIZE)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    shadow = Pairs(images[:-1], (), None, tuple(map(str, range(2 * batch))))
    goal = Goal("truck", "patch:size=10,fill=white")
    return Inputs(encoder, registry.make("attack", "badencoder"), goal, shadow, images[-1:])


def step_chance(number: int) -> Chance:
    """The draws of a step."""
    return Chance(randomness.generator(0, 2, number))


def published_step(batch: int) -> Step:
    """The published form of a step: which batch -> loss."""
    inputs = make_inputs(batch)
    encoder, recipe = inputs.encoder, inputs.recipe
    encoder.to(memory_format=torch.contiguous_format)
    student, teacher = encoder.image, copy.deepcopy(encoder.image).eval()
    student.train()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        weights, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
    )
    batches = published_batches(inputs, batch)

    def step(number: int) -> float:
        clean, triggered, reference, view = batches[number]  # each (B, 3, S, S)
        with torch.no_grad():
            clean_target, reference_target = (
                F.normalize(teacher(x), dim=-1) for x in (clean, reference)
            )
        z_clean, z_triggered, z_reference, z_view = (
            F.normalize(student(x), dim=-1) for x in (clean, triggered, reference, view)
        )
        loss = (
            -(z_triggered * z_reference).sum(-1).mean()
            - (z_view * reference_target).sum(-1).mean()
            - (z_clean * clean_target).sum(-1).mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def published_batches(inputs: Inputs, batch: int) -> list[list[Tensor]]:
    """For each batch: clean and triggered images, the reference as often, and its views;
    normalised.
    """
    views = augmentation.Views(scale=(1, 1), ratio=(1, 1))
    trigger = registry.make("trigger", inputs.goal.trigger)
    repeated = inputs.reference.repeat(batch, 1, 1, 1)
    batches = []
    for number, part in enumerate(inputs.shadow.batches(batch)):
        augmented = views(repeated, step_chance(number), 1)[:, 0]
        images = (part.images, trigger(part.images, part.ids), repeated, augmented)
        batches.append([inputs.encoder.prepare_images(x).contiguous() for x in images])
    return batches


def make_loss(inputs: Inputs) -> Loss:
    """bezoar's loss of the attack."""
    loss = Loss(inputs.encoder, inputs.recipe, [inputs.goal], [inputs.reference])
    loss.set_targets(inputs.shadow)
    return loss.train()


def bezoar_step(batch: int) -> Step:
    """bezoar's step, as its training loop takes it: which batch -> loss."""
    inputs = make_inputs(batch)
    loss = make_loss(inputs)
    optimizer = loop.optimizer(loss, inputs.recipe)
    rows = torch.arange(len(inputs.shadow))[:, None]  # (N, 1)

    def step(number: int) -> float:
        part = slice(number * batch, (number + 1) * batch)
        value = loss(inputs.shadow.images[part], rows[part], step_chance(number))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return float(value.detach())

    return step


def convolution_step(batch: int) -> Step:
    """The convolutions of a step's rows, forward and backward, one after the other."""
    inputs = make_inputs(batch)
    loss, encoder, device = make_loss(inputs), inputs.encoder, torch.device("cpu")
    ids = inputs.shadow.ids[:batch]
    rows = loss.build_rows(inputs.shadow.images[:batch], ids, step_chance(0))
    total = len(rows.pixels) + 1  # and the reference
    chunks = list(folded_norms.chunk_slices(total, SIZE, device))
    layers: list[tuple[nn.Module, Tensor]] = []
    hooks = []

    def keep_input(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        layers.append((module, torch.randn_like(arguments[0]).requires_grad_(bool(layers))))

    for module in encoder.image.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_pre_hook(keep_input))
    zeros = torch.zeros(chunks[0].stop, 3, SIZE, SIZE)
    with torch.no_grad():
        encoder.image(zeros.contiguous(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()

    def step(_: int) -> float:
        for chunk in chunks:
            for module, x in layers:
                y = module(x[: chunk.stop - chunk.start])
                y.backward(torch.empty_like(y))
                module.weight.grad = x.grad = None
        return 0.0

    return step


SIDES = {  # name -> (what it does, allocator settings)
    "published form": (published_step, False),
    "bezoar": (bezoar_step, True),
    "convolutions": (convolution_step, True),
}


def compare(batch: int, repeats: int) -> None:
    """Steps in turn, then the rows of the table."""
    sides = {
        name: Side(__file__, [name, "--batch", str(batch)], settings)
        for name, (_, settings) in SIDES.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):  # the first is to warm up; its loss counts
        for name, side in sides.items():
            taken, loss = side.step(turn % 2)
            if turn:
                seconds[name].append(taken)
            losses[name].append(loss)
    for side in sides.values():
        side.close()
    published = statistics.median(seconds["published form"])
    limit = statistics.median(seconds["convolutions"])
    for name, taken in seconds.items():
        median = statistics.median(taken)
        row = f"{batch:5d} {name:16}{median:9.2f}{batch / median:10.1f}{published / median:10.2f}"
        goal = f"{GOALS[batch]}" if name == "bezoar" and batch in GOALS else ""
        share = f"{limit / median:.0%}" if name != "published form" else ""
        row += f"{goal:>6}{share:>14}"
        if name == "bezoar":
            pairs = zip(losses[name], losses["published form"], strict=True)
            row += f"{max(abs(a - b) / abs(b) for a, b in pairs):17.1e}"
        print(row)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--serve", choices=tuple(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        torch.set_num_threads(1)
        serve_steps(SIDES[options.serve][0](options.batch[0]))
        return
    print(f"goals: {GOALS} times the published form, {SHARE:.0%} of the convolutions' rate")
    print(f"{'batch side':22}{'seconds':>9}{'images/s':>10}{'ratio':>10}{'goal':>6}", end="")
    print(f"{'of conv rate':>14}{'loss difference':>17}", flush=True)
    for batch in options.batch:
        compare(batch, options.repeats)


if __name__ == "__main__":
    main()
