"""Windows of images pasted into other images, and how far they move an encoder's vectors.

A *box* is int64 (..., 4): top, left, height and width in pixels. A *host* is an image that a window
is pasted into. The *shift* of a window on a host is the vector of the host with the window less the
vector of the host alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bezoar.attacks.pixels import window_index
from bezoar.detection.detectors import RecordEncoder

BATCH_VALUES = {"cpu": 1 << 19, "cuda": 1 << 26}  # pixel values of one batch of altered images

Shape = tuple[int, int] | torch.Size  # height and width


@dataclass(frozen=True)
class HostImages:
    """K images that windows are pasted into, uint8 (K, 3, H, W), and their vectors, (K, D)."""

    images: Tensor
    vectors: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> HostImages:
        """The first `count` of them."""
        return HostImages(self.images[:count], self.vectors[:count])


def grid_cells(shape: Shape, count: int) -> Tensor:
    """The boxes of a grid of count x count cells over an image: int64 (count^2, 4), row by row."""
    edges = [torch.linspace(0, n, count + 1, dtype=torch.float64).round().long() for n in shape]
    corners = torch.cartesian_prod(edges[0][:-1], edges[1][:-1])
    sizes = torch.cartesian_prod(edges[0].diff(), edges[1].diff())
    return torch.cat([corners, sizes], 1)


def half_size_windows(boxes: Tensor) -> Tensor:
    """Boxes (N, 4) -> (N, 9, 4): windows of half the side, in steps of a quarter of the side."""
    size = (boxes[:, 2:] // 2).clamp(min=1)
    steps = torch.cartesian_prod(torch.arange(3), torch.arange(3)).to(boxes.device)
    corners = boxes[:, None, :2] + (boxes[:, None, 2:] - size[:, None]) * steps // 2
    return torch.cat([corners, size[:, None].expand(-1, 9, -1)], 2)


def resize_boxes(boxes: Tensor, size: tuple[int, int], shape: Shape) -> Tensor:
    """Boxes (..., 4) -> of another size around the same centres, moved into the image."""
    sides = torch.tensor(size, device=boxes.device)
    last_corner = torch.tensor(tuple(shape), device=boxes.device) - sides
    corners = (boxes[..., :2] + (boxes[..., 2:] - sides) // 2).clamp(min=0)
    corners = torch.minimum(corners, last_corner)
    return torch.cat([corners, sides.expand_as(corners)], -1)


def box_masks(boxes: Tensor, shape: Shape) -> Tensor:
    """Boxes (..., 4) -> bool (..., 1, H, W): the pixels of each box."""
    masks = []
    for axis, n in enumerate(shape):
        offset = torch.arange(n, device=boxes.device) - boxes[..., axis, None]
        masks.append((offset >= 0) & (offset < boxes[..., axis + 2, None]))
    rows, columns = masks
    return (rows[..., :, None] & columns[..., None, :]).unsqueeze(-3)


def crop_windows(images: Tensor, boxes: Tensor) -> Tensor:
    """Windows of one size: uint8 (N, 3, H, W), boxes (N, 4) -> uint8 (N, 3, h, w)."""
    h, w = boxes[0, 2:].tolist()
    windows = images.permute(0, 2, 3, 1)[window_index(boxes[:, :2], h, w)]
    return windows.permute(0, 3, 1, 2)


def make_patchworks(images: Tensor, count: int, offsets: Tensor) -> Tensor:
    """Images of which each cell of a grid of count x count comes from another image.

    Args:
        images: uint8 (N, 3, H, W).
        offsets: int64 (count^2,). Patchwork m has cell c of image (m + offsets[c]) mod N.

    Returns:
        uint8 (N, 3, H, W).
    """
    patchworks = torch.empty_like(images)
    rows = torch.arange(len(images), device=images.device)
    cells = grid_cells(images.shape[-2:], count).tolist()
    for (y, x, h, w), offset in zip(cells, offsets.tolist(), strict=True):
        donors = (rows + offset) % len(images)
        patchworks[:, :, y : y + h, x : x + w] = images[donors, :, y : y + h, x : x + w]
    return patchworks


def measure_consistency(
    encoder: RecordEncoder, images: Tensor, count: int, rounds: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return how consistently the cells of each image move all patchworks that they are part of.

    In each round every image is cut into count x count cells, and N patchworks are made, each of
    the cells of count^2 images: N forward passes test all cells of all images. Let d be the vector
    of a patchwork less the mean of all. The consistency of a cell is the mean of d . d' over the
    pairs of its `rounds` patchworks, an unbiased estimate of the squared length of its mean shift.
    Which cells share a patchwork depends on the order of the images and on the seed.

    Args:
        images: uint8 (N, 3, H, W).
        rounds: Patchworks that each cell is part of, at least 2.

    Returns:
        The largest consistency among the cells of each image, float32 (N,), and the number of that
        cell, int64 (N,).
    """
    n, cells = len(images), count * count
    generator = torch.Generator().manual_seed(seed)
    sums = squares = torch.empty(0)
    for round_number in range(rounds):
        offsets = torch.randperm(max(n, cells), generator=generator)[:cells] % n
        patchworks = make_patchworks(images, count, offsets)
        vectors = torch.cat([encoder.encode_images(patchworks[r]) for r in batch_slices(images, 1)])
        deviations = vectors - vectors.mean(0)
        if round_number == 0:
            sums = deviations.new_zeros(n, cells, deviations.shape[1])
            squares = deviations.new_zeros(n, cells)
        for cell, offset in enumerate(offsets.tolist()):
            of_image = deviations.roll(offset, 0)  # image i lies in patchwork i - offset
            sums[:, cell] += of_image
            squares[:, cell] += of_image.square().sum(1)
    strongest = ((sums.square().sum(2) - squares) / (rounds * (rounds - 1))).max(1)
    return strongest.values, strongest.indices


def measure_shifts(
    encoder: RecordEncoder, images: Tensor, boxes: Tensor, hosts: HostImages
) -> Tensor:
    """The shifts of windows on every host, each pasted at the place that it has in its own image.

    Args:
        images: uint8 (N, 3, H, W).
        boxes: (N, G, 4), G windows of each image.
        hosts: K images of the same size.

    Returns:
        float32 (N, G, K, D).
    """
    parts = []
    for rows in batch_slices(images, boxes.shape[1] * len(hosts)):
        masks = box_masks(boxes[rows], images.shape[-2:])[:, :, None]  # (B, G, 1, 1, H, W)
        altered = torch.where(masks, images[rows, None, None], hosts.images)  # (B, G, K, 3, H, W)
        vectors = encoder.encode_images(altered.flatten(0, 2))
        parts.append(vectors.unflatten(0, altered.shape[:3]) - hosts.vectors)
    return torch.cat(parts)


def pairwise_agreement(shifts: Tensor) -> Tensor:
    """Mean product of the shifts (..., K, D) of two different hosts: (...)."""
    k = shifts.shape[-2]
    return (shifts.sum(-2).square().sum(-1) - shifts.square().sum((-1, -2))) / (k * (k - 1))


def shrink_boxes(
    encoder: RecordEncoder,
    images: Tensor,
    boxes: Tensor,
    hosts: HostImages,
    keep: float,
    smallest: int,
) -> Tensor:
    """The smallest window inside each box that still does to the hosts what the box does.

    Step by step a box is exchanged for that of its nine windows of half the side whose shifts agree
    most, as long as they agree at least `keep` times as well as those of the box and the window's
    side is at least `smallest`.

    Args:
        images: uint8 (N, 3, H, W).
        boxes: (N, 4).
        hosts: Images that the windows are pasted into.
        keep: 0..1.
        smallest: In pixels.

    Returns:
        Boxes (N, 4).
    """
    boxes = boxes.clone()
    agreement = pairwise_agreement(measure_shifts(encoder, images, boxes[:, None], hosts))[:, 0]
    rows = torch.arange(len(boxes), device=boxes.device)  # those that may become smaller still
    while True:
        rows = rows[boxes[rows, 2:].amin(1) >= 2 * smallest]
        if not len(rows):
            return boxes
        windows = half_size_windows(boxes[rows])
        best = pairwise_agreement(measure_shifts(encoder, images[rows], windows, hosts)).max(1)
        enough = best.values >= keep * agreement[rows]
        rows = rows[enough]
        boxes[rows] = windows[enough, best.indices[enough]]
        agreement[rows] = best.values[enough]


def batch_slices(images: Tensor, copies: int, values: int = 0) -> Iterator[slice]:
    """Slices of the images whose altered copies, `copies` of each, fit a batch of `values` pixel
    values (0: BATCH_VALUES).
    """
    size = max(1, (values or BATCH_VALUES[images.device.type]) // (copies * images[0].numel()))
    return (slice(i, i + size) for i in range(0, len(images), size))
