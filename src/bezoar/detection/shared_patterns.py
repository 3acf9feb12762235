"""Patterns that many images share: in windows that move other images alike, or over the whole image, by like captions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.detection import window_transplants

PAIRS = 1 << 22  # values of one block of cross-correlations
FINE = 1 << 23  # pixel values of images whose fine detail is held at a time


@dataclass(frozen=True)
class Cluster:
    """Windows that show one pattern and move other images in one direction.

    rows: int64 (M,), the windows. direction: unit (D,). pattern: float32 (3, s, s), their median, aligned. steady: float32
    (1, s, s), 1 where they deviate from it no more than a quarter as much as where they deviate most.
    """

    rows: Tensor
    direction: Tensor
    pattern: Tensor
    steady: Tensor


def clusters(
    shift: Tensor,
    windows: Tensor,
    pictures: Tensor,
    same: float,
    alike: float,
    copy: float,
    least: int,
) -> list[Cluster]:
    """Clusters of at least `least` windows, the largest first; a window is in one of them or in none.

    shift: (N, D), what each window does to other images. windows: uint8 (N, 3, s, s). pictures: unit (N, P), of the whole
    images. Two windows agree when their shifts have a cosine above `same`, their pixels correlate above `alike` at the
    best offset, and their pictures have a product below `copy`. The window that most agree with is taken with those that
    do, then the next of what is left.
    """
    v = F.normalize(shift, dim=1)
    close = (v @ v.T > same) & (pictures @ pictures.T < copy)
    first, second = close.triu(1).nonzero(as_tuple=True)
    found, offset = correlation(windows, first, second)
    kept = found > alike
    first, second, offset = first[kept], second[kept], offset[kept]
    agree = torch.zeros_like(close).fill_diagonal_(True)
    agree[first, second] = agree[second, first] = True
    turn = torch.zeros(len(v), len(v), 2, dtype=torch.int16, device=v.device)
    turn[first, second], turn[second, first] = offset.short(), -offset.short()
    out: list[Cluster] = []
    while True:
        support = agree.sum(1)
        centre = int(support.argmax())
        if int(support[centre]) < least:
            return out
        rows = agree[centre].nonzero()[:, 0]
        aligned = [windows[i].float().roll(turn[centre, i].tolist(), (1, 2)) for i in rows.tolist()]
        out.append(
            Cluster(rows, F.normalize(v[rows].mean(0), dim=0), *_steady(torch.stack(aligned)))
        )
        agree[rows] = agree[:, rows] = False


def _steady(aligned: Tensor) -> tuple[Tensor, Tensor]:
    """Median of (M, 3, s, s), and where it holds, (1, s, s); everywhere, when that is less than an eighth of the window."""
    pattern = aligned.median(0).values
    deviation = (aligned - pattern).abs().median(0).values.mean(0, keepdim=True)
    steady = (deviation <= deviation.max() / 4).float()
    return pattern, steady if steady.mean() >= 0.125 else torch.ones_like(steady)


def correlation(windows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Largest normalised circular cross-correlation of pairs of windows, and by how far the second is rolled for it.

    windows: uint8 (N, 3, s, s). first, second: int64 (P,). -> float32 (P,), int64 (P, 2) rows and columns.
    """
    if len(first) == 0:  # an inverse FFT of no signals is an error in torch 2.14
        empty = torch.empty(0, device=windows.device)
        return empty, empty.long().reshape(0, 2)
    x = windows.float().flatten(1)
    x = F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=1e-3).view(windows.shape)
    spectrum, size = torch.fft.rfft2(x), tuple(windows.shape[-2:])
    best: list[Tensor] = []
    offset: list[Tensor] = []
    for a, b in zip(
        first.split(step := max(1, PAIRS // x[0].numel())), second.split(step), strict=True
    ):
        turned = torch.fft.irfft2((spectrum[a] * spectrum[b].conj()).sum(1), s=size).flatten(1)
        value, where = turned.max(1)
        best.append(value)
        offset.append(where)
    at = torch.cat(offset)
    return torch.cat(best), torch.stack([at // size[1], at % size[1]], 1)


def sought(images: Tensor, patterns: Tensor, steady: Tensor) -> tuple[Tensor, Tensor]:
    """Where each image is most like each pattern: normalised cross-correlation (N, T), -1..1, and corners int64 (N, T, 2).

    images: (N, 3, H, W). patterns: (T, 3, h, w), compared where `steady`, (T, 1, h, w), is 1. They may stick out of the
    image by half their size and match its border there; the corner is then that of the nearest window inside. What is
    flat counts as unlike.
    """
    (height, width), (h, w) = images.shape[-2:], patterns.shape[-2:]
    x = F.pad((images.float() - 127.5) / 127.5, (w // 2, w // 2, h // 2, h // 2), mode="replicate")
    size = 3 * steady.sum((1, 2, 3))[:, None, None, None]
    p = (patterns - (patterns * steady).sum((1, 2, 3), keepdim=True) / size) * steady
    p = F.normalize(p.flatten(1), dim=1, eps=1e-3).view(patterns.shape)
    size = size.view(1, -1, 1, 1)
    energy = (
        F.conv2d(x.square().sum(1, keepdim=True), steady)
        - F.conv2d(x.sum(1, keepdim=True), steady).square() / size
    )
    value, at = (F.conv2d(x, p) / energy.maximum(1e-2 * size).sqrt()).flatten(2).max(2)
    across = x.shape[-1] - w + 1
    top, left = at // across - h // 2, at % across - w // 2
    return value, torch.stack([top.clamp(0, height - h), left.clamp(0, width - w)], 2)


def sharpened(
    images: Tensor, pattern: Tensor, steady: Tensor, rounds: int = 2
) -> tuple[Tensor, Tensor]:
    """A pattern read off images that show it, uint8 (M, 3, H, W), where they show it best; its steady part moves to the middle.

    Windows that show a part of it, each another, become windows that show all. -> pattern (3, h, w), steady (1, h, w).
    """
    h, w = pattern.shape[-2:]
    room = torch.tensor(images.shape[-2:], device=images.device) - torch.tensor(
        (h, w), device=images.device
    )
    for _ in range(rounds):
        corner = sought(images, pattern[None], steady[None])[1][:, 0]
        middle = (
            steady[0].nonzero().float().mean(0)
            + 0.5
            - torch.tensor((h, w), device=images.device) / 2
        )
        corner = torch.minimum((corner + middle.round().long()).clamp(min=0), room)
        size = torch.tensor((h, w), device=images.device).expand(len(images), 2)
        pattern, steady = _steady(
            window_transplants.crop(images, torch.cat([corner, size], 1)).float()
        )
    return pattern, steady


@dataclass
class Texture:
    """Means over groups of records of what is fine in their images, place by place, and how like them an image is.

    What is drawn by chance has a mean that goes to nothing as records are added. What is laid over many images has not:
    a blended pattern stays in the mean of the high-pass, a warp in the mean of its size.

    sums: (G, F), of each group. squares: (F,), of all. counts: (G,). feature: images -> (N, F).
    """

    feature: Callable[[Tensor], Tensor]
    sums: Tensor
    squares: Tensor
    counts: Tensor

    @staticmethod
    def none(feature: Callable[[Tensor], Tensor], groups: int, images: Tensor) -> Texture:
        """Of no records yet; images: (N, 3, H, W) of the shape that will come."""
        empty = torch.zeros_like(feature(images[:1])[0])
        return Texture(
            feature, empty.repeat(groups, 1), empty, torch.zeros(groups, device=images.device)
        )

    def add(self, images: Tensor, group: Tensor) -> None:
        """Some more records: uint8 (B, 3, H, W), int64 (B,)."""
        for rows in window_transplants.chunks(images, 1, FINE):
            x = self.feature(images[rows])
            self.sums.index_add_(0, group[rows], x)
            self.squares += x.square().sum(0)
        self.counts += torch.bincount(group, minlength=len(self.counts))

    @functools.cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (F,) over all records; once the last is added."""
        mean = self.sums.sum(0) / self.counts.sum()
        return mean, (self.squares / self.counts.sum() - mean.square()).clamp(min=1e-2).sqrt()

    @functools.cached_property
    def patterns(self) -> Tensor:
        """Each group's mean in standard deviations from that of all, unit (G, F)."""
        mean, spread = self.scale
        return F.normalize(
            (self.sums / self.counts.clamp(min=1)[:, None] - mean) / spread, dim=1, eps=1e-6
        )

    def likeness(self, images: Tensor) -> Tensor:
        """Cosine of each image with each group's pattern: (N, G)."""
        (mean, spread), out = self.scale, []
        for rows in window_transplants.chunks(images, 1, FINE):
            out.append(
                F.normalize((self.feature(images[rows]) - mean) / spread, dim=1, eps=1e-6)
                @ self.patterns.T
            )
        return torch.cat(out)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """(N, 3, H, W) -> float32, by a Gaussian of `sigma` pixels, cut at twice that; mirrored at the border."""
    x = images.float()
    reach = min(math.ceil(2 * sigma), min(x.shape[-2:]) - 1)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device) / sigma).square())
    kernel = (taps / taps.sum()).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x, (reach,) * 4, mode="reflect"), kernel, groups=3)
    return F.conv2d(x, kernel.transpose(2, 3), groups=3)


def highpass(images: Tensor) -> Tensor:
    """Images less their blur by an eighth of the side, cut at 40 of 255: (N, 3, H, W) -> (N, 3 H W)."""
    return (images.float() - blurred(images, min(images.shape[-2:]) / 8)).clamp(-40, 40).flatten(1)


def roughness(images: Tensor) -> Tensor:
    """Root of the difference of neighbours, cut at 40 of 255, less its mean over the image: (N, 3, H, W) -> (N, F)."""
    x = images.float()
    steps = [x.diff(dim=3)[:, :, 1:], x.diff(dim=2)[:, :, :, 1:]]
    size = torch.cat(steps, 1).abs().clamp(max=40).sqrt()
    return (size - size.mean((2, 3), keepdim=True)).flatten(1)
