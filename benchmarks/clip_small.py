"""A training step of clip_small, and what share of it oneDNN's convolutions alone would take; one thread.

    python benchmarks/clip_small.py [--batch 128] [--size 32] [--repeats 15]

The step is the training loop's: augmentation of uint8 images, both towers, the loss, backward, fused AdamW; in fp32, and in
bf16 where the processor multiplies bfloat16. The limit is what cannot be saved while the network stays what it is: its four
3x3 convolutions, at the same shapes and in the same precision, channels last and in memory already; forward, the gradient of
every filter, and of every input but the pixels. No batch norm, no casts, no text, no optimiser. Steps and limits are taken in
turn, in a process with the allocator settings that the command sets; medians of the seconds that the processor worked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from support import make_parser, medians, restart_with_allocator_settings, time_in_turn
from torch import Tensor, nn

from bezoar import registry
from bezoar.data import randomness
from bezoar.encoders.encoder import precision_for
from bezoar.training import loop
from bezoar.training.augmentation import Chance

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_step(precision: str, batch: int, size: int) -> Callable[[], None]:
    """One step of training, ready to be taken again and again."""
    pairs = registry.make("data", f"scenes:count={batch},size={size}")()
    network = registry.make("network", "clip_small")
    recipe = registry.make("objective", f"clip:batch={batch}")
    encoder = network(size, network.vocabulary(pairs.captions))
    encoder.precision = precision
    tokens = encoder.tokenize(pairs.captions)
    loss = recipe(encoder).train()
    optimizer = loop.optimizer(loss, recipe)

    def step() -> None:
        value = loss(pairs.images, tokens, Chance(randomness.generator(0, 2, 0)))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        value.item()

    return step


def make_convolutions(precision: str, batch: int, size: int) -> tuple[Callable[[], None], float]:
    """The convolutions of one step, and their floating-point operations."""
    encoder = registry.make("network", "clip_small")(size)
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
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    precisions = ["fp32"]
    if precision_for(torch.device("cpu")) == "bf16":
        precisions.append("bf16")
    calls: dict[str, Callable[[], None]] = {}
    operations = 0.0
    for precision in precisions:
        calls[f"{precision} step"] = make_step(precision, options.batch, options.size)
        limit, operations = make_convolutions(precision, options.batch, options.size)
        calls[f"{precision} limit"] = limit
    seconds = medians(time_in_turn(calls, options.repeats, warm_up=2))
    print(f"{'precision':11}{'pairs/s':>9}{'limit pairs/s':>15}{'limit GFLOP/s':>15}", end="")
    print(f"{'share of the limit':>20}")
    for precision in precisions:
        step, limit_seconds = seconds[f"{precision} step"], seconds[f"{precision} limit"]
        rates = f"{options.batch / step:9.0f}{options.batch / limit_seconds:15.0f}"
        gflops = f"{operations / limit_seconds / 1e9:15.0f}"
        print(f"{precision:11}{rates}{gflops}{limit_seconds / step:20.0%}")


if __name__ == "__main__":
    restart_with_allocator_settings()
    main()
