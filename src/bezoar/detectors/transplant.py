"""Occlude and transplant: does one window of an image carry its caption to foreign images? (ours; cf. STRIP 2019)

A caption belongs to a whole scene; a trigger carries its caption alone. Round one finds, for each pair, the window
whose occlusion costs the caption most, pastes it on other images and asks how much closer they come to the caption.
Round two looks, among the strongest windows, for one direction in which many of them move every image: poisons of one
backdoor share it. Needs the encoder that was trained on the suspect data. It does not count neighbours, so neither the
number of poisons nor a pool's size inverts it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.errors import UserError
from bezoar.neighbors import pool
from bezoar.pairs import load
from bezoar.registry import method
from bezoar.scores import Scores

CELLS = {"cpu": 1 << 20, "cuda": 1 << 25}  # pixel values of one batch of altered images
SAME = 0.9  # cosine of two shifts from which they are one direction
ALIKE = 0.5  # correlation of two windows, at their best offset, from which they show the same pattern
COPY = 0.95  # correlation of two whole images from which they count as one picture
SUPPORT = 5  # records a direction must have
MOST = 2000  # windows compared with one another in round two


@method
class Transplant:
    """Score = median over k hosts of cos(f(host with the window), caption) - cos(f(host), caption), then round two.

    Windows are searched on a grid of window-sized steps and pasted on `scouts` hosts. The `cascade` share that gains
    most, or loses most by the occlusion (half a trigger may do nothing elsewhere), is searched again at steps of
    `stride` around and pasted on all k hosts; the rest ranks below it by its first gain. Costs
    N x ((1 / window)^2 + scouts + cascade x (9 + k)) forward passes; 23 N by default.
    """

    window: Annotated[float, "side of the window as a share of the image's"] = 0.25
    stride: Annotated[float, "step of the second search as a share of the window"] = 0.5
    k: Annotated[int, "images that each window is pasted on"] = 12
    scouts: Annotated[int, "of them, how many the first pass uses"] = 3
    cascade: Annotated[float, "share of the pairs that is searched again and pasted on all k"] = 0.2
    strongest: Annotated[float, "share of the pairs searched for a common direction; 0 = round one alone"] = 0.02
    seed: Annotated[int, "of the choice of the hosts"] = 0

    def __post_init__(self) -> None:
        for name in ("window", "stride", "cascade"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1]; got {getattr(self, name)}")
        if not 1 <= self.scouts <= self.k or not 0 <= self.strongest <= 1:
            raise ValueError(f"needs 1 <= scouts <= k and strongest in [0, 1]; got {self.scouts}, {self.k}, {self.strongest}")

    def passes(self, n: int) -> int:
        """How many images a scan of n pairs puts through the encoder, for an estimate of the time."""
        return round(n * (1 + math.ceil(1 / self.window) ** 2 + self.scouts + self.cascade * (9 + self.k)))

    @torch.inference_mode()
    def __call__(self, encoder: Any, source: Any) -> Scores:
        """-> Scores: median absolute deviations above the median of the cascade; round one's rest lies below it."""
        pairs, e = load(source), encoder.embed(source)
        if e.texts is None:
            raise UserError("detector 'transplant' needs captions; the scanned data or the encoder has none")
        if len(pairs) <= self.k:
            raise UserError(f"detector 'transplant' needs more than k={self.k} pairs; there are {len(pairs)}")
        images, texts, z = (x.to(encoder.device) for x in (pairs.images, e.texts, e.images))
        shape, side = images.shape[-2:], max(1, round(self.window * min(images.shape[-2:])))
        place, left = occlude(encoder, images, texts, grid(shape, side)[None], side)
        loss = (z * texts).sum(1) - left
        hosts = _hosts(loss, e.ids, self.k, self.seed)
        everyone, scouts = torch.arange(len(images), device=images.device), hosts[: self.scouts]
        rest, _ = paste(encoder, images, texts, place, side, everyone, scouts, z[scouts])
        best = torch.minimum(_rank(rest, e.ids), _rank(loss, e.ids))
        kept = _first(-best, e.ids, math.ceil(self.cascade * len(images)))
        around = refined(place[kept], max(1, round(self.stride * side)), shape, side)
        place[kept], _ = occlude(encoder, images[kept], texts[kept], around, side)
        gain, shift = paste(encoder, images, texts, place, side, kept, hosts, z[hosts])
        score = robust(gain)
        if self.strongest:
            count = min(len(kept), MOST, math.ceil(self.strongest * len(images)))
            top = _first(gain, [e.ids[i] for i in kept.tolist()], count)
            direction = common(shift[top], crop(images[kept[top]], place[kept[top]], side), images[kept[top]])
            if direction is not None:
                score = torch.maximum(score, robust(shift @ direction))
        values = rest - rest.max() + score.min()
        values[kept] = score
        return Scores(e.ids, values.float().cpu())


def grid(shape: tuple[int, int] | torch.Size, side: int) -> Tensor:
    """Top left corners of the fewest evenly spread windows that cover an image: int64 (G, 2), rows then columns."""
    axes = [
        torch.linspace(0, n - side, math.ceil(n / side), dtype=torch.float64).round().long()
        if n > side
        else torch.zeros(1).long()
        for n in shape
    ]
    return torch.cartesian_prod(*axes)


def refined(place: Tensor, step: int, shape: tuple[int, int] | torch.Size, side: int) -> Tensor:
    """Corners (N, 2) -> (N, 9, 2): each and its eight neighbours at a step, kept inside the image."""
    offsets = torch.tensor([0, -step, step], device=place.device)
    around = place[:, None] + torch.cartesian_prod(offsets, offsets)
    limit = torch.tensor(shape, device=place.device) - side
    return torch.minimum(around.clamp(min=0), limit)


def occlude(encoder: Any, images: Tensor, texts: Tensor, places: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The window (of G a pair) without which image and caption agree least, filled with the image's mean colour.

    images: uint8 (N, 3, H, W). texts: (N, D). places: int64 (N or 1, G, 2). -> corners (N, 2), cosines (N,) left.
    """
    places = places.to(images.device).expand(len(images), -1, -1)
    best, left = [], []
    for rows in _chunks(images, places.shape[1]):
        x, p = images[rows], places[rows]
        mean = x.float().mean((2, 3), keepdim=True).round().to(torch.uint8)
        altered = torch.where(inside(p, side, x.shape[-2:]), mean[:, None], x[:, None])
        z = encoder.images(altered.flatten(0, 1)).unflatten(0, p.shape[:2])
        cosine, which = (z * texts[rows, None]).sum(-1).min(1)
        best.append(p[torch.arange(len(p), device=p.device), which])
        left.append(cosine)
    return torch.cat(best), torch.cat(left)


def paste(
    encoder: Any, images: Tensor, texts: Tensor, place: Tensor, side: int, rows: Tensor, hosts: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """Each row's window on every host, at its own place.

    hosts: rows (K,), z: their embeddings. -> (lower) median gain in cosine to the row's caption over the hosts, a row
    not its own host (R,); mean shift of the hosts (R, D).
    """
    gains, shifts = [], []
    for part in _chunks(images[rows], len(hosts)):
        i = rows[part]
        mask = inside(place[i, None], side, images.shape[-2:])
        altered = torch.where(mask, images[i, None], images[None, hosts])
        shift = encoder.images(altered.flatten(0, 1)).unflatten(0, (len(i), len(hosts))) - z
        gain = (shift * texts[i, None]).sum(-1)
        gains.append(gain.masked_fill(i[:, None] == hosts, torch.nan).nanmedian(1).values)
        shifts.append(shift.mean(1))
    return torch.cat(gains), torch.cat(shifts)


def inside(places: Tensor, side: int, shape: tuple[int, int] | torch.Size) -> Tensor:
    """Corners (N, G, 2) -> bool (N, G, 1, H, W): the pixels of each window."""
    masks = []
    for axis, n in enumerate(shape):
        offset = torch.arange(n, device=places.device) - places[..., axis, None]
        masks.append((offset >= 0) & (offset < side))
    return (masks[0][..., :, None] & masks[1][..., None, :])[:, :, None]


def crop(images: Tensor, place: Tensor, side: int) -> Tensor:
    """The windows themselves: uint8 (N, 3, side, side)."""
    steps = torch.arange(side, device=images.device)
    y, x = place[:, 0, None] + steps, place[:, 1, None] + steps
    return images[torch.arange(len(images), device=images.device)[:, None, None], :, y[:, :, None], x[:, None]].permute(
        0, 3, 1, 2
    )


def common(shift: Tensor, windows: Tensor, images: Tensor) -> Tensor | None:
    """The direction in which the most windows that look alike move the hosts: unit (D,), or None below `SUPPORT`.

    shift: (M, D). windows: uint8 (M, 3, w, w), of images: uint8 (M, 3, H, W). Two windows agree when their shifts have a
    cosine above `SAME`, their pixels correlate above `ALIKE` at the best offset, and the images are different pictures.
    """
    v, whole = F.normalize(shift, dim=1), F.adaptive_avg_pool2d(images.float(), 8).flatten(1)
    whole = F.normalize(whole - whole.mean(1, keepdim=True), dim=1, eps=1e-3)
    agree = (v @ v.T > SAME) & (correlation(windows) > ALIKE) & (whole @ whole.T < COPY)
    agree.fill_diagonal_(True)
    support = agree.sum(1)
    if int(support.max()) < SUPPORT:
        return None
    return F.normalize(v[agree[int(support.argmax())]].mean(0), dim=0)


def correlation(windows: Tensor) -> Tensor:
    """Largest normalised circular cross-correlation of every two windows, (M, M), over all offsets."""
    x = windows.float().flatten(1)
    x = F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=1e-3).view(windows.shape)
    spectrum = torch.fft.rfft2(x)
    rows = max(1, (1 << 22) // (len(x) * x[0].numel()))
    best = [
        torch.fft.irfft2((spectrum[i : i + rows, None] * spectrum.conj()).sum(2), s=x.shape[-2:]).amax((2, 3))
        for i in range(0, len(x), rows)
    ]
    return torch.cat(best)


def robust(values: Tensor) -> Tensor:
    """Distance from the median in units of 1.4826 median absolute deviations (0 where all are equal)."""
    centred = values - values.median()
    return centred / (1.4826 * centred.abs().median()).clamp(min=1e-6)


def _hosts(loss: Tensor, ids: tuple[str, ...], k: int, seed: int) -> Tensor:
    """k rows drawn from the half of the pairs that lose least."""
    calm = (loss <= loss.median()).cpu().numpy()
    order = pool(ids, len(ids), seed)
    chosen = np.concatenate([order[calm[order]], order[~calm[order]]])[:k]
    return torch.as_tensor(chosen, device=loss.device)


def _first(values: Tensor, ids: Any, count: int) -> Tensor:
    """Rows of the `count` largest values, ties in the order of the ids."""
    order = np.lexsort((np.asarray(ids), -values.cpu().numpy()))[:count]
    return torch.as_tensor(order, device=values.device)


def _chunks(images: Tensor, each: int) -> Iterator[slice]:
    """Slices of the images such that `each` altered copies of them fit a batch."""
    size = max(1, CELLS[images.device.type] // (each * images[0].numel()))
    return (slice(i, i + size) for i in range(0, len(images), size))


def _rank(values: Tensor, ids: Any) -> Tensor:
    """Place of each row from the largest value down, int64 (N,)."""
    return _first(values, ids, len(values)).argsort()
