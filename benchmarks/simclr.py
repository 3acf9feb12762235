"""A SimCLR training step by bezoar and by the form that published CIFAR-10 code has; ResNet-18 at
32 px, one thread.

    python benchmarks/simclr.py [--batch 64] [--repeats 5]

Both: 3x3 stem without a max-pool, head 512-512-128, temperature 0.5, Adam at 1e-3 with weight decay
1e-6, the same random images. published form: every image through PIL and torchvision's transforms,
twice; each view through the network by itself, NCHW; all 2B x 2B similarities by exp, mask and sum;
torch's unfused Adam; a process with no allocator settings. bezoar: its network, objective and
optimiser as its training loop drives them, from uint8, in a process with the settings that the
command sets. Each side is a process of its own, and the sides take one step each in turn. Medians
over `--repeats` steps of the seconds that the processor worked. bf16 is there where the processor
multiplies it, and counts as more than a faster way to the same bits.
"""

import argparse
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from support import Side, Step, make_parser, serve_steps
from torch import Tensor, nn
from torchvision import transforms
from torchvision.models import resnet18

from bezoar import registry
from bezoar.data import randomness
from bezoar.encoders.encoder import precision_for
from bezoar.training import loop
from bezoar.training.augmentation import Chance

SIDES = {  # name -> (form, precision, allocator settings)
    "published form": ("published", "fp32", False),
    "bezoar": ("bezoar", "fp32", True),
    "bezoar, no allocator settings": ("bezoar", "fp32", False),
    "bezoar, bf16": ("bezoar", "bf16", True),
}
PARTS = ("augmentation", "network", "optimiser")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Stopwatch:
    """Seconds that the processor worked between its marks."""

    def __init__(self) -> None:
        self.times = [time.process_time()]

    def mark(self) -> None:
        self.times.append(time.process_time())

    def parts(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def smooth_images(batch: int) -> Tensor:
    """uint8 (B, 3, 32, 32). Of noise every crop is alike."""
    coarse = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(coarse, (32, 32), mode="bilinear") * 255).round().to(torch.uint8)


def published_model() -> nn.Module:
    """ResNet-18 with a CIFAR stem, and SimCLR's head."""
    trunk = resnet18()
    trunk.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    trunk.maxpool = nn.Identity()
    trunk.fc = nn.Identity()
    head = nn.Sequential(
        nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128)
    )
    return nn.Sequential(trunk, head).train()


def published_step(batch: int, precision: str) -> Step:
    """The published form of a step: seconds of its parts."""
    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(32),
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    model = published_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-6)
    arrays = smooth_images(batch).permute(0, 2, 3, 1).contiguous().numpy()

    def step(_: Any) -> list[float]:
        watch = Stopwatch()
        pairs = [(pipeline(image), pipeline(image)) for image in map(Image.fromarray, arrays)]
        views = [torch.stack(view) for view in zip(*pairs, strict=True)]
        watch.mark()
        z = [F.normalize(model(view), dim=1) for view in views]  # two of (B, 128)
        both = torch.cat(z)
        others = ~torch.eye(2 * batch, dtype=torch.bool)
        similarities = torch.exp(both @ both.T / 0.5)[others].view(2 * batch, -1).sum(1)
        positives = torch.exp((z[0] * z[1]).sum(1) / 0.5).repeat(2)
        loss = -torch.log(positives / similarities).mean()
        optimizer.zero_grad()
        loss.backward()
        watch.mark()
        optimizer.step()
        loss.item()
        watch.mark()
        return watch.parts()

    return step


def bezoar_step(batch: int, precision: str) -> Step:
    """bezoar's step, as its training loop takes it: seconds of its parts."""
    encoder = registry.make("network", "resnet")(32)
    encoder.precision = precision
    recipe = registry.make("objective", f"simclr:batch={batch}")
    loss = recipe(encoder).train()
    optimizer = loop.optimizer(loss, recipe)
    images = smooth_images(batch)
    tokens = images.new_zeros(batch, 0)
    augment = loss.views
    watch = Stopwatch()
    steps = 0

    def augment_and_mark(x: Tensor, chance: Chance) -> Tensor:
        views = augment(x, chance)
        watch.mark()
        return views

    loss.views = augment_and_mark

    def step(_: Any) -> list[float]:
        nonlocal steps, watch
        watch = Stopwatch()
        value = loss(images, tokens, Chance(randomness.generator(0, 2, steps)))
        steps += 1
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        watch.mark()
        optimizer.step()
        value.item()
        watch.mark()
        return watch.parts()

    return step


def print_table(seconds: dict[str, list[list[float]]], batch: int) -> None:
    """A line a side. seconds: of every step of a side, its parts."""
    print(f"{'side':32}{'images/s':>9}{'times':>7}{'in each turn':>14}", end="")
    print("".join(f"{part:>20}" for part in PARTS))
    totals = {name: [sum(parts) for parts in steps] for name, steps in seconds.items()}
    base = totals["published form"]
    for name, steps in seconds.items():
        median = statistics.median(totals[name])
        ratios = [b / t for b, t in zip(base, totals[name], strict=True)]
        parts = [statistics.median(part) for part in zip(*steps, strict=True)]
        shares = "".join(f"{1000 * part:10.0f} ms{part / median:7.1%}" for part in parts)
        ratio = f"{statistics.median(base) / median:7.2f}{min(ratios):8.2f}..{max(ratios):.2f}"
        print(f"{name:32}{batch / median:9.1f}{ratio}{shares}")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        form, precision = options.serve
        make_step = {"published": published_step, "bezoar": bezoar_step}[form]
        serve_steps(make_step(options.batch, precision))
        return
    precisions = ("fp32", precision_for(torch.device("cpu")))
    sides = {
        name: Side(__file__, [form, precision, "--batch", str(options.batch)], settings)
        for name, (form, precision, settings) in SIDES.items()
        if precision in precisions
    }
    seconds: dict[str, list[list[float]]] = {name: [] for name in sides}
    for turn in range(options.repeats + 1):  # the first is to warm up
        for name, side in sides.items():
            _, parts = side.step()
            if turn:
                seconds[name].append(parts)
    for side in sides.values():
        side.close()
    print_table(seconds, options.batch)


if __name__ == "__main__":
    main()
