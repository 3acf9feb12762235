"""SIG and WaNet against the per-image plain Python forms that published code uses; one thread.

    python benchmarks/triggers.py [--images 64] [--size 224]

plain SIG: three Python loops fill the signal for every image, then torch adds it. plain WaNet: per
image, the control noise is read from disk, the identity grid built, grid_sample called on a float
copy. Both follow CleanCLIP, without its conversions from and to PIL, which would favour bezoar.
Prints JSON: medians of `--repeats` timings of bezoar, and one pass over `--plain` images of the
plain form.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from support import make_parser, medians, time_call, time_in_turn
from torch import Tensor

from bezoar import registry
from bezoar.attacks import pixels


def plain_sinusoid(image: Tensor, delta: float = 20.0, frequency: float = 6.0) -> Tensor:
    """SIG on uint8 (3, H, W)."""
    channels, height, width = image.shape
    signal = torch.zeros(channels, height, width)
    for i in range(height):
        for j in range(width):
            for k in range(channels):
                signal[k, i, j] = delta / 255 * math.sin(2 * math.pi * j * frequency / width)
    return ((image / 255 + signal).clamp(0, 1) * 255).round().to(torch.uint8)


def plain_warp(image: Tensor, noise_file: Path) -> Tensor:
    """WaNet on uint8 (3, H, W)."""
    height, width = image.shape[-2:]
    noise = torch.load(noise_file, weights_only=True)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    grid = (torch.stack((x, y), 2)[None] + noise / height).clamp(-1, 1)
    warped = F.grid_sample((image / 255)[None], grid, align_corners=True)[0]
    return (warped.clamp(0, 1) * 255).round().to(torch.uint8)


def save_noise(file: Path, size: int) -> None:
    """The field of trigger `warp` with its default seed and strength, as the plain form reads
    it.
    """
    control = pixels.uniform_noise(0, "warp", 2, 4, 4) * 2 - 1
    control = (control / control.abs().mean())[None]
    field = F.interpolate(control, (size, size), mode="bicubic", align_corners=True)
    torch.save(field.permute(0, 2, 3, 1).contiguous() * 0.5, file)


def seconds_per_image(name: str, images: Tensor, repeats: int) -> float:
    """Of a trigger of bezoar's."""
    trigger = registry.make("trigger", name)
    ids = [str(i) for i in range(len(images))]
    calls = {name: lambda: trigger(images, ids)}
    return medians(time_in_turn(calls, repeats, clock=time.perf_counter))[name] / len(images)


def compare(
    name: str, plain: Callable[[Tensor], Tensor], count: int, images: Tensor, repeats: int
) -> dict[str, float]:
    """bezoar's trigger against its plain form. count: images of the plain form."""
    trigger = registry.make("trigger", name)
    ids = [str(i) for i in range(len(images))]
    expected = torch.stack([plain(image) for image in images[:count]])
    difference = (trigger(images, ids)[:count].int() - expected.int()).abs().max().item()
    ours = seconds_per_image(name, images, repeats)
    theirs = time_call(lambda: [plain(i) for i in images[:count]], time.perf_counter) / count
    return {
        "plain_ms_per_image": round(1000 * theirs, 4),
        "bezoar_ms_per_image": round(1000 * ours, 5),
        "ratio": round(theirs / ours, 1),
        "plain_images": count,
        "largest_difference": difference,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=64, help="in bezoar's batch")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--plain", type=int, default=2, help="images of the plain SIG; the warp takes 16 times more"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape = (options.images, 3, options.size, options.size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    result: dict[str, object] = {**vars(options), "threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        noise = Path(folder) / "noise.pt"
        save_noise(noise, options.size)
        forms = {
            "sinusoid": (plain_sinusoid, options.plain),
            "warp": (lambda image: plain_warp(image, noise), 16 * options.plain),
        }
        for name, (plain, count) in forms.items():
            count = min(count, options.images)
            result[name] = compare(name, plain, count, images, options.repeats)
    for name in ("patch:place=random", "blend"):
        seconds = seconds_per_image(name, images, options.repeats)
        result[name] = {"bezoar_ms_per_image": round(1000 * seconds, 5)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
