"""Differential audit against the encoder it was tuned from: which inputs, directions, layers moved out of proportion.

Ours (no paper). Tuning moves the vectors of clean images a little; a backdoor that tuning has put in moves what resembles
its trigger by far more, into one direction. What random probes do to the difference between the two encoders is set
against what that difference is on clean images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from bezoar.auditing.random_probes import PROBE_KINDS, apply_probe, mean_over_probes
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, embed_images
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, average
from bezoar.evaluation.verdict import Verdict
from bezoar.registry import method

FLOOR = 1e-6  # of a mean distance (1 - cosine): float32 vectors do not resolve less
SHOWN = 8  # inputs and layers that notes name
LIMITS = [
    "It tells what tuning has changed: a backdoor that the parent already had is not seen.",
    "Its probes are random patches and blends: of a trigger that they do not resemble it sees nothing.",
]


@method
class Parent:
    """Value: log of the mean distance (1 - cosine) between the two encoders on the probes that part them most, a quarter of
    all, over that on clean images. 0 = in proportion. An encoder that equals its parent has 0."""

    needs: ClassVar[tuple[str, ...]] = ("parent", "report")

    probes: Annotated[
        int,
        "of each kind: patches of blocks, of noise and of one colour, blends over the whole image",
    ] = 8
    images: Annotated[
        int, "clean images that are looked at and stamped, the first of those given"
    ] = 128

    def __post_init__(self) -> None:
        if self.probes < 1 or self.images < 2:
            raise ValueError("needs probes >= 1 and images >= 2")

    def __call__(
        self,
        encoder: Encoder,
        clean: Pairs,
        seed: int,
        parent: Encoder,
        report: Callable[[int, int, str], None] = lambda done, total, text: None,
    ) -> Verdict:
        """clean: uint8 (N, 3, H, W). parent: of the same architecture; UserError for another."""
        moved = layers(encoder, parent)
        images = clean.images[: self.images].to(encoder.device)
        if len(images) < 2 or min(images.shape[-2:]) < 8:
            raise UserError("parent needs at least two clean images of 8 pixels and more a side")

        def apart(x: Tensor) -> tuple[Tensor, Tensor]:
            """1 - cosine (N,) between what the two make of each image, and the difference of their vectors (N, D)."""
            a, b = (embed_images(e, x.split(128)).double() for e in (encoder, parent))
            return 1 - (a * b).sum(1), a - b

        own, shift = apart(images)
        base = max(float(own.mean()), FLOOR)
        ratios: dict[str, list[float]] = {kind: [] for kind in PROBE_KINDS}
        named: list[tuple[float, str]] = []
        shifts = []
        total = self.probes * len(PROBE_KINDS)
        for i in range(total):
            kind, number = PROBE_KINDS[i % len(PROBE_KINDS)], i // len(PROBE_KINDS)
            distance, change = apart(apply_probe(images, kind, number, seed))
            ratio = max(float(distance.mean()), FLOOR) / base
            ratios[kind].append(ratio)
            named.append((ratio, f"{kind} {number}"))
            shifts.append(change.mean(0))
            report(i + 1, total, kind)
        named.sort(reverse=True)
        worst = named[: max(1, total // 4)]
        value = math.log(sum(r for r, _ in worst) / len(worst))
        evidence = {
            f"ratio_{k}": mean_over_probes(v, f"distance of {k} probes over that of clean images")
            for k, v in ratios.items()
        }
        evidence["moved"] = average(own.cpu(), "1 - cosine of clean images to the parent's vectors")
        evidence |= {
            f"directions_{k}": m for k, m in directions(torch.stack(shifts), shift).items()
        }
        evidence["layers"] = layer_ratio(moved)
        notes: dict[str, Any] = {
            "limits": LIMITS,
            "probes": dict((k, r) for r, k in named[:SHOWN]),
            "inputs": {
                clean.ids[i]: float(own[i]) for i in own.argsort(descending=True)[:SHOWN].tolist()
            },
            "layers": dict(sorted(moved.items(), key=lambda kv: -kv[1])[:SHOWN]),
        }
        return Verdict(value, evidence, notes=notes)


def directions(probes: Tensor, clean: Tensor) -> dict[str, Measure]:
    """In how many directions vectors moved: (sum s^2)^2 / sum s^4 over singular values, 1 = all in one; float64.

    probes: (K, D), mean differences of the two encoders on each probe. clean: (N, D), differences on clean images.
    """
    out = {}
    for name, rows, what in (
        ("probes", probes, "the probes' mean shifts"),
        ("clean", clean, "clean images' shifts"),
    ):
        s = torch.linalg.svdvals(rows).square()
        many = float(s.sum().square() / s.square().sum()) if float(s.sum()) > 0 else 0.0
        out[name] = Measure(many, len(rows), many, many, f"participation ratio of {what}, counted")
    return out


def layers(encoder: Encoder, parent: Encoder) -> dict[str, float]:
    """Layer -> |W - W0| / |W0| (Frobenius) of its weights, matrices and filters. Raises UserError for another architecture."""
    own, theirs = encoder.image.state_dict(), parent.image.state_dict()
    odd = sorted(set(own) ^ set(theirs)) + [
        k for k in own if k in theirs and own[k].shape != theirs[k].shape
    ]
    if odd or encoder.preprocess.size != parent.preprocess.size:
        names = [e.about.get("network", "an unnamed network") for e in (encoder, parent)]
        why = (
            f"{odd[0]} differs"
            if odd
            else f"inputs of {encoder.preprocess.size} and {parent.preprocess.size} px"
        )
        raise UserError(
            f"the parent is of another architecture: {names[1]}, and the encoder {names[0]} ({why})"
        )
    out = {}
    for name, w in own.items():
        if w.ndim > 1 and w.is_floating_point():
            old = theirs[name].to(w.device).double()
            out[name] = float((w.double() - old).norm() / old.norm().clamp_min(1e-30))
    return out


def layer_ratio(moved: dict[str, float]) -> Measure:
    """The most moved layer's relative change over the median layer's; 0 where none moved."""
    values = torch.tensor(list(moved.values()), dtype=torch.float64)
    ratio = (
        float(values.max() / values.median().clamp_min(1e-12))
        if len(values) and float(values.max()) > 0
        else 0.0
    )
    how = "largest relative change of a layer's weights over the median layer's, counted"
    return Measure(ratio, len(values), ratio, ratio, how)
