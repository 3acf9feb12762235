"""A training step of clip_small: where its cycles go, and what share of it oneDNN's convolutions
alone would take; one thread.

    python benchmarks/clip_small.py [--batch 128] [--size 32] [--width 32] [--repeats 15]

The step is the training loop's: augmentation of uint8 images, both towers, the loss, backward,
fused AdamW; in fp32, and in bf16 where the processor multiplies bfloat16. `plain shift` is the same
step with the plain form of the shift, which picks every pixel by an index of its own; both give the
same bits. The limit is what cannot be saved while the network stays what it is: its four 3x3
convolutions, at the same shapes and in the same precision, channels last and in memory already;
forward, the gradient of every filter, and of every input but the pixels. No batch norm, no casts,
no text, no optimiser. The ladder has the parts of a step, each by itself. All are taken in turn, in
a process with the allocator settings that the command sets; medians of the seconds that the
processor worked.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from support import make_parser, medians, restart_with_allocator_settings, time_in_turn
from torch import Tensor, nn

from bezoar import registry
from bezoar.data import randomness
from bezoar.encoders.encoder import Encoder, precision_for
from bezoar.training import augmentation, loop
from bezoar.training.augmentation import Chance

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Shift = Callable[[Tensor, int, Chance], Tensor]
fast_shift: Shift = augmentation.random_shift


def plain_shift(x: Tensor, most: int, chance: Chance) -> Tensor:
    """The shift with an index for every pixel."""
    batch, _, height, width = x.shape
    offsets = chance.integers(2 * most + 1, batch, 2)
    padded = F.pad(x.float(), (most,) * 4, mode="replicate").to(x.dtype)
    rows, columns = offsets[:, :1] + torch.arange(height), offsets[:, 1:] + torch.arange(width)
    sample = torch.arange(batch)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def draw_chance() -> Chance:
    """The randomness of a step, always the same."""
    return Chance(randomness.generator(0, 2, 0))


class Training:
    """A fresh clip_small and a batch for it."""

    def __init__(self, precision: str, batch: int, size: int, width: int) -> None:
        self.pairs = registry.make("data", f"scenes:count={batch},size={size}")()
        network = registry.make("network", f"clip_small:width={width}")
        recipe = registry.make("objective", f"clip:batch={batch}")
        self.encoder: Encoder = network(size, network.vocabulary(self.pairs.captions))
        self.encoder.precision = precision
        self.tokens = self.encoder.tokenize(self.pairs.captions)
        self.loss = recipe(self.encoder).train()
        self.optimizer = loop.optimizer(self.loss, recipe)

    def take_step(self, shift: Shift) -> None:
        """One step of training."""
        augmentation.random_shift = shift
        value = self.loss(self.pairs.images, self.tokens, draw_chance())
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self.optimizer.step()
        value.item()

    def parts(self) -> dict[str, Callable[[], object]]:
        """The parts of a step, each with its own backward pass where it has one."""
        images, encoder = self.pairs.images, self.encoder
        z, w = (torch.randn(len(images), 128).requires_grad_() for _ in range(2))
        targets = torch.arange(len(images))

        def contrast() -> None:
            logits = 14 * F.normalize(z) @ F.normalize(w).T
            (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)).backward()

        return {
            "plain shift": lambda: plain_shift(images, 2, draw_chance()),
            "shift": lambda: fast_shift(images, 2, draw_chance()),
            "to floats": lambda: encoder.prepare_images(images),
            "image tower": lambda: encoder.encode_images(images).sum().backward(),
            "text tower": lambda: encoder.encode_tokens(self.tokens).sum().backward(),
            "loss": contrast,
            "optimiser": self.optimizer.step,
        }


def make_convolutions(
    precision: str, batch: int, size: int, width: int
) -> tuple[Callable[[], None], float]:
    """The convolutions of one step, and their floating-point operations."""
    encoder = registry.make("network", f"clip_small:width={width}")(size)
    dtype = TYPES[precision]
    channels_last = torch.channels_last
    layers: list[tuple[nn.Module, Tensor, Tensor]] = []
    operations = 0.0
    x = torch.randn(batch, 3, size, size)
    for layer in encoder.image.modules():
        if isinstance(layer, nn.Conv2d):
            y = layer(x).detach()
            products = 3 if layers else 2  # forward, the filter's gradient, the input's
            operations += 2.0 * y.numel() * layer.weight[0].numel() * products
            image = x.to(dtype, memory_format=channels_last).requires_grad_(bool(layers))
            gradient = torch.randn_like(y).to(dtype, memory_format=channels_last)
            layers.append((layer.to(dtype), image, gradient))
            x = y

    def convolve() -> None:
        for layer, image, gradient in layers:
            layer.weight.grad = image.grad = None
            layer(image).backward(gradient)

    return convolve, operations


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    precisions = ["fp32"]
    if precision_for(torch.device("cpu")) == "bf16":
        precisions.append("bf16")
    calls: dict[str, Callable[[], object]] = {}
    shape = (options.batch, options.size, options.width)
    operations = 0.0
    for precision in precisions:
        training = Training(precision, *shape)
        calls[f"{precision} step"] = lambda training=training: training.take_step(fast_shift)
        calls[f"{precision} plain"] = lambda training=training: training.take_step(plain_shift)
        limit, operations = make_convolutions(precision, *shape)
        calls[f"{precision} limit"] = limit
    parts = training.parts()
    seconds = medians(time_in_turn(calls | parts, options.repeats, warm_up=2))
    print(f"{'precision':11}{'pairs/s':>9}{'plain shift':>13}{'limit pairs/s':>15}", end="")
    print(f"{'limit GFLOP/s':>15}{'share of the limit':>20}")
    for precision in precisions:
        step, plain, limit_seconds = (
            seconds[f"{precision} {name}"] for name in ("step", "plain", "limit")
        )
        rates = f"{options.batch / step:9.0f}{options.batch / plain:13.0f}"
        gflops = f"{options.batch / limit_seconds:15.0f}{operations / limit_seconds / 1e9:15.0f}"
        print(f"{precision:11}{rates}{gflops}{limit_seconds / step:20.0%}")
    print(f"\nParts of a step in {precisions[-1]}, batch {options.batch}, width {options.width}")
    for name in parts:
        print(f"{name:13}{1e3 * seconds[name]:9.2f} ms{seconds[name] / step:8.1%}")


if __name__ == "__main__":
    restart_with_allocator_settings()
    main()
