"""Whole-image shifts: how far noise, waves and warps move all clean images in one direction.

The counterpart of `whitening` for triggers that cover the whole image (Blended, Chen et al. 2017;
SIG, Barni et al. 2019; WaNet, Nguyen and Tran 2021), which no inversion of a small patch finds. No
trigger is known: an image tower that has learnt to read one such pattern as a class also reads
other patterns of its sort a little as that class. Ours; no published target.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bezoar.auditing import random_probes
from bezoar.auditing.evidence import mean_over_probes
from bezoar.auditing.trigger_inversion import TowerCost
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation.verdict import Verdict
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

KINDS = ("noise", "wave", "warp")
WAVES = (3, 5, 7, 9, 11, 13, 4, 8)  # periods across the image, in turn
MESHES = (8, 16, 32, 24)  # control points a side of a warp, in turn
LIMITS = [
    "It detects image towers that noise, waves and warps over the whole image move too much. It "
    "may miss a blend of a smooth picture, or a trigger of another sort than these three.",
]


@method
class WholeImage:
    """Value: mean over all probes of the whitened length of the shift that all images share.

    It is in standard deviations of the clean features, 0 and more.
    """

    needs: ClassVar[tuple[str, ...]] = ("report",)

    probes: Annotated[int, "number of each kind: noise, waves, warps"] = 8
    images: Annotated[int, "clean images that are changed, the first of the data"] = 128
    shrink: Annotated[
        float, "shrinkage of the covariance towards a multiple of the identity, 0..1"
    ] = 0.1
    alpha: Annotated[float, "share of the noise in an image, 0..1"] = 0.2
    delta: Annotated[float, "amplitude of a wave, 0..255"] = 20.0
    strength: Annotated[
        float, "of a warp: mean shift of a control point, in pixels of an image of 32"
    ] = 1.0

    def __post_init__(self) -> None:
        random_probes.check_fields(self.probes, self.images, self.shrink)
        if not 0 < self.alpha <= 1 or not 0 < self.delta <= 255 or not self.strength > 0:
            raise ValueError("needs alpha in 0..1, delta in 0..255 and strength, all above 0")

    def image_passes(self, images: int, classes: int, cost: TowerCost) -> int:
        """Images that go through the encoder."""
        return min(images, self.images) * (1 + self.probes * len(KINDS))

    def __call__(
        self, encoder: Encoder, clean: Pairs, seed: int, report: ProgressReport = no_report
    ) -> Verdict:
        """Audit an encoder with images uint8 (N, 3, H, W), N at least 2, H and W at least 8.

        The probes depend on the seed and on the size of the images alone.
        """
        images = random_probes.first_images(clean, self.images, encoder.device, "whole_image")
        apply = partial(self.apply_probe, seed=seed)
        shifts = random_probes.measure_common_shifts(
            encoder, images, KINDS, self.probes, apply, self.shrink, report
        )
        lengths = [length for s in shifts.values() for length in s.lengths]
        evidence = {
            f"shift_{kind}": mean_over_probes(
                s.lengths, f"whitened length of the common shift by {kind}"
            )
            for kind, s in shifts.items()
        }
        notes = {"images": len(images), "limits": LIMITS}
        return Verdict(sum(lengths) / len(lengths), evidence, notes=notes)

    def apply_probe(self, images: Tensor, kind: str, number: int, seed: int) -> Tensor:
        """Change all images, uint8 (N, 3, H, W), by the number-th probe of a kind."""
        generator = random_probes.probe_generator(KINDS, kind, number, seed)
        height, width = images.shape[-2:]
        if kind == "noise":
            pattern = draw_noise(height, width, number, generator).to(images.device)
            changed = (1 - self.alpha) * images + self.alpha * 255 * pattern
        elif kind == "wave":
            wave = draw_wave(height, width, number, generator)
            changed = images + (self.delta * wave).to(images.device)
        else:
            grid = draw_warp(height, width, number, self.strength, generator).to(images.device)
            changed = F.grid_sample(
                images.float(), grid.expand(len(images), -1, -1, -1), align_corners=True
            )
        return changed.round().clamp(0, 255).byte()


def draw_noise(height: int, width: int, number: int, generator: Generator) -> Tensor:
    """Uniform noise 0..1 (1, 3, H, W); in every second probe in grains of a 32nd of the side."""
    grain = max(1, min(height, width) // 32) if number % 2 else 1
    grains = torch.rand(1, 3, -(-height // grain), -(-width // grain), generator=generator)
    return grains.repeat_interleave(grain, 2).repeat_interleave(grain, 3)[..., :height, :width]


def draw_wave(height: int, width: int, number: int, generator: Generator) -> Tensor:
    """A plane sine wave, -1..1 (H, W), of random direction and phase.

    Every second wave varies along the width alone, as the published trigger (SIG) does.
    """
    angle, phase = (2 * math.pi * torch.rand(2, generator=generator)).tolist()
    angle *= number % 2
    y = torch.arange(height)[:, None] / height  # (H, 1)
    x = torch.arange(width) / width  # (W,)
    periods = WAVES[number % len(WAVES)] * (x * math.cos(angle) + y * math.sin(angle))
    return torch.sin(2 * math.pi * periods + phase)


def draw_warp(
    height: int, width: int, number: int, strength: float, generator: Generator
) -> Tensor:
    """A smooth random warp as a sampling grid for `grid_sample`, (H, W, 2) in -1..1."""
    side = MESHES[number % len(MESHES)]
    mesh = torch.rand(1, 2, side, side, generator=generator) * 2 - 1
    flow = F.interpolate(
        mesh / mesh.abs().mean(), (height, width), mode="bicubic", align_corners=True
    )
    rows_and_columns = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    identity = torch.stack(rows_and_columns).flip(0)  # (2, H, W), x before y
    return (identity + strength / 16 * flow[0]).clamp(-1, 1).permute(1, 2, 0)
