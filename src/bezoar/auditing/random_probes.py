"""Random probes: patterns over clean images, to measure how far they move an encoder's vectors.

Audits that know no trigger and invert none are built on these (`whitening`, `whole_image`,
`parent`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, embed_images
from bezoar.errors import UserError
from bezoar.progress import ProgressReport

PATCH_KINDS = ("blocks", "noise", "solid")
PROBE_KINDS = (*PATCH_KINDS, "blend")
PATCH_SIDES = (4, 6, 8, 10)  # in turn, in pixels of an image of 32
BLEND_SHARE = 0.2  # of the pattern in a blended image
MIN_SIDE = 8  # pixels of an image that probes can be laid over
BATCH = 128  # images that are embedded together

# Lays a probe over images: uint8 (N, 3, H, W), the probe's kind, its number -> uint8 (N, 3, H, W)
ProbeFunction = Callable[[Tensor, str, int], Tensor]


@dataclass(frozen=True)
class CommonShifts:
    """What `common_shift` gives for each probe of one kind."""

    lengths: list[float] = field(default_factory=list)  # 0 and more
    shares: list[float] = field(default_factory=list)  # 0..1


def check_fields(probes: int, images: int, shrink: float) -> None:
    """Raise ValueError unless these can be an audit's probes, images and shrinkage."""
    if probes < 1 or images < 2 or not 0 < shrink <= 1:
        raise ValueError("needs probes >= 1, images >= 2 and shrink in 0..1, above 0")


def first_images(clean: Pairs, count: int, device: torch.device, audit: str) -> Tensor:
    """The first `count` clean images, uint8 (N, 3, H, W), on a device.

    Raises:
        UserError: for fewer than two images, or images smaller than 8 pixels; it names the audit.
    """
    images = clean.images[:count].to(device)
    if len(images) < 2 or min(images.shape[-2:]) < MIN_SIDE:
        raise UserError(
            f"{audit} needs at least two clean images of {MIN_SIDE} pixels and more a side"
        )
    return images


def embed_in_double(encoder: Encoder, images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> float64 (N, D), unit rows. Raises UserError on NaN."""
    return embed_images(encoder, torch.split(images, BATCH)).double()


def iterate_probes(
    images: Tensor,
    kinds: Sequence[str],
    probes: int,
    apply: ProbeFunction,
    report: ProgressReport,
) -> Iterator[tuple[str, int, Tensor]]:
    """Yield (kind, number, images with the probe) for all probes, the kinds in turn."""
    total = probes * len(kinds)
    for i in range(total):
        kind = kinds[i % len(kinds)]
        number = i // len(kinds)
        yield kind, number, apply(images, kind, number)
        report(i + 1, total, kind)


def measure_common_shifts(
    encoder: Encoder,
    images: Tensor,
    kinds: Sequence[str],
    probes: int,
    apply: ProbeFunction,
    shrink: float,
    report: ProgressReport,
) -> dict[str, CommonShifts]:
    """How far each probe moves all images in one direction, in deviations of the clean vectors.

    Args:
        images: uint8 (N, 3, H, W), clean.
        probes: number of probes of each kind.
        apply: lays a probe over the images.
        shrink: see `whitening_matrix`.
        report: told after each probe.

    Returns:
        Kind -> the lengths and shares of its probes, in the order of `kinds`.
    """
    z = embed_in_double(encoder, images)  # (N, D)
    whiten = whitening_matrix(z, shrink)  # (D, D)
    shifts = {kind: CommonShifts() for kind in kinds}
    for kind, _, probed in iterate_probes(images, kinds, probes, apply, report):
        length, share = common_shift((embed_in_double(encoder, probed) - z) @ whiten)
        shifts[kind].lengths.append(length)
        shifts[kind].shares.append(share)
    return shifts


def whitening_matrix(z: Tensor, shrink: float) -> Tensor:
    """The inverse square root of the vectors' covariance (ZCA), symmetric (D, D).

    The covariance C of z, float (N, D), divides by N and is shrunk towards a multiple of the
    identity, (1 - shrink) C + shrink tr(C) / D I, because there may be fewer images than axes.

    Raises:
        UserError: where all vectors are the same.
    """
    centred = z - z.mean(0)
    cov = centred.T @ centred / len(z)
    scale = cov.diagonal().mean()
    if scale < 1e-12:
        raise UserError(
            "the encoder gives all clean images one vector; there is nothing to whiten by"
        )
    identity = torch.eye(len(cov)).to(cov)
    values, vectors = torch.linalg.eigh((1 - shrink) * cov + shrink * scale * identity)
    whitening: Tensor = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    return whitening


def common_shift(shifts: Tensor) -> tuple[float, float]:
    """Length of the mean of shifts (N, D), and its square over their mean square (0..1)."""
    squared_length = float(shifts.mean(0).square().sum())
    mean_square = float(shifts.square().sum(1).mean())
    return squared_length**0.5, squared_length / max(mean_square, 1e-30)


def probe_generator(kinds: Sequence[str], kind: str, number: int, seed: int) -> torch.Generator:
    """The generator that belongs to one probe."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number * len(kinds) + kinds.index(kind))


def apply_probe(images: Tensor, kind: str, number: int, seed: int) -> Tensor:
    """Lay the number-th probe of a kind over images: one pattern, at one place, for all of them.

    uint8 (N, 3, H, W) -> a new tensor of the same shape. Patches have sides of an eighth to a third
    of the image. Of `blocks` each cell is two pixels of an image of 32, and each of its colours 0
    or 255.
    """
    generator = probe_generator(PROBE_KINDS, kind, number, seed)
    height, width = images.shape[-2:]
    if kind == "blend":
        cells = torch.rand(1, 3, 8, 8, generator=generator)
        pattern = F.interpolate(cells, (height, width), mode="bilinear")[0].to(images.device)
        return ((1 - BLEND_SHARE) * images + BLEND_SHARE * 255 * pattern).round().byte()
    patch = draw_patch(kind, number, min(height, width), generator)
    side = patch.shape[-1]
    top = int(torch.randint(0, height - side + 1, (1,), generator=generator))
    left = int(torch.randint(0, width - side + 1, (1,), generator=generator))
    out = images.clone()
    out[:, :, top : top + side, left : left + side] = (patch * 255).round().byte().to(images.device)
    return out


def draw_patch(kind: str, number: int, image_side: int, generator: torch.Generator) -> Tensor:
    """Draw a square patch, float 0..1 (3, S, S). kind: one of `PATCH_KINDS`."""
    nominal = PATCH_SIDES[number % len(PATCH_SIDES)]
    side = max(2, round(image_side * nominal / 32))
    if kind == "solid":
        return (torch.rand(3, 1, 1, generator=generator) > 0.5).float().expand(3, side, side)
    if kind == "noise":
        return torch.rand(3, side, side, generator=generator)
    cells = max(2, nominal // 2)
    blocks = (torch.rand(1, 3, cells, cells, generator=generator) > 0.5).float()
    return F.interpolate(blocks, (side, side))[0]
