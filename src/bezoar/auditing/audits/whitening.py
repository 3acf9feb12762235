"""Whitened shifts: how far random patches move all clean images in one direction.

Whitening features by clean ones (Mahalanobis, ZCA) exposes triggered inputs (an idea of a public
draft; no published target). Here it gives a verdict on an encoder from clean images alone: no
trigger is known, small random patches are stamped. An image tower that has learnt to read one patch
as a class also reads other patches a little as that class, whatever they cover.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar

from bezoar.auditing import random_probes
from bezoar.auditing.evidence import mean_over_probes
from bezoar.auditing.random_probes import PATCH_KINDS, PROBE_KINDS, apply_probe
from bezoar.auditing.trigger_inversion import TowerCost
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation.verdict import Verdict
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

LIMITS = [
    "It detects image towers that random patches move too much. A backdoor that was put in by "
    "training a finished encoder to tell its trigger from everything else moves less, not more, "
    "and is not detected.",
    "For triggers that cover the whole image it has one reading, of blends, which is not part of "
    "the value.",
]


@method
class Whitening:
    """Value: mean over the patch probes of the whitened length of the shift that all images share.

    It is in standard deviations of the clean features, 0 and more.
    """

    needs: ClassVar[tuple[str, ...]] = ("report",)

    probes: Annotated[
        int,
        "number of each kind: patches of blocks, of noise and of one colour, blends over the "
        "whole image",
    ] = 8
    images: Annotated[int, "clean images that are stamped, the first of the data"] = 128
    shrink: Annotated[
        float, "shrinkage of the covariance towards a multiple of the identity, 0..1"
    ] = 0.1

    def __post_init__(self) -> None:
        random_probes.check_fields(self.probes, self.images, self.shrink)

    def image_passes(self, images: int, classes: int, cost: TowerCost) -> int:
        """Images that go through the encoder."""
        return min(images, self.images) * (1 + self.probes * len(PROBE_KINDS))

    def __call__(
        self, encoder: Encoder, clean: Pairs, seed: int, report: ProgressReport = no_report
    ) -> Verdict:
        """Audit an encoder with images uint8 (N, 3, H, W), N at least 2, H and W at least 8.

        The probes depend on the seed and on the size of the images alone.
        """
        images = random_probes.first_images(clean, self.images, encoder.device, "whitening")
        apply = partial(apply_probe, seed=seed)
        shifts = random_probes.measure_common_shifts(
            encoder, images, PROBE_KINDS, self.probes, apply, self.shrink, report
        )
        lengths = [length for kind in PATCH_KINDS for length in shifts[kind].lengths]
        evidence = {
            f"shift_{kind}": mean_over_probes(
                s.lengths, f"whitened length of the common shift by {kind} probes"
            )
            for kind, s in shifts.items()
        }
        evidence |= {
            f"common_{kind}": mean_over_probes(
                s.shares, f"share of the whitened shift common to images, {kind}"
            )
            for kind, s in shifts.items()
        }
        notes = {"images": len(images), "limits": LIMITS}
        return Verdict(sum(lengths) / len(lengths), evidence, notes=notes)
