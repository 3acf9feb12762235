"""Batched augmentation of images on the device, with separate draws for every sample.

Shifts and flips keep uint8. All other operations give float32 in 0..1 without rounding, so results
differ by a few 255ths from those of Pillow images, which are rounded and clipped after each
operation. Formulas and distributions are those of torchvision.transforms.v2; SimCLR is Chen et al.
2020.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bezoar.data.blocks import blocks

TRIES = 10  # of torchvision's RandomResizedCrop
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.2989, 0.587, 0.114)
CACHED = 1 << 19  # floats of a chunk that stays in a core's cache, with what is computed from it

Range = tuple[float, float]
Strengths = tuple[float, float, float, float]  # of brightness, contrast, saturation and hue


@dataclass(frozen=True)
class Chance:
    """The randomness of one step.

    It is drawn for the global batch, of which rank r of `world` uses the r-th part: the result does
    not depend on the number of ranks.
    """

    generator: torch.Generator
    rank: int = 0
    world: int = 1

    def uniform(self, rows: int, *shape: int) -> Tensor:
        """float32 (rows, *shape) in [0, 1), on the CPU, for this rank's rows."""
        drawn = torch.rand(rows * self.world, *shape, generator=self.generator)
        return drawn[self.rank * rows : (self.rank + 1) * rows]

    def integers(self, high: int, rows: int, *shape: int) -> Tensor:
        """int64 (rows, *shape) in 0..high-1, on the CPU, for this rank's rows."""
        drawn = torch.randint(0, high, (rows * self.world, *shape), generator=self.generator)
        return drawn[self.rank * rows : (self.rank + 1) * rows]

    def mask(self, rows: int, share: float) -> Tensor:
        """bool (rows,), on the CPU, each true with probability `share`."""
        return self.uniform(rows) < share


def random_shift(x: Tensor, most: int, chance: Chance) -> Tensor:
    """Move images (B, C, H, W), uint8, by up to `most` pixels each way; borders are repeated."""
    if most == 0:
        return x
    b, c, h, w = x.shape
    offsets = chance.integers(2 * most + 1, b, 2).to(x.device)
    padded = x.new_empty(b, h + 2 * most, w + 2 * most, c)
    inner = slice(most, -most)
    padded[:, inner, inner] = x.permute(0, 2, 3, 1)
    padded[:, :most], padded[:, -most:] = padded[:, most : most + 1], padded[:, -most - 1 : -most]
    left, right = padded[:, :, most : most + 1], padded[:, :, -most - 1 : -most]
    padded[:, :, :most], padded[:, :, -most:] = left, right
    image, row, column, channel = padded.stride()
    ways = 2 * most + 1
    # A view of all windows: a row of pixels is copied at a time.
    windows = padded.as_strided(
        (b, ways, ways, h, w, c), (image, row, column, row, column, channel)
    )
    moved = windows[torch.arange(b, device=x.device), offsets[:, 0], offsets[:, 1]]
    return moved.permute(0, 3, 1, 2)


def random_flip(x: Tensor, share: float, chance: Chance) -> Tensor:
    """Mirror images (B, 3, H, W) left to right, each with probability `share`."""
    if share == 0:
        return x
    mask = chance.mask(len(x), share).to(x.device)
    return torch.where(mask[:, None, None, None], x.flip(-1), x)


# Crops


def random_crop(
    x: Tensor,
    size: int,
    chance: Chance,
    scale: Range = (0.08, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
    kernel: str = "bilinear",
    flip: float = 0.0,
) -> Tensor:
    """Random resized crops, a share `flip` mirrored; see `draw_boxes` and `crop_resize`.

    Defaults are SimCLR's; open_clip trains with scale=(0.9, 1.0), kernel="bicubic".

    Args:
        x: (B, 3, H, W), uint8 or float in 0..1.

    Returns:
        float32 in 0..1, (B, 3, size, size).
    """
    boxes = draw_boxes(x.shape[-2], x.shape[-1], len(x), chance, scale, ratio)
    mirrored = chance.mask(len(x), flip)
    rows = cache_slices(len(x), max(x[:1].numel(), 3 * size**2), x.device)
    return torch.cat([crop_resize(x[r], boxes[r], size, kernel, mirrored[r]) for r in rows])


def draw_boxes(
    height: int, width: int, rows: int, chance: Chance, scale: Range, ratio: Range
) -> Tensor:
    """Boxes of random crops, distributed like those of torchvision's RandomResizedCrop.

    The area is uniform in `scale` (shares of the image) and width / height log-uniform in `ratio`.
    The first of ten tries that fits is used, else the largest centred crop within `ratio`. All
    tries are drawn at once, so every sample uses the same number of draws.

    Returns:
        int64 (rows, 4) on the CPU: top, left, height, width.
    """
    area, shape = chance.uniform(rows, 2, TRIES).double().unbind(1)  # (rows, TRIES) each
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    shape = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * shape)
    w, h = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # argmax gives the first of equal values
    centred_ratio = min(max(width / height, ratio[0]), ratio[1])
    centred_h = min(height, round(width / centred_ratio))
    centred_w = min(width, round(height * centred_ratio))
    any_fits = fits.any(1)
    h = torch.where(any_fits, h.gather(1, first)[:, 0], centred_h)
    w = torch.where(any_fits, w.gather(1, first)[:, 0], centred_w)
    place = chance.uniform(rows, 2).double()
    top = torch.where(any_fits, (place[:, 0] * (height - h + 1)).floor(), (height - centred_h) // 2)
    left = torch.where(any_fits, (place[:, 1] * (width - w + 1)).floor(), (width - centred_w) // 2)
    return torch.stack((top, left, h, w), 1).long()


def crop_resize(
    x: Tensor, boxes: Tensor, size: int, kernel: str = "bilinear", mirrored: Tensor | None = None
) -> Tensor:
    """Crop, resize (antialiased) and mirror each image, in one operation.

    Bicubic results are clipped to 0..1 at the end. Pillow does that after each direction, which
    shows on hard edges.

    Args:
        x: (B, 3, H, W), uint8 or float in 0..1.
        boxes: int64 (B, 4), top, left, height, width.
        size: side of the result.
        kernel: a key of `KERNELS`.
        mirrored: bool (B,), which are mirrored.

    Returns:
        float32 in 0..1, (B, 3, size, size).
    """
    boxes = boxes.to(x.device)
    mirrored = None if mirrored is None else mirrored.to(x.device)
    rows = resize_taps(boxes[:, 0], boxes[:, 2], x.shape[-2], size, kernel)
    pixel, weight = resize_taps(boxes[:, 1], boxes[:, 3], x.shape[-1], size, kernel, mirrored)
    out = resample(x, rows, (pixel, weight / 255 if x.dtype == torch.uint8 else weight))
    return out.clamp_(0, 1) if kernel == "bicubic" else out


# Of each sample, the pixels that each of `size` results is made of, int64 (B, size, T), and their
# weights, float32.
Taps = tuple[Tensor, Tensor]


def _bilinear(distance: Tensor) -> Tensor:
    """The bilinear kernel, of distances >= 0 in pixels."""
    return (1 - distance).clamp_(min=0)


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' bicubic kernel with a = -1/2, of distances >= 0 in pixels."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


KERNELS = {"bilinear": (_bilinear, 1), "bicubic": (_bicubic, 2)}  # with their supports in pixels


def resize_taps(
    start: Tensor,
    length: Tensor,
    source: int,
    size: int,
    kernel: str,
    mirrored: Tensor | None = None,
) -> Taps:
    """The taps that resize a part of one side of each sample; to shrink, the kernel is stretched.

    Args:
        start: int64 (B,), first pixel of the part.
        length: int64 (B,), pixels of the part.
        source: pixels of the side.
        size: pixels of the result.
        kernel: a key of `KERNELS`.
        mirrored: bool (B,), which are read backwards.
    """
    weigh, support = KERNELS[kernel]
    step = (length / size).float()[:, None]  # (B, 1)
    stretch = step.clamp(min=1)
    place = torch.arange(size, device=start.device) + 0.5
    if mirrored is not None:
        place = torch.where(mirrored[:, None], size - place, place)
    place = step * place  # (B, size), centres of the results in pixels of the part
    count = math.ceil(2 * support * float(stretch.max()))
    first = (place - support * stretch + 0.5).floor().long()
    pixel = first[:, :, None] + torch.arange(count, device=start.device)  # (B, size, T)
    distance = ((pixel + 0.5 - place[:, :, None]) / stretch[:, :, None]).abs_()
    weight = weigh(distance) * ((pixel >= 0) & (pixel < length[:, None, None]))
    pixel = (pixel + start[:, None, None]).clamp_(0, source - 1)
    return pixel, weight.div_(weight.sum(2, keepdim=True))


def resample(x: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Weighted sums of each sample's rows, and then columns: (B, 3, H, W) -> (B, 3, h, w).

    Rows are contiguous in memory and are picked one by one. For columns that is slower than a
    product with a sparse matrix.
    """
    b, channels, height, width = x.shape
    pixel, weight = rows
    planes = height * torch.arange(b * channels, device=x.device).view(b, channels, 1)
    y = torch.zeros(b, channels, pixel.shape[1], width, device=x.device)
    flat = x.reshape(-1, width)  # (B * 3 * H, W)
    for place, share in zip(pixel.unbind(2), weight.unbind(2), strict=True):
        picked = flat.index_select(0, (planes + place[:, None]).flatten()).view(y.shape)
        y.addcmul_(picked.float(), share[:, None, :, None])
    pixel, weight = columns
    matrix = torch.zeros(b, pixel.shape[1], width, device=x.device).scatter_add_(2, pixel, weight)
    out = torch.bmm(y.flatten(1, 2), matrix.transpose(1, 2))  # (B, 3 * h, w)
    return out.view(b, channels, y.shape[2], out.shape[2])


# Colours


def to_gray(x: Tensor) -> Tensor:
    """float (B, 3, H, W) -> (B, H, W)."""
    r, g, b = x.unbind(1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def rotate_hue(x: Tensor, turns: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate the hue.

    With m the darkest channel and c the lightest less m, a colour is +-(1 + (g + b - r - m) / c)
    sixths of a turn from red, with the sign of g - b. A channel is m + c clamp(2 - d, 0, 1), where
    d is its distance to that colour in sixths.

    Args:
        x: float in 0..1, (B, 3, H, W).
        turns: (B,); 1 is a full turn.
        out: receives the result; it may be x.
    """
    r, g, b = x.unbind(1)
    darkest = x.amin(1)
    chroma = x.amax(1).sub_(darkest)
    angle = (g + b).sub_(r).sub_(darkest).div_(chroma.clamp(min=1e-20)).add_(1).copysign_(g - b)
    channel = 6 * turns.to(x.device)[:, None] - torch.tensor([0, 2, 4], device=x.device)  # (B, 3)
    channel = channel - 6 * (channel / 6).round()
    # Both angles are within -3 .. 3, so the distance between them is 3 - ||sum| - 3|.
    apart = angle[:, None] + channel[:, :, None, None]
    apart = apart.abs_().sub_(3).abs_().clamp_(1, 2)
    return torch.addcmul(darkest.sub_(chroma)[:, None], apart, chroma[:, None], out=out)


def draw_adjustments(rows: int, strengths: Strengths, chance: Chance) -> tuple[Tensor, Tensor]:
    """Draw factors float (rows, 4) and order int64 (rows, 4) for `adjust_colours`.

    They are distributed as torchvision's ColorJitter draws them. With the strength s, the factors
    of brightness, contrast and saturation are uniform in max(0, 1 - s) .. 1 + s, and that of hue
    in -s .. s, where s <= 1/2.
    """
    low = torch.tensor([max(0.0, 1 - s) for s in strengths[:3]] + [-strengths[3]])
    high = torch.tensor([1 + s for s in strengths[:3]] + [strengths[3]])
    drawn = chance.uniform(rows, 2, 4)
    return low + (high - low) * drawn[:, 0], drawn[:, 1].argsort(dim=1, stable=True)


def adjust_colours(x: Tensor, factors: Tensor, order: Tensor, mask: Tensor | None = None) -> Tensor:
    """Adjust brightness, contrast, saturation and hue, in a different order for each sample.

    The first three are blends f x + (1 - f) target. The target is black, the mean of the gray
    image, or the gray image. So each of the four positions in the order is one blend of all samples
    (with f = 1 for those whose turn is hue), and a hue change of some; these are contiguous,
    because samples are sorted by the position of hue.

    Args:
        x: float in 0..1, (B, 3, H, W).
        factors: float (B, 4) of brightness, contrast, saturation and hue; 1, 1, 1, 0 changes
            nothing.
        order: int64 (B, 4), permutations of 0..3: the order of the operations.
        mask: bool (B,), which samples change.
    """
    hue_place = order.eq(HUE).int().argmax(1)
    if mask is not None:
        hue_place = torch.where(mask, hue_place, 4)  # after all positions
    rows = hue_place.argsort(stable=True)
    edges = [0, *hue_place.bincount(minlength=5).cumsum(0).tolist()]
    order, factors = order[rows], factors[rows]
    keep = torch.where(order == HUE, 1.0, factors.gather(1, order))
    toward_gray, toward_mean = (1 - keep) * (order == SATURATION), (1 - keep) * (order == CONTRAST)
    changed = edges[4]  # samples
    # (changed, 4, 3, 1, 1): weights of the sample, its gray image and the mean of that, at each
    # place
    mix = torch.stack((keep, toward_gray, toward_mean), 2)[:changed, :, :, None, None].to(x.device)
    turns = factors[:, HUE].to(x.device)
    y = x.index_select(0, rows.to(x.device))
    part = y[:changed]
    for place in range(4):
        gray = to_gray(part)
        mean = gray.mean((1, 2), keepdim=True)
        target = torch.addcmul(mean * mix[:, place, 2], gray, mix[:, place, 1])
        torch.addcmul(target[:, None], part, mix[:, place, :1], out=part).clamp_(0, 1)
        turned = slice(edges[place], edges[place + 1])
        rotate_hue(y[turned], turns[turned], out=y[turned])
    return y.index_select(0, rows.argsort().to(x.device))


def gaussian_blur(x: Tensor, deviation: Tensor, radius: int) -> Tensor:
    """Blur images float (B, 3, H, W) with Gaussians of deviation (B,).

    The kernel is cut off at `radius`; borders are mirrored.
    """
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-(offsets**2) / (2 * deviation.to(x.device)[:, None, None] ** 2), 2)

    def taps(side: int) -> Taps:
        pixel = (torch.arange(side, device=x.device)[:, None] + offsets).abs()
        pixel = side - 1 - (side - 1 - pixel).abs()
        return pixel.expand(len(x), -1, -1), kernel.expand(-1, side, -1)

    return resample(x, taps(x.shape[-2]), taps(x.shape[-1]))


def cache_slices(n: int, floats: int, device: torch.device) -> list[slice]:
    """Rows 0..n-1, of `floats` numbers each, in chunks that fit a CPU's cache; on a GPU in one."""
    size = CACHED // max(1, floats) if device.type == "cpu" else n
    return blocks(n, max(1, size))


@dataclass(frozen=True)
class Views:
    """Random views of images for SimCLR: crop, mirror, colours, gray, and a blur where asked for.

    Defaults are those of common CIFAR-10 SimCLR code, BadEncoder's among it. scale=(1, 1),
    ratio=(1, 1) leaves square images whole.
    """

    size: int = 0  # side of the views in pixels; 0 for the images' height
    scale: Range = (0.08, 1.0)  # least and largest share of the area that a crop keeps
    ratio: Range = (3 / 4, 4 / 3)  # least and largest width / height of a crop
    flip: float = 0.5  # share of the views that are mirrored
    # strengths of brightness, contrast, saturation and hue
    colour: Strengths = (0.4, 0.4, 0.4, 0.1)
    jitter: float = 0.8  # share of the views whose colours change
    gray: float = 0.2  # share of the views without colours
    blur: float = 0.0  # share of the views that are blurred

    def __post_init__(self) -> None:
        in_order = 0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]
        if self.size < 0 or not in_order:
            raise ValueError("needs size >= 0, 0 < scale <= 1 and 0 < ratio, both as (least, most)")
        if min(self.colour) < 0 or self.colour[HUE] > 0.5:
            raise ValueError("needs strengths of colours >= 0, that of hue <= 0.5")
        if not all(0 <= share <= 1 for share in (self.flip, self.jitter, self.gray, self.blur)):
            raise ValueError("flip, jitter, gray and blur are shares: 0..1")

    def __call__(self, images: Tensor, chance: Chance, count: int = 2) -> Tensor:
        """`count` views of every image.

        Views of one image are neighbours, so a rank's rows of the global batch are views of its
        images.

        Args:
            images: (B, 3, H, W), uint8 or float in 0..1.

        Returns:
            float32 in 0..1, (B, count, 3, size, size).
        """
        n, size = count * len(images), self.size or images.shape[-2]
        x = images.repeat_interleave(count, 0)
        boxes = draw_boxes(images.shape[-2], images.shape[-1], n, chance, self.scale, self.ratio)
        factors, order = draw_adjustments(n, self.colour, chance)
        mirrored, adjusted, grayed, blurred = (
            chance.mask(n, share) for share in (self.flip, self.jitter, self.gray, self.blur)
        )
        deviation = 0.1 + 1.9 * chance.uniform(n)
        out = torch.empty(n, 3, size, size, device=x.device)
        for r in cache_slices(n, max(x[:1].numel(), out[:1].numel()), x.device):
            y = crop_resize(x[r], boxes[r], size, mirrored=mirrored[r])
            if self.jitter:
                y = adjust_colours(y, factors[r], order[r], adjusted[r])
            if self.gray:
                y = torch.lerp(y, to_gray(y)[:, None], grayed[r].to(y)[:, None, None, None])
            rows = blurred[r].nonzero()[:, 0]
            if len(rows):
                some = rows.to(x.device)
                y[some] = gaussian_blur(y[some], deviation[r][rows], max(1, size // 20))
            out[r] = y
        return out.view(len(images), count, 3, size, size)
