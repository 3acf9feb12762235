"""Whole-image shifts: how far noise, waves and warps over the whole image move clean images in one direction they share.

The counterpart of `whitening` for triggers without a place (Blended, Chen et al. 2017; SIG, Barni et al. 2019; WaNet, Nguyen
and Tran 2021), which no inversion of a small patch finds. It knows no trigger: a tower that has learnt to read one such
pattern as a class reads other patterns of its sort a little so as well. Ours; no published target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.auditing.random_probes import common_shift, mean_over_probes, whitening_matrix
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, embed_images
from bezoar.errors import UserError
from bezoar.evaluation.verdict import Verdict
from bezoar.registry import method

KINDS = ("noise", "wave", "warp")
WAVES = (3, 5, 7, 9, 11, 13, 4, 8)  # periods across the image, in turn
MESHES = (8, 16, 32, 24)  # control points a side of a warp, in turn
LIMITS = [
    "It sees towers that noise, waves and warps over the whole image move too much. A blend of a smooth picture, or a trigger "
    "of another sort than these three, it need not see.",
]


@method
class WholeImage:
    """Value: mean over all probes of the whitened length of the shift that all images share (in standard deviations of
    clean features, 0 and more)."""

    needs: ClassVar[tuple[str, ...]] = ("report",)

    probes: Annotated[int, "of each kind: noise, waves, warps"] = 8
    images: Annotated[int, "clean images that are changed, the first of those given"] = 128
    shrink: Annotated[float, "of the covariance towards a multiple of the identity, 0..1"] = 0.1
    alpha: Annotated[float, "share of the noise in an image, 0..1"] = 0.2
    delta: Annotated[float, "height of a wave, of 255"] = 20.0
    strength: Annotated[
        float, "of a warp: mean shift of a control point, in pixels of an image of 32"
    ] = 1.0

    def __post_init__(self) -> None:
        if self.probes < 1 or self.images < 2 or not 0 < self.shrink <= 1:
            raise ValueError("needs probes >= 1, images >= 2 and shrink in 0..1, above 0")
        if not 0 < self.alpha <= 1 or not 0 < self.delta <= 255 or not self.strength > 0:
            raise ValueError("needs alpha in 0..1, delta in 0..255 and strength, all above 0")

    def __call__(
        self,
        encoder: Encoder,
        clean: Pairs,
        seed: int,
        report: Callable[[int, int, str], None] = lambda done, total, text: None,
    ) -> Verdict:
        """clean: uint8 (N, 3, H, W), N at least 2, H and W at least 8. The same probes for the same seed and size."""
        images = clean.images[: self.images].to(encoder.device)
        if len(images) < 2 or min(images.shape[-2:]) < 8:
            raise UserError(
                "whole_image needs at least two clean images of 8 pixels and more a side"
            )
        z = embed_images(encoder, images.split(128)).double()
        axes = whitening_matrix(z, self.shrink)
        lengths: dict[str, list[float]] = {kind: [] for kind in KINDS}
        total = self.probes * len(KINDS)
        for i in range(total):
            kind, number = KINDS[i % len(KINDS)], i // len(KINDS)
            moved = embed_images(
                encoder, self.probe(images, kind, number, seed).split(128)
            ).double()
            lengths[kind].append(common_shift((moved - z) @ axes)[0])
            report(i + 1, total, kind)
        every = [v for own in lengths.values() for v in own]
        evidence = {
            f"shift_{k}": mean_over_probes(v, f"whitened length of the common shift by {k}")
            for k, v in lengths.items()
        }
        return Verdict(
            sum(every) / len(every), evidence, notes={"images": len(images), "limits": LIMITS}
        )

    def probe(self, images: Tensor, kind: str, number: int, seed: int) -> Tensor:
        """uint8 (N, 3, H, W) -> the same with the number-th probe of a kind, one for all of them.

        Noise is drawn pixel by pixel, on larger images in every second probe in grains of a 32nd of the side.
        """
        height, width = images.shape[-2:]
        g = torch.Generator().manual_seed(
            seed * 1_000_003 + number * len(KINDS) + KINDS.index(kind)
        )
        if kind == "noise":
            grain = max(1, min(height, width) // 32) if number % 2 else 1
            drawn = torch.rand(1, 3, -(-height // grain), -(-width // grain), generator=g)
            pattern = (
                drawn.repeat_interleave(grain, 2)
                .repeat_interleave(grain, 3)[..., :height, :width]
                .to(images.device)
            )
            changed = (1 - self.alpha) * images + self.alpha * 255 * pattern
        elif kind == "wave":
            turn, phase = (2 * math.pi * torch.rand(2, generator=g)).tolist()
            turn *= number % 2  # every second one stands upright, as the published one does
            y, x = torch.arange(height)[:, None] / height, torch.arange(width) / width
            along = WAVES[number % len(WAVES)] * (x * math.cos(turn) + y * math.sin(turn))
            changed = images + (self.delta * torch.sin(2 * math.pi * along + phase)).to(
                images.device
            )
        else:
            side = MESHES[number % len(MESHES)]
            mesh = torch.rand(1, 2, side, side, generator=g) * 2 - 1
            flow = F.interpolate(
                mesh / mesh.abs().mean(), (height, width), mode="bicubic", align_corners=True
            )
            places = torch.stack(
                torch.meshgrid(
                    torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
                )
            )
            grid = (
                (places.flip(0) + self.strength / 16 * flow[0])
                .clamp(-1, 1)
                .permute(1, 2, 0)
                .to(images.device)
            )
            changed = F.grid_sample(
                images.float(), grid.expand(len(images), -1, -1, -1), align_corners=True
            )
        return changed.round().clamp(0, 255).byte()
