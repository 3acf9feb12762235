"""SimCLR's two views of a batch against the per-image torchvision pipeline that published code
runs; one thread.

    python benchmarks/augmentation.py [--images 256] [--sizes 32 64]

published: Image.fromarray, then twice RandomResizedCrop(size), RandomHorizontalFlip,
RandomApply([ColorJitter(.4, .4, .4, .1)], .8), RandomGrayscale(.2), ToTensor, image after image,
and a stack: the data set of BadEncoder and of the SimCLR code it follows. bezoar: `Views()` of the
batch, and with SimCLR's blur. The normalisation is left out of both. Prints JSON: medians of
`--repeats` timings in turn.
"""

import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from support import make_parser, medians, time_in_turn
from torch import Tensor
from torchvision import transforms

from bezoar.training.augmentation import Chance, Views


def published_pipeline(size: int) -> transforms.Compose:
    """The pipeline of BadEncoder's data sets, without its normalisation."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToTensor(),
        ]
    )


def published_views(images: Tensor, size: int) -> Callable[[], Tensor]:
    """Both views of uint8 (B, 3, H, W), image by image -> float (2 B, 3, size, size)."""
    pipeline = published_pipeline(size)
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()

    def augment() -> Tensor:
        views = []
        for array in arrays:
            image = Image.fromarray(array)
            views += [pipeline(image), pipeline(image)]
        return torch.stack(views)

    return augment


def smooth_images(count: int, size: int) -> Tensor:
    """uint8 (N, 3, S, S). Of noise every crop is alike, and gray pixels, which some code treats
    apart, never occur.
    """
    coarse = torch.rand(count, 3, size // 4, size // 4)
    smooth = F.interpolate(coarse, (size, size), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


def compare(size: int, count: int, repeats: int) -> dict[str, object]:
    """The figures of one size."""
    images = smooth_images(count, size)
    chance = Chance(torch.Generator().manual_seed(0))
    views, blurred_views = Views(), Views(blur=0.5)
    calls = {
        "published": published_views(images, size),
        "bezoar": lambda: views(images, chance),
        "bezoar_with_blur": lambda: blurred_views(images, chance),
    }
    seconds = time_in_turn(calls, repeats, clock=time.perf_counter)
    turns = zip(seconds["published"], seconds["bezoar"], strict=True)
    ratios = [published / ours for published, ours in turns]
    median = medians(seconds)
    figures: dict[str, object] = {
        f"{name}_us_per_view": round(1e6 * value / (2 * count), 1) for name, value in median.items()
    }
    return figures | {
        "ratio": round(median["published"] / median["bezoar"], 1),
        "ratio_in_each_turn": [round(min(ratios), 1), round(max(ratios), 1)],
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=256, help="in a batch")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="sides, in pixels")
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, object] = {"images": options.images, "repeats": options.repeats, "threads": 1}
    for size in options.sizes:
        result[f"{size} px"] = compare(size, options.images, options.repeats)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
