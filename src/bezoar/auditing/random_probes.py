"""Random probes, and how far they move vectors: what audits ask that know no trigger and invert none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, average

PATCH_KINDS = ("blocks", "noise", "solid")
PROBE_KINDS = (*PATCH_KINDS, "blend")


def whitening_matrix(z: Tensor, shrink: float) -> Tensor:
    """float (N, D) -> symmetric (D, D), the inverse root of their covariance (ZCA), by 1 / N.

    It is shrunk: (1 - s) C + s tr(C) / D I, as there may be fewer images than axes. A tower without variance has none.
    """
    centred = z - z.mean(0)
    cov = centred.T @ centred / len(z)
    scale = cov.diagonal().mean()
    if scale < 1e-12:
        raise UserError(
            "the encoder gives all clean images one vector; there is nothing to whiten by"
        )
    values, vectors = torch.linalg.eigh(
        (1 - shrink) * cov + shrink * scale * torch.eye(len(cov)).to(cov)
    )
    return vectors @ torch.diag(values.rsqrt()) @ vectors.T


def common_shift(shifts: Tensor) -> tuple[float, float]:
    """Whitened shifts (N, D) -> length of their mean, and its square as a share of their mean square (0..1)."""
    mean = float(shifts.mean(0).square().sum())
    return mean**0.5, mean / max(float(shifts.square().sum(1).mean()), 1e-30)


def apply_probe(images: Tensor, kind: str, number: int, seed: int) -> Tensor:
    """uint8 (N, 3, H, W) -> the same with the number-th probe of a kind: one pattern, at one place, for all of them.

    Patches have sides of an eighth to a third of the image; blocks are two pixels of 32, each colour all or nothing.
    """
    height, width = images.shape[-2:]
    g = torch.Generator().manual_seed(
        seed * 1_000_003 + number * len(PROBE_KINDS) + PROBE_KINDS.index(kind)
    )
    if kind == "blend":
        pattern = F.interpolate(
            torch.rand(1, 3, 8, 8, generator=g), (height, width), mode="bilinear"
        )[0].to(images.device)
        return (0.8 * images + 0.2 * 255 * pattern).round().byte()
    side = max(2, round(min(height, width) * (4, 6, 8, 10)[number % 4] / 32))
    if kind == "solid":
        patch = (torch.rand(3, 1, 1, generator=g) > 0.5).float().expand(3, side, side)
    elif kind == "noise":
        patch = torch.rand(3, side, side, generator=g)
    else:
        cells = max(2, (4, 6, 8, 10)[number % 4] // 2)
        patch = F.interpolate(
            (torch.rand(1, 3, cells, cells, generator=g) > 0.5).float(), (side, side)
        )[0]
    top, left = (int(torch.randint(0, n - side + 1, (1,), generator=g)) for n in (height, width))
    out = images.clone()
    out[:, :, top : top + side, left : left + side] = (patch * 255).round().byte().to(images.device)
    return out


def mean_over_probes(values: list[float], how: str) -> Measure:
    """A mean over probes; one probe is what it is."""
    return (
        average(values, how)
        if len(values) > 1
        else Measure(values[0], 1, values[0], values[0], how)
    )
