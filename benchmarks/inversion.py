"""A step of trigger inversion by bezoar and in the plain form: DECREE's and Neural Cleanse's, fp32,
one thread, 32 px.

    python benchmarks/inversion.py [--network clip_small resnet] [--repeats 5]

Both search for the same triggers from the same starts on the same images. The plain form is the
published one: one trigger after the other, the gradient reaching every weight (which nobody reads),
batch norms computed at rest, NCHW, torch's Adam, a process without allocator settings. bezoar's is
a step of `invert_triggers`, in a process with the settings that the command sets. `difference` is
the largest of a gradient at the first step, as a share of the largest gradient: where two pixels of
a feature map are equal but for rounding, it decides which of them a maximum passes a gradient on to
(in double precision, in the tests, the two are equal). The sides take turns. Medians over
`--repeats` of the seconds that the processor worked.
"""

import argparse
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from support import Side, Step, make_parser, serve_steps
from torch import Tensor

from bezoar import registry
from bezoar.auditing import trigger_inversion
from bezoar.auditing.audits import cleanse, decree
from bezoar.auditing.trigger_search import InversionRecipe, TriggerSearch, initial_parameters
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation.classifiers import Classifier

GOALS = {"decree": 1.9, "cleanse": 1.6}
# triggers and images a step: an audit's own where it takes seconds, fewer triggers where not
COUNTS = {
    ("clip_small", "decree"): (16, 12),
    ("clip_small", "cleanse"): (40, 8),
    ("resnet", "decree"): (4, 12),
    ("resnet", "cleanse"): (10, 8),
}
SIZE, MASK_WEIGHT = 32, 1e-3


@dataclass(frozen=True)
class Inputs:
    """What both sides start from."""

    encoder: Encoder  # with batch norms that do something
    head: Tensor  # (K, D) unit rows
    images: Tensor  # (B, 3, S, S) in 0..1
    start: Tensor  # (K, 4, S, S): mask and pattern of each trigger, unbounded


def make_inputs(network: str, audit: str) -> Inputs:
    count, images = COUNTS[network, audit]
    torch.manual_seed(0)
    encoder = registry.make("network", network)(SIZE, ()).eval()
    for module in encoder.image.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    x = torch.rand(images, 3, SIZE, SIZE)
    with torch.no_grad():
        width = encoder.encode_images(x).shape[1]
        head = F.normalize(torch.randn(count, width), dim=1)
    return Inputs(encoder, head, x, initial_parameters(count, SIZE, SIZE, 0))


def plain_step(network: str, audit: str) -> Step:
    """The published form: a step of every trigger -> its gradients."""
    inputs = make_inputs(network, audit)
    encoder, x = inputs.encoder, inputs.images
    encoder.to(memory_format=torch.contiguous_format)
    parameters = [u.clone().requires_grad_() for u in inputs.start]
    optimizers = [torch.optim.Adam([u], 0.1, betas=(0.5, 0.9)) for u in parameters]

    def loss_of(z: Tensor, trigger: int) -> Tensor:
        if audit == "decree":
            cosines = z @ z.T
            return -(cosines.sum() - cosines.diagonal().sum()) / (len(z) * (len(z) - 1))
        return F.cross_entropy(10 * z @ inputs.head.T, torch.full((len(z),), trigger))

    def step(_: Any) -> list[float]:
        for trigger, (u, optimizer) in enumerate(zip(parameters, optimizers, strict=True)):
            bounded = (torch.tanh(u) + 1) / 2
            mask, pattern = bounded[:1], bounded[1:]
            stamped = (1 - mask) * x + mask * pattern
            pixels = (stamped - encoder.mean) / encoder.std
            z = F.normalize(encoder.image(pixels.contiguous()), dim=1)
            loss = loss_of(z, trigger) + MASK_WEIGHT * mask.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return torch.stack([u.grad for u in parameters if u.grad is not None]).flatten().tolist()

    return step


def bezoar_step(network: str, audit: str) -> Step:
    """bezoar's step, as `invert_triggers` takes it."""
    inputs = make_inputs(network, audit)
    count = len(inputs.start)
    names = tuple(map(str, range(count)))
    classifier = Classifier(inputs.encoder, lambda z: 10 * z @ inputs.head.T, names, "drawn")
    objective = decree.collapse if audit == "decree" else cleanse.reach_class(classifier)
    # the tower stays frozen for as long as the process lives
    tower = ExitStack().enter_context(trigger_inversion.freeze_tower(inputs.encoder))
    recipe = InversionRecipe(1, len(inputs.images), weight=MASK_WEIGHT, patience=1 << 20)
    search = TriggerSearch(inputs.start.clone(), recipe)
    steps = 0

    def step(_: Any) -> list[float]:
        nonlocal steps
        gradient, success, norm = trigger_inversion.compute_gradients(
            search, inputs.images, tower, objective
        )
        search.record(success, norm)
        search.adam_step(gradient, steps)
        steps += 1
        return gradient.flatten().tolist()

    return step


SIDES = {"plain form": (plain_step, False), "bezoar": (bezoar_step, True)}


def compare(network: str, audit: str, repeats: int) -> None:
    """Steps in turn, then the rows of the table."""
    sides = {
        name: Side(__file__, [name, network, audit], settings)
        for name, (_, settings) in SIDES.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    gradients: dict[str, list[float]] = {}
    for turn in range(repeats + 1):  # the first is to warm up; its gradients are compared
        for name, side in sides.items():
            taken, gradient = side.step()
            if turn:
                seconds[name].append(taken)
            gradients.setdefault(name, gradient)
    for side in sides.values():
        side.close()
    count, images = COUNTS[network, audit]
    base = statistics.median(seconds["plain form"])
    pairs = list(zip(gradients["plain form"], gradients["bezoar"], strict=True))
    difference = max(abs(a - b) for a, b in pairs) / max(abs(a) for a, _ in pairs)
    for name, taken in seconds.items():
        median = statistics.median(taken)
        row = f"{network:12}{audit:9}{count:3} x {images:3}  {name:12}"
        row += f"{median:9.3f}{count * images / median:10.0f}{base / median:8.2f}"
        if name == "bezoar":
            row += f"{GOALS[audit]:6}{difference:12.1e}"
        print(row, flush=True)


def main() -> None:
    parser = make_parser(__doc__)
    networks = ["clip_small", "resnet"]
    parser.add_argument("--network", nargs="+", choices=networks, default=networks)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        torch.set_num_threads(1)
        side, network, audit = options.serve
        serve_steps(SIDES[side][0](network, audit))
        return
    print(f"goals: {GOALS} times the plain form")
    columns = f"{'seconds':>9}{'images/s':>10}{'ratio':>8}{'goal':>6}{'difference':>12}"
    print(f"{'network':12}{'audit':9}{'triggers':9}  {'side':12}{columns}")
    for network in options.network:
        for audit in GOALS:
            compare(network, audit, options.repeats)


if __name__ == "__main__":
    main()
