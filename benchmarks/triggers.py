"""SIG and WaNet against the per-image plain Python forms that published code uses; one thread. Prints JSON.

    python benchmarks/triggers.py [--images 64] [--size 224]

plain SIG: three Python loops fill the signal for every image, then torch adds it. plain WaNet: per image, the control
noise is read from disk, the identity grid built, grid_sample called on a float copy. Both follow CleanCLIP, less its
conversions from and to PIL, which would favour us.
Each figure is the median of `--repeats` timings of ours, and of one pass over `--plain` images of the plain form.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar import registry
from bezoar.attacks import pixels


def plain_sinusoid(image: Tensor, delta: float = 20.0, frequency: float = 6.0) -> Tensor:
    channels, height, width = image.shape
    signal = torch.zeros(channels, height, width)
    for i in range(height):
        for j in range(width):
            for k in range(channels):
                signal[k, i, j] = delta / 255 * math.sin(2 * math.pi * j * frequency / width)
    return ((image / 255 + signal).clamp(0, 1) * 255).round().to(torch.uint8)


def plain_warp(image: Tensor, noise_file: Path) -> Tensor:
    height, width = image.shape[-2:]
    noise = torch.load(noise_file, weights_only=True)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    grid = (torch.stack((x, y), 2)[None] + noise / height).clamp(-1, 1)
    out = F.grid_sample((image / 255)[None], grid, align_corners=True)[0]
    return (out.clamp(0, 1) * 255).round().to(torch.uint8)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` timings, after one call to warm up when there are several."""
    if repeats > 1:
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64, help="in our batch")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--plain",
        type=int,
        default=2,
        help="images of the three loops; the plain warp takes 16 times as many",
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape = (given.images, 3, given.size, given.size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    ids = [str(i) for i in range(given.images)]
    result: dict[str, object] = {
        "images": given.images,
        "size": given.size,
        "repeats": given.repeats,
        "threads": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "noise.pt"
        control = pixels.uniform_noise(0, "warp", 2, 4, 4) * 2 - 1
        field = F.interpolate(
            (control / control.abs().mean())[None], shape[-2:], mode="bicubic", align_corners=True
        )
        torch.save(field.permute(0, 2, 3, 1).contiguous() * 0.5, file)
        plain = {
            "sinusoid": (plain_sinusoid, given.plain),
            "warp": (lambda image: plain_warp(image, file), 16 * given.plain),
        }
        for name, (slow, count) in plain.items():
            trigger, count = registry.make("trigger", name), min(count, given.images)
            expected = torch.stack([slow(image) for image in images[:count]])
            apart = (trigger(images, ids)[:count].int() - expected.int()).abs().max().item()
            ours = seconds(lambda t=trigger: t(images, ids), given.repeats) / given.images
            theirs = seconds(lambda f=slow, n=count: [f(image) for image in images[:n]], 1) / count
            result[name] = {
                "plain_ms_per_image": round(1000 * theirs, 4),
                "ours_ms_per_image": round(1000 * ours, 5),
                "ratio": round(theirs / ours, 1),
                "plain_images": count,
                "largest_difference": apart,
            }
        for name in ("patch:place=random", "blend"):
            trigger = registry.make("trigger", name)
            ours = seconds(lambda t=trigger: t(images, ids), given.repeats) / given.images
            result[name] = {"ours_ms_per_image": round(1000 * ours, 5)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
