"""Parts of images in foreign company: cells and windows, and what they do to an encoder's vectors.

A box is int64 (..., 4): top, left, height, width. A *shift* is how far something moves the vectors of other images.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CELLS = {"cpu": 1 << 19, "cuda": 1 << 26}  # pixel values of one batch of altered images


def cells(shape: tuple[int, int] | torch.Size, count: int) -> Tensor:
    """The boxes of a grid of count x count cells that cover an image: int64 (count^2, 4), row by row."""
    edges = [torch.linspace(0, n, count + 1, dtype=torch.float64).round().long() for n in shape]
    corner = torch.cartesian_prod(edges[0][:-1], edges[1][:-1])
    return torch.cat([corner, torch.cartesian_prod(edges[0].diff(), edges[1].diff())], 1)


def halved(boxes: Tensor) -> Tensor:
    """Boxes (N, 4) -> (N, 9, 4): windows of half the side inside each, in steps of a quarter of the side."""
    size = (boxes[:, 2:] // 2).clamp(min=1)
    step = torch.cartesian_prod(torch.arange(3), torch.arange(3)).to(boxes.device)
    corner = boxes[:, None, :2] + (boxes[:, None, 2:] - size[:, None]) * step // 2
    return torch.cat([corner, size[:, None].expand(-1, 9, -1)], 2)


def centred(boxes: Tensor, side: tuple[int, int], shape: tuple[int, int] | torch.Size) -> Tensor:
    """Boxes (..., 4) -> boxes of the given height and width around their middles, moved to lie inside the image."""
    size = torch.tensor(side, device=boxes.device)
    room = torch.tensor(tuple(shape), device=boxes.device) - size
    corner = torch.minimum((boxes[..., :2] + (boxes[..., 2:] - size) // 2).clamp(min=0), room)
    return torch.cat([corner, size.expand_as(corner)], -1)


def inside(boxes: Tensor, shape: tuple[int, int] | torch.Size) -> Tensor:
    """Boxes (..., 4) -> bool (..., 1, H, W): the pixels of each."""
    masks = []
    for axis, n in enumerate(shape):
        offset = torch.arange(n, device=boxes.device) - boxes[..., axis, None]
        masks.append((offset >= 0) & (offset < boxes[..., axis + 2, None]))
    return (masks[0][..., :, None] & masks[1][..., None, :]).unsqueeze(-3)


def crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Windows of one size: uint8 (N, 3, H, W), boxes (N, 4) -> uint8 (N, 3, h, w)."""
    h, w = boxes[0, 2:].tolist()
    y = boxes[:, 0, None] + torch.arange(h, device=images.device)
    x = boxes[:, 1, None] + torch.arange(w, device=images.device)
    rows = torch.arange(len(images), device=images.device)[:, None, None]
    return images[rows, :, y[:, :, None], x[:, None]].permute(0, 3, 1, 2)


def quilts(images: Tensor, count: int, offsets: Tensor) -> Tensor:
    """Patchworks: uint8 (N, 3, H, W) -> the same; image m has cell c of image (m + offsets[c]) mod N. offsets: (count^2,)."""
    out, rows = torch.empty_like(images), torch.arange(len(images), device=images.device)
    for (y, x, h, w), offset in zip(
        cells(images.shape[-2:], count).tolist(), offsets.tolist(), strict=True
    ):
        out[:, :, y : y + h, x : x + w] = images[
            (rows + offset) % len(images), :, y : y + h, x : x + w
        ]
    return out


def constancy(
    encoder: Any, images: Tensor, count: int, rounds: int, seed: int
) -> tuple[Tensor, Tensor]:
    """How constantly the cells of each image move whatever patchwork they are part of: float32 (N,), cells int64 (N,).

    In each round every image is cut into count x count cells, and N patchworks are made, each of count^2 images' cells: N
    forward passes test all cells of all images. d = the vector of a patchwork less the mean of all. A cell's constancy
    is the mean of d . d' over the pairs of its `rounds` patchworks, an unbiased estimate of its squared mean shift. The
    largest of an image's cells counts. What shares a patchwork with what depends on the order of the images and the seed.
    """
    n, g = len(images), torch.Generator().manual_seed(seed)
    total: Tensor | None = None
    for _ in range(rounds):
        most = count * count
        offsets = torch.randperm(max(n, most), generator=g)[:most] % n
        made = quilts(images, count, offsets)
        d = torch.cat([encoder.encode_images(made[r]) for r in chunks(made, 1)])
        d = d - d.mean(0)
        if total is None:
            total = torch.zeros(n, most, d.shape[1], device=d.device)
            squares = torch.zeros(n, most, device=d.device)
        for c, offset in enumerate(offsets.tolist()):
            own = d.roll(offset, 0)  # image i lies in patchwork i - offset
            total[:, c] += own
            squares[:, c] += own.square().sum(1)
    assert total is not None
    return ((total.square().sum(2) - squares) / (rounds * (rounds - 1))).max(1)  # type: ignore[return-value]


def shifts(encoder: Any, images: Tensor, boxes: Tensor, hosts: Tensor, z: Tensor) -> Tensor:
    """Windows on every host, at their own places: float32 (N, G, K, D).

    images: uint8 (N, 3, H, W). boxes: (N, G, 4). hosts: uint8 (K, 3, H, W), their vectors z (K, D).
    """
    out = []
    for rows in chunks(images, boxes.shape[1] * len(hosts)):
        mask = inside(boxes[rows], images.shape[-2:])[:, :, None]
        altered = torch.where(mask, images[rows, None, None], hosts)
        out.append(
            encoder.encode_images(altered.flatten(0, 2)).unflatten(0, (*mask.shape[:2], len(hosts)))
            - z
        )
    return torch.cat(out)


def agreement(shift: Tensor) -> Tensor:
    """Mean over the pairs of K hosts of the product of their shifts: (..., K, D) -> (...)."""
    k = shift.shape[-2]
    return (shift.sum(-2).square().sum(-1) - shift.square().sum((-1, -2))) / (k * (k - 1))


def located(
    encoder: Any, images: Tensor, boxes: Tensor, hosts: Tensor, z: Tensor, keep: float, least: int
) -> Tensor:
    """The smallest window that still does what a box does: boxes (N, 4) -> boxes (N, 4).

    Step by step a box is exchanged for the one of its nine windows of half the side whose shifts agree most, as long as
    they agree at least `keep` times as well as the box's own do and its side is at least `least`.
    """
    boxes = boxes.clone()
    strength = agreement(shifts(encoder, images, boxes[:, None], hosts, z))[:, 0]
    alive = torch.arange(len(boxes), device=boxes.device)
    while len(alive := alive[boxes[alive, 2:].amin(1) >= 2 * least]):
        inner = halved(boxes[alive])
        found, which = agreement(shifts(encoder, images[alive], inner, hosts, z)).max(1)
        better = found >= keep * strength[alive]
        alive = alive[better]
        boxes[alive] = inner[better, which[better]]
        strength[alive] = found[better]
    return boxes


def chunks(images: Tensor, each: int, cells: int = 0) -> Iterator[slice]:
    """Slices of the images such that `each` altered copies of them fit a batch, of `cells` pixel values or `CELLS`."""
    size = max(1, (cells or CELLS[images.device.type]) // (each * images[0].numel()))
    return (slice(i, i + size) for i in range(0, len(images), size))
