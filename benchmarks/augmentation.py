"""SimCLR's two views of a batch against the per-image torchvision pipeline that published code runs; one thread. Prints JSON.

    python benchmarks/augmentation.py [--images 256] [--sizes 32 64]

plain: Image.fromarray, then twice RandomResizedCrop(size), RandomHorizontalFlip, RandomApply([ColorJitter(.4, .4, .4, .1)],
.8), RandomGrayscale(.2), ToTensor, image after image, and a stack: the data set of BadEncoder and of the SimCLR code it
follows. ours: `Views()` of the batch, and with SimCLR's blur; plain's normalisation is left out of both.
Each figure is the median of `--repeats` timings; ours and plain take turns, so that a busy machine disturbs both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from bezoar.training.augmentation import Chance, Views


def published(size: int) -> transforms.Compose:
    """The pipeline of BadEncoder's data sets, less its normalisation."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToTensor(),
        ]
    )


def plain(images: Tensor, size: int) -> Callable[[], Tensor]:
    """Both views of uint8 (B, H, W, 3), per image -> float (B, 2, 3, size, size)."""
    pipeline, arrays = published(size), images.numpy()

    def run() -> Tensor:
        views = []
        for array in arrays:
            image = Image.fromarray(array)
            views += [pipeline(image), pipeline(image)]
        return torch.stack(views)

    return run


def seconds(calls: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
    """`repeats` timings of each call, taken in turns after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256, help="in a batch")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[32, 64],
        help="sides of the images and of the views",
    )
    parser.add_argument("--repeats", type=int, default=11)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, object] = {
        "images": given.images,
        "views": 2,
        "repeats": given.repeats,
        "threads": 1,
    }
    for size in given.sizes:
        # smooth fields: of noise every crop is alike, and gray pixels, which some code treats apart, never occur
        coarse = torch.rand(given.images, 3, size // 4, size // 4)
        images = (
            (torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear") * 255)
            .round()
            .to(torch.uint8)
        )
        chance = Chance(torch.Generator().manual_seed(0))
        calls = {
            "plain": plain(images.permute(0, 2, 3, 1).contiguous(), size),
            "ours": lambda x=images, c=chance: Views()(x, c),
            "ours_with_blur": lambda x=images, c=chance: Views(blur=0.5)(x, c),
        }
        times = seconds(calls, given.repeats)
        each = {name: statistics.median(t) / (2 * given.images) for name, t in times.items()}
        ratios = sorted(p / o for p, o in zip(times["plain"], times["ours"], strict=True))
        result[f"{size} px"] = {
            **{f"{name}_us_per_view": round(1e6 * t, 1) for name, t in each.items()},
            "ratio": round(each["plain"] / each["ours"], 1),
            "ratio_in_each_turn": [round(ratios[0], 1), round(ratios[-1], 1)],
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
