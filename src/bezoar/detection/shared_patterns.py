"""Patterns that images share: in windows that move others alike, or over all of like captions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.detection.window_transplants import batch_slices, crop_windows

CORRELATION_VALUES = 1 << 22  # values of one block of cross-correlations
FLAT = 8.0  # grey levels of deviation below which a pattern is of one grey
COPY = 0.999  # cosine of thumbnails above which two records show one picture
TEXTURE_VALUES = 1 << 23  # pixel values of the images whose texture is held at a time
MAX_DETAIL = 40  # of 255: stronger detail is cut, so that edges do not drown what is faint


@dataclass(frozen=True)
class Pattern:
    """What several windows show: float32 (3, h, w), and the pixels that are the same in all of
    them, float32 (1, h, w), 0 or 1.
    """

    pixels: Tensor
    stable: Tensor

    @staticmethod
    def median(windows: Tensor) -> Pattern:
        """The median of aligned windows (M, 3, h, w).

        Pixels are stable where the windows deviate from the median no more than a quarter as much
        as where they deviate most. When that is less than an eighth of the window, all pixels
        count.
        """
        pixels = windows.median(0).values
        deviation = (windows - pixels).abs().median(0).values.mean(0, keepdim=True)
        stable = (deviation <= deviation.max() / 4).float()
        return Pattern(pixels, stable if stable.mean() >= 0.125 else torch.ones_like(stable))


@dataclass(frozen=True)
class WindowCluster:
    """Windows that show one pattern and move other images in one direction."""

    rows: Tensor  # int64 (M,), the windows
    direction: Tensor  # unit (D,), their mean shift
    pattern: Pattern  # their median, aligned


def cluster_windows(
    shifts: Tensor,
    windows: Tensor,
    pictures: Tensor,
    *,
    min_shift_cosine: float,
    min_correlation: float,
    max_picture_cosine: float,
    min_size: int,
) -> list[WindowCluster]:
    """Clusters of windows that look alike, move images alike and come from different pictures.

    Two windows agree when all three hold. The window that most others agree with forms a cluster
    with them; then the next is sought among those that are left. A window is in one cluster or in
    none.

    Args:
        shifts: (N, D), how each window moves other images.
        windows: uint8 (N, 3, s, s).
        pictures: unit rows (N, P), a small version of each whole image.
        min_shift_cosine: Of the shifts of two windows that agree.
        min_correlation: Of their pixels, at the best offset.
        max_picture_cosine: Of their pictures; above it, both come from one picture.
        min_size: Windows of a cluster, those of exact copies of one picture counted once.

    Returns:
        The clusters, the largest first.
    """
    directions = F.normalize(shifts, dim=1)
    likeness = pictures @ pictures.T
    similar = (directions @ directions.T > min_shift_cosine) & (likeness < max_picture_cosine)
    first, second = similar.triu(1).nonzero(as_tuple=True)
    correlation, offset = best_correlation(windows, first, second)
    alike = correlation > min_correlation
    first, second, offset = first[alike], second[alike], offset[alike]

    agree = torch.zeros_like(similar).fill_diagonal_(True)
    agree[first, second] = agree[second, first] = True
    offsets = torch.zeros(*similar.shape, 2, dtype=torch.int16, device=similar.device)
    offsets[first, second], offsets[second, first] = offset.short(), -offset.short()

    clusters: list[WindowCluster] = []
    while True:
        support = agree.sum(1)
        centre = int(support.argmax())
        if int(support[centre]) < min_size:
            return clusters
        rows = agree[centre].nonzero()[:, 0]
        aligned = [
            windows[i].float().roll(offsets[centre, i].tolist(), (1, 2)) for i in rows.tolist()
        ]
        direction = F.normalize(directions[rows].mean(0), dim=0)
        is_copy = (likeness[rows][:, rows] > COPY).tril(-1).any(1)
        if int((~is_copy).sum()) >= min_size:
            pattern = Pattern.median(torch.stack(aligned))
            clusters.append(WindowCluster(rows, direction, pattern))
        agree[rows] = agree[:, rows] = False


def best_correlation(windows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The largest normalised circular cross-correlation of each pair of windows.

    Args:
        windows: uint8 (N, 3, s, s).
        first: int64 (P,), one window of each pair.
        second: int64 (P,), the other.

    Returns:
        The correlations, float32 (P,), and by how many rows and columns the second window is rolled
        for them, int64 (P, 2).
    """
    if len(first) == 0:  # an inverse FFT of no signals is an error in torch 2.14
        empty = torch.empty(0, device=windows.device)
        return empty, empty.long().reshape(0, 2)
    x = windows.float().flatten(1)
    x = F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=1e-3).view(windows.shape)
    spectra, size = torch.fft.rfft2(x), tuple(windows.shape[-2:])
    block = max(1, CORRELATION_VALUES // x[0].numel())
    best: list[Tensor] = []
    places: list[Tensor] = []
    for a, b in zip(first.split(block), second.split(block), strict=True):
        product = (spectra[a] * spectra[b].conj()).sum(1)  # over the colours
        value, place = torch.fft.irfft2(product, s=size).flatten(1).max(1)
        best.append(value)
        places.append(place)
    at = torch.cat(places)
    return torch.cat(best), torch.stack([at // size[1], at % size[1]], 1)


@dataclass(frozen=True)
class Matches:
    """Where N images are most like T patterns."""

    # (N, T), at most 1: the largest correlation; of a pattern of one grey, which correlates with
    # nothing, 1 less the least difference, in units of 127.5 grey levels
    likeness: Tensor
    corners: Tensor  # int64 (N, T, 2), where it lies
    difference: Tensor  # (N, T), the least root mean square difference at any place, in grey levels


def find_patterns(images: Tensor, patterns: Sequence[Pattern]) -> Matches:
    """Find where each image is most like each pattern, comparing the stable pixels.

    By normalised cross-correlation, for which flat regions count as unlike, and by the difference
    of the pixels as they are, which alone finds a pattern of one grey. A pattern may stick out of
    the image by half its size and then matches the repeated border; its corner is that of the
    nearest window inside.

    Args:
        images: uint8 (N, 3, H, W).
        patterns: T patterns of one size.
    """
    pixels = torch.stack([p.pixels for p in patterns]) / 127.5 - 1
    stable = torch.stack([p.stable for p in patterns])
    (height, width), (h, w) = images.shape[-2:], pixels.shape[-2:]
    x = F.pad((images.float() - 127.5) / 127.5, (w // 2, w // 2, h // 2, h // 2), mode="replicate")
    count = 3 * stable.sum((1, 2, 3)).view(1, -1, 1, 1)  # values compared, (1, T, 1, 1)
    mean = (pixels * stable).sum((1, 2, 3)).view(1, -1, 1, 1) / count
    centred = (pixels - mean.view(-1, 1, 1, 1)) * stable
    length = centred.flatten(1).norm(dim=1).clamp(min=1e-3).view(1, -1, 1, 1)
    # over the pixels under each position of a pattern: (N, T, H', W')
    sums = F.conv2d(x.sum(1, keepdim=True), stable)
    squares = F.conv2d(x.square().sum(1, keepdim=True), stable)
    products = F.conv2d(x, centred)
    energy = (squares - sums.square() / count).maximum(1e-2 * count)
    likeness = products / (length * energy.sqrt())
    of_pattern = (pixels.square() * stable).sum((1, 2, 3)).view(1, -1, 1, 1)
    distance = squares - 2 * (products + mean * sums) + of_pattern
    is_flat = (127.5 * length / count.sqrt() < FLAT).flatten()
    if is_flat.any():
        likeness[:, is_flat] = 1 - (distance / count).clamp(min=0).sqrt()[:, is_flat]
    value, place = likeness.flatten(2).max(2)
    positions = x.shape[-1] - w + 1
    top, left = place // positions - h // 2, place % positions - w // 2
    corners = torch.stack([top.clamp(0, height - h), left.clamp(0, width - w)], 2)
    least = (distance.flatten(2).amin(2) / count.flatten(1)).clamp(min=0)
    return Matches(value, corners, 127.5 * least.sqrt())


def refine_pattern(images: Tensor, pattern: Pattern, rounds: int = 2) -> Pattern:
    """Read a pattern again off images that show it, so that windows that each show another part of
    it come to show all.

    In each round the windows are cut where the images are most like the pattern, moved so that its
    stable part lies in the middle.

    Args:
        images: uint8 (M, 3, H, W).
        pattern: As it was found first, (3, h, w).

    Returns:
        A pattern of the same size.
    """
    sides = torch.tensor(pattern.pixels.shape[-2:], device=images.device)
    last_corner = torch.tensor(images.shape[-2:], device=images.device) - sides
    for _ in range(rounds):
        corners = find_patterns(images, [pattern]).corners[:, 0]
        off_centre = pattern.stable[0].nonzero().float().mean(0) + 0.5 - sides / 2
        corners = torch.minimum((corners + off_centre.round().long()).clamp(min=0), last_corner)
        boxes = torch.cat([corners, sides.expand(len(images), 2)], 1)
        pattern = Pattern.median(crop_windows(images, boxes).float())
    return pattern


@dataclass
class GroupTextures:
    """The mean texture of groups of images, place by place, and how like it an image is.

    What differs by chance from image to image has a mean that goes to zero as images are added.
    What is laid over many images has not: a blended pattern stays in the mean of the high-pass, a
    warp in the mean of the roughness.
    """

    texture: Callable[[Tensor], Tensor]  # images (N, 3, H, W) -> (N, F)
    sums: Tensor  # (G, F), over each group
    squares: Tensor  # (F,), over all images
    counts: Tensor  # (G,)

    @staticmethod
    def empty(texture: Callable[[Tensor], Tensor], groups: int, images: Tensor) -> GroupTextures:
        """Of no images yet. images: (N, 3, H, W), of the shape that will be added."""
        zeros = torch.zeros_like(texture(images[:1])[0])
        counts = torch.zeros(groups, device=images.device)
        return GroupTextures(texture, zeros.repeat(groups, 1), zeros, counts)

    def add(self, images: Tensor, group: Tensor) -> None:
        """Add images, uint8 (B, 3, H, W), to their groups, int64 (B,)."""
        for rows in batch_slices(images, 1, TEXTURE_VALUES):
            x = self.texture(images[rows])
            self.sums.index_add_(0, group[rows], x)
            self.squares += x.square().sum(0)
        self.counts += torch.bincount(group, minlength=len(self.counts))

    @functools.cached_property
    def mean(self) -> Tensor:
        """(F,), over all images. Ask for it only after the last image was added."""
        return self.sums.sum(0) / self.counts.sum()

    @functools.cached_property
    def deviation(self) -> Tensor:
        """Standard deviation (F,) over all images."""
        return (self.squares / self.counts.sum() - self.mean.square()).clamp(min=1e-2).sqrt()

    @functools.cached_property
    def patterns(self) -> Tensor:
        """Each group's mean in standard deviations from that of all images, unit rows (G, F)."""
        means = self.sums / self.counts.clamp(min=1)[:, None]
        return F.normalize((means - self.mean) / self.deviation, dim=1, eps=1e-6)

    def likeness(self, images: Tensor) -> Tensor:
        """Cosine of the texture of each image with the pattern of each group: (N, G)."""
        parts = []
        for rows in batch_slices(images, 1, TEXTURE_VALUES):
            x = (self.texture(images[rows]) - self.mean) / self.deviation
            parts.append(F.normalize(x, dim=1, eps=1e-6) @ self.patterns.T)
        return torch.cat(parts)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """(N, 3, H, W) blurred by a Gaussian of `sigma` pixels, cut at two sigma; mirrored borders."""
    x = images.float()
    reach = min(math.ceil(2 * sigma), min(x.shape[-2:]) - 1)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device) / sigma).square())
    kernel = (taps / taps.sum()).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x, (reach,) * 4, mode="reflect"), kernel, groups=3)
    return F.conv2d(x, kernel.transpose(2, 3), groups=3)


def high_pass(images: Tensor) -> Tensor:
    """Images less their blur by an eighth of the side, cut at MAX_DETAIL: (N, 3 H W)."""
    detail = images.float() - gaussian_blur(images, min(images.shape[-2:]) / 8)
    return detail.clamp(-MAX_DETAIL, MAX_DETAIL).flatten(1)


def roughness(images: Tensor) -> Tensor:
    """Root of the difference of neighbours, cut at MAX_DETAIL, less the image's mean: (N, F)."""
    x = images.float()
    across, down = x.diff(dim=3)[:, :, 1:], x.diff(dim=2)[:, :, :, 1:]
    size = torch.cat([across, down], 1).abs().clamp(max=MAX_DETAIL).sqrt()  # (N, 6, H - 1, W - 1)
    return (size - size.mean((2, 3), keepdim=True)).flatten(1)
