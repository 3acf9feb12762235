"""Whitened shifts (Mahalanobis, ZCA): how far random probes move clean images in one direction that all of them share.

Whitening features by clean ones exposes triggered inputs (an idea of a public draft; no published target). This is our
form of it for a verdict on an encoder, from clean images alone: it knows no trigger, it stamps small random patches. A tower
that has learnt to read one patch as a class reads others a little so as well, whatever they cover.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

from bezoar.auditing.random_probes import (
    PATCH_KINDS,
    PROBE_KINDS,
    apply_probe,
    common_shift,
    mean_over_probes,
    whitening_matrix,
)
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, embed_images
from bezoar.errors import UserError
from bezoar.evaluation.verdict import Verdict
from bezoar.registry import method

LIMITS = [
    "It sees towers that random patches move too much; a backdoor that was put in by training a finished encoder to tell its "
    "trigger from all else moves less, not more, and is not seen.",
    "Of triggers that cover the whole image it has one reading, of blends, which the value leaves out.",
]


@method
class Whitening:
    """Value: mean over the patch probes of the whitened length of the shift that all images share (in standard deviations
    of clean features, 0 and more)."""

    needs: ClassVar[tuple[str, ...]] = ("report",)

    probes: Annotated[
        int,
        "of each kind: patches of blocks, of noise and of one colour, blends over the whole image",
    ] = 8
    images: Annotated[int, "clean images that are stamped, the first of those given"] = 128
    shrink: Annotated[float, "of the covariance towards a multiple of the identity, 0..1"] = 0.1

    def __post_init__(self) -> None:
        if self.probes < 1 or self.images < 2 or not 0 < self.shrink <= 1:
            raise ValueError("needs probes >= 1, images >= 2 and shrink in 0..1, above 0")

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
            raise UserError("whitening needs at least two clean images of 8 pixels and more a side")
        z = embed_images(encoder, images.split(128)).double()
        axes = whitening_matrix(z, self.shrink)
        lengths: dict[str, list[float]] = {kind: [] for kind in PROBE_KINDS}
        shares: dict[str, list[float]] = {kind: [] for kind in PROBE_KINDS}
        total = self.probes * len(PROBE_KINDS)
        for i in range(total):
            kind = PROBE_KINDS[i % len(PROBE_KINDS)]
            moved = embed_images(
                encoder, apply_probe(images, kind, i // len(PROBE_KINDS), seed).split(128)
            ).double()
            length, share = common_shift((moved - z) @ axes)
            lengths[kind].append(length)
            shares[kind].append(share)
            report(i + 1, total, kind)
        patches = [v for kind in PATCH_KINDS for v in lengths[kind]]
        evidence = {
            f"shift_{k}": mean_over_probes(v, f"whitened length of the common shift by {k} probes")
            for k, v in lengths.items()
        }
        evidence |= {
            f"common_{k}": mean_over_probes(v, f"share of the whitened shift common to images, {k}")
            for k, v in shares.items()
        }
        return Verdict(
            sum(patches) / len(patches), evidence, notes={"images": len(images), "limits": LIMITS}
        )
