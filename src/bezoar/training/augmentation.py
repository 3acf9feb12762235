"""Batched per-sample augmentation on the device. One draw a sample, never one for a whole batch.

shift and flip keep uint8. All else gives float32 in 0..1, and nothing is rounded between two operations: results differ
from those of Pillow images, which are rounded and cut off each time, by a few 255ths. Formulas and distributions are those
of torchvision (transforms.v2). SimCLR is Chen et al. 2020.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TRIES = 10  # of torchvision's RandomResizedCrop
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.2989, 0.587, 0.114)
CACHED = 1 << 19  # floats of a piece that stays in a core's cache, with what is computed from it


@dataclass(frozen=True)
class Chance:
    """The randomness of one step. Drawn for the batch of all ranks, of which each takes its own rows in turn.

    Rank r of `world` holds rows r*b .. (r+1)*b of the global batch: two ranks see what one would have seen.
    """

    generator: torch.Generator
    rank: int = 0
    world: int = 1

    def uniform(self, rows: int, *shape: int) -> Tensor:
        """float32 (rows, *shape) in [0, 1), on the CPU: those of this rank's rows."""
        return torch.rand(rows * self.world, *shape, generator=self.generator)[
            self.rank * rows : (self.rank + 1) * rows
        ]

    def integers(self, high: int, rows: int, *shape: int) -> Tensor:
        """int64 (rows, *shape) in 0..high-1, on the CPU: those of this rank's rows."""
        drawn = torch.randint(0, high, (rows * self.world, *shape), generator=self.generator)
        return drawn[self.rank * rows : (self.rank + 1) * rows]


def random_shift(x: Tensor, most: int, chance: Chance) -> Tensor:
    """uint8 (B, 3, H, W) moved by up to `most` pixels each way, borders repeated; one draw a sample."""
    if most == 0:
        return x
    b, _, h, w = x.shape
    moves = chance.integers(2 * most + 1, b, 2).to(x.device)
    padded = F.pad(x.float(), (most,) * 4, mode="replicate").to(x.dtype)
    rows = moves[:, :1] + torch.arange(h, device=x.device)
    columns = moves[:, 1:] + torch.arange(w, device=x.device)
    sample = torch.arange(b, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def random_flip(x: Tensor, share: float, chance: Chance) -> Tensor:
    """(B, 3, H, W) mirrored left to right with probability `share`; one draw a sample."""
    if share == 0:
        return x
    chosen = (chance.uniform(len(x)) < share).to(x.device)
    return torch.where(chosen[:, None, None, None], x.flip(-1), x)


def boxes(
    height: int,
    width: int,
    rows: int,
    chance: Chance,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:
    """int64 (rows, 4) on the CPU: top, left, height, width of random crops, distributed as torchvision's RandomResizedCrop.

    Area uniform in `scale` (shares of the image), width / height log-uniform in `ratio`; the first of ten tries that fits
    inside, else the largest centred crop within `ratio`. All tries are drawn at once, so every sample takes as many draws.
    """
    area, shape = chance.uniform(rows, 2, TRIES).double().unbind(1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    shape = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * shape)
    w, h = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # of equal values argmax gives the first
    whole = min(max(width / height, ratio[0]), ratio[1])
    fallback = (min(height, round(width / whole)), min(width, round(height * whole)))
    found = fits.any(1)
    h = torch.where(found, h.gather(1, first)[:, 0], fallback[0])
    w = torch.where(found, w.gather(1, first)[:, 0], fallback[1])
    place = chance.uniform(rows, 2).double()
    top = torch.where(found, (place[:, 0] * (height - h + 1)).floor(), (height - fallback[0]) // 2)
    left = torch.where(found, (place[:, 1] * (width - w + 1)).floor(), (width - fallback[1]) // 2)
    return torch.stack((top, left, h, w), 1).long()


Taps = tuple[
    Tensor, Tensor
]  # int64 and float32 (B, size, T): the pixels that one of `size` is made of, and their weights


def triangle(apart: Tensor) -> Tensor:
    """The bilinear kernel, of distances >= 0 in pixels."""
    return (1 - apart).clamp_(min=0)


def cubic(apart: Tensor) -> Tensor:
    """Keys' bicubic kernel with a = -1/2, of distances >= 0 in pixels."""
    near = (1.5 * apart - 2.5) * apart**2 + 1
    far = ((2.5 - 0.5 * apart) * apart - 4) * apart + 2
    return torch.where(apart < 1, near, torch.where(apart < 2, far, 0.0))


KERNELS = {"bilinear": (triangle, 1), "bicubic": (cubic, 2)}  # and how far they reach


def taps(
    start: Tensor,
    length: Tensor,
    source: int,
    size: int,
    kernel: str,
    mirrored: Tensor | None = None,
) -> Taps:
    """What resizes each sample's pixels start .. start+length-1, of `source`, to `size`; in reverse where mirrored.

    start, length: int64 (B,), mirrored: bool (B,). Antialiased: where there is less room the kernel is stretched, as Pillow
    and torchvision v2 do.
    """
    step = (length / size).float()[:, None]
    stretch = step.clamp(min=1)
    weigh, support = KERNELS[kernel]
    place = torch.arange(size, device=start.device) + 0.5
    place = step * (
        place if mirrored is None else torch.where(mirrored[:, None], size - place, place)
    )
    count = math.ceil(2 * support * float(stretch.max()))
    pixel = (place - support * stretch + 0.5).floor().long()[:, :, None] + torch.arange(
        count, device=start.device
    )
    apart = ((pixel + 0.5 - place[:, :, None]) / stretch[:, :, None]).abs_()
    weight = weigh(apart) * ((pixel >= 0) & (pixel < length[:, None, None]))
    return (pixel + start[:, None, None]).clamp_(0, source - 1), weight.div_(
        weight.sum(2, keepdim=True)
    )


def resample(x: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """(B, 3, H, W) -> float32 (B, 3, h, w), every row and then every column a weighted sum of some of the sample's own.

    Rows lie together in memory and are picked; for columns that is slower than a product with a matrix of zeros but for them.
    """
    (index, weight), (b, channels, height, width) = rows, x.shape
    planes = height * torch.arange(b * channels, device=x.device).view(b, channels, 1)
    y = torch.zeros(b, channels, index.shape[1], width, device=x.device)
    flat = x.reshape(-1, width)
    for place, share in zip(index.unbind(2), weight.unbind(2), strict=True):
        picked = flat.index_select(0, (planes + place[:, None]).flatten()).view(y.shape)
        y.addcmul_(picked.float(), share[:, None, :, None])
    index, weight = columns
    matrix = torch.zeros(b, index.shape[1], width, device=x.device).scatter_add_(2, index, weight)
    return torch.bmm(y.flatten(1, 2), matrix.transpose(1, 2)).unflatten(1, y.shape[1:3])


def random_crop(
    x: Tensor,
    size: int,
    chance: Chance,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    kernel: str = "bilinear",
    mirrored: float = 0.0,
) -> Tensor:
    """uint8 or float 0..1 (B, 3, H, W) -> float32 0..1 (B, 3, size, size): random resized crops, a share of them mirrored.

    See `boxes` and `resized`. Defaults are SimCLR's. open_clip trains with scale=(0.9, 1.0), kernel="bicubic".
    """
    place = boxes(x.shape[-2], x.shape[-1], len(x), chance, scale, ratio)
    turned = chosen(len(x), mirrored, chance)
    parts = pieces(len(x), max(x[:1].numel(), 3 * size**2), x.device)
    return torch.cat([resized(x[p], place[p], size, kernel, turned[p]) for p in parts])


def resized(
    x: Tensor, place: Tensor, size: int, kernel: str = "bilinear", mirrored: Tensor | None = None
) -> Tensor:
    """uint8 or float 0..1 (B, 3, H, W) and boxes (B, 4) -> float32 0..1 (B, 3, size, size), a sample's box resized.

    mirrored: bool (B,). Antialiased. Crop, resizing and mirroring are one operation. Bicubic is cut off at 0 and 1 in the
    end; Pillow does that after each direction, which shows on hard edges.
    """
    place = place.to(x.device)
    turned = None if mirrored is None else mirrored.to(x.device)
    rows = taps(place[:, 0], place[:, 2], x.shape[-2], size, kernel)
    index, weight = taps(place[:, 1], place[:, 3], x.shape[-1], size, kernel, turned)
    out = resample(x, rows, (index, weight / 255 if x.dtype == torch.uint8 else weight))
    return out.clamp_(0, 1) if kernel == "bicubic" else out


def gray(x: Tensor) -> Tensor:
    """float (B, 3, H, W) -> (B, H, W)."""
    r, g, b = x.unbind(1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def hue(x: Tensor, turns: Tensor, out: Tensor | None = None) -> Tensor:
    """float 0..1 (B, 3, H, W), colours turned round the wheel by turns (B,); 1 is once round. out may be x.

    With m the darkest channel and c the lightest less m, a colour lies +-(1 + (g + b - r - m) / c) sixths of a turn from
    red, the sign being that of g - b; and a channel is m + c clamp(2 - d, 0, 1), d sixths being its way to that colour.
    """
    r, g, b = x.unbind(1)
    darkest = x.amin(1)
    chroma = x.amax(1).sub_(darkest)
    angle = (g + b).sub_(r).sub_(darkest).div_(chroma.clamp(min=1e-20)).add_(1).copysign_(g - b)
    own = 6 * turns.to(x.device)[:, None] - torch.tensor([0, 2, 4], device=x.device)
    own = own - 6 * (own / 6).round()
    # both angles are within -3 .. 3, so the way between them is 3 - ||sum| - 3|
    away = (angle[:, None] + own[:, :, None, None]).abs_().sub_(3).abs_().clamp_(1, 2)
    return torch.addcmul(darkest.sub_(chroma)[:, None], away, chroma[:, None], out=out)


def colour(x: Tensor, factors: Tensor, order: Tensor, chosen: Tensor | None = None) -> Tensor:
    """float 0..1 (B, 3, H, W) with brightness, contrast, saturation and hue adjusted, each sample in its own order.

    factors: float (B, 4), in the order just given; 1, 1, 1, 0 changes nothing. order: int64 (B, 4), what comes first,
    second, ...: permutations of 0..3. chosen: bool (B,), the others stay. All three on the CPU, whence they are drawn.

    The first three are blends: f x + (1 - f) target, the target being black, the mean of the gray image, or that image.
    So a place in the order is one blend of all samples (of those whose turn is hue with f = 1) and the hue of some, which
    lie side by side since samples are sorted by the place of hue.
    """
    turn = order.eq(HUE).int().argmax(1)
    turn = turn if chosen is None else torch.where(chosen, turn, 4)
    rows = turn.argsort(stable=True)
    edges = [0, *turn.bincount(minlength=5).cumsum(0).tolist()]
    order, factors = order[rows], factors[rows]
    keep = torch.where(order == HUE, 1.0, factors.gather(1, order))
    # float (B, 4, 3): weights of the sample, its gray image and the mean of that, at each place
    mix = torch.stack(
        (keep, (1 - keep) * (order == SATURATION), (1 - keep) * (order == CONTRAST)), 2
    )
    mix, turns = mix[: edges[4], :, :, None, None].to(x.device), factors[:, HUE].to(x.device)
    y = x.index_select(0, rows.to(x.device))
    touched = y[: edges[4]]
    for place in range(4):
        light = gray(touched)
        target = torch.addcmul(
            light.mean((1, 2), keepdim=True) * mix[:, place, 2], light, mix[:, place, 1]
        )
        torch.addcmul(target[:, None], touched, mix[:, place, :1], out=touched).clamp_(0, 1)
        part = slice(edges[place], edges[place + 1])
        hue(y[part], turns[part], out=y[part])
    return y.index_select(0, rows.argsort().to(x.device))


def adjustments(
    rows: int, strengths: tuple[float, float, float, float], chance: Chance
) -> tuple[Tensor, Tensor]:
    """Factors float (rows, 4) and order int64 (rows, 4) for `colour`, distributed as torchvision's ColorJitter.

    strengths s of brightness, contrast, saturation (factor uniform in max(0, 1 - s) .. 1 + s) and hue (-s .. s), s <= 1/2.
    """
    low = torch.tensor([max(0.0, 1 - s) for s in strengths[:3]] + [-strengths[3]])
    high = torch.tensor([1 + s for s in strengths[:3]] + [strengths[3]])
    drawn = chance.uniform(rows, 2, 4)
    return low + (high - low) * drawn[:, 0], drawn[:, 1].argsort(dim=1, stable=True)


def chosen(rows: int, share: float, chance: Chance) -> Tensor:
    """bool (rows,) on the CPU, each true with probability `share`."""
    return chance.uniform(rows) < share


def blur(x: Tensor, deviation: Tensor, radius: int) -> Tensor:
    """float (B, 3, H, W), each sample blurred by a Gaussian of its deviation (B,), cut off at `radius`; borders mirror."""
    tap = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-(tap**2) / (2 * deviation.to(x.device)[:, None, None] ** 2), 2)

    def along(side: int) -> Taps:
        reach = (torch.arange(side, device=x.device)[:, None] + tap).abs()
        reach = side - 1 - (side - 1 - reach).abs()
        return reach.expand(len(x), -1, -1), kernel.expand(-1, side, -1)

    return resample(x, along(x.shape[-2]), along(x.shape[-1]))


def pieces(n: int, floats: int, device: torch.device) -> Iterator[slice]:
    """Rows 0..n-1 in parts: on a CPU as many as fit the cache, `floats` being those of a row; elsewhere all at once."""
    step = CACHED // max(1, floats) if device.type == "cpu" else n
    for start in range(0, n, max(1, step)):
        yield slice(start, min(start + step, n))


@dataclass(frozen=True)
class Views:
    """Random views of images for SimCLR: crop, mirror, colours, gray, and a blur where asked for.

    Defaults are those of common CIFAR-10 SimCLR code, BadEncoder's among it. scale=(1, 1), ratio=(1, 1) leaves square
    images whole. size: side of the views, 0 for the images' height. jitter, gray, blur, flip: shares of the samples.
    """

    size: int = 0
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    kernel: str = "bilinear"
    flip: float = 0.5
    colour: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter: float = 0.8
    gray: float = 0.2
    blur: float = 0.0

    def __post_init__(self) -> None:
        if (
            self.size < 0
            or not 0 < self.scale[0] <= self.scale[1] <= 1
            or not 0 < self.ratio[0] <= self.ratio[1]
        ):
            raise ValueError("needs size >= 0, 0 < scale <= 1 and 0 < ratio, both as (least, most)")
        if self.kernel not in KERNELS or min(self.colour) < 0 or self.colour[HUE] > 0.5:
            raise ValueError(
                f"needs a kernel of {', '.join(KERNELS)}, strengths of colours >= 0, that of hue <= 0.5"
            )
        if not all(0 <= share <= 1 for share in (self.flip, self.jitter, self.gray, self.blur)):
            raise ValueError("flip, jitter, gray and blur are shares: 0..1")

    def __call__(self, images: Tensor, chance: Chance, count: int = 2) -> Tensor:
        """uint8 or float 0..1 (B, 3, H, W) -> float32 0..1 (B, count, 3, size, size), `count` views of every image.

        Views of one image lie side by side, so that a rank's rows of the global batch are its own images' views.
        """
        n, size = count * len(images), self.size or images.shape[-2]
        x = images.repeat_interleave(count, 0)
        place = boxes(images.shape[-2], images.shape[-1], n, chance, self.scale, self.ratio)
        factors, order = adjustments(n, self.colour, chance)
        shares = (self.flip, self.jitter, self.gray, self.blur)
        mirrored, adjusted, grayed, blurred = (chosen(n, share, chance) for share in shares)
        deviation = 0.1 + 1.9 * chance.uniform(n)
        out = torch.empty(n, 3, size, size, device=x.device)
        for p in pieces(n, max(x[:1].numel(), out[:1].numel()), x.device):
            y = resized(x[p], place[p], size, self.kernel, mirrored[p])
            y = colour(y, factors[p], order[p], adjusted[p]) if self.jitter else y
            y = (
                torch.lerp(y, gray(y)[:, None], grayed[p].to(y)[:, None, None, None])
                if self.gray
                else y
            )
            rows = blurred[p].nonzero()[:, 0]
            if len(rows):
                some = rows.to(x.device)
                y[some] = blur(y[some], deviation[p][rows], max(1, size // 20))
            out[p] = y
        return out.unflatten(0, (len(images), count))
