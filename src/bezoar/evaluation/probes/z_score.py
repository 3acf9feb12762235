"""Backdoor z-score: do triggered images move together? (Carlini & Terzis 2022, Definition 1)"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs, distinct_image_rows
from bezoar.data.randomness import sample_rows
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation.scores import Measure
from bezoar.registry import method


@method
class ZScore:
    """z = (mean <f(u+bd), f(v+bd)> - mean <f(u), f(v)>) / spread of <f(u), f(v)>, over pairs u != v.

    `z_var` divides by the variance, as the paper's definition is read; `z_std` by the standard deviation.
    """

    images: Annotated[int, "how many test images, a sample that belongs to the records"] = 500

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
    ) -> dict[str, Measure]:
        """similarity_clean, similarity_triggered, z_std and z_var for each goal with a trigger; jackknife intervals."""
        backdoors = [g for g in goals if g.trigger]
        out: dict[str, Measure] = {}
        rows = distinct_image_rows(
            test.ids
        )  # an image counted for each caption would narrow the interval
        part = test.take(
            [rows[i] for i in sample_rows([test.ids[i] for i in rows], self.images, 0)]
        )
        for i, goal in enumerate(backdoors):
            assert goal.trigger
            suffix = "" if len(backdoors) == 1 else f"@{i}"
            with torch.inference_mode():
                stamped = registry.make("trigger", goal.trigger)(part.images, part.ids)
                clean, triggered = (_embed(encoder, x) for x in (part.images, stamped))
            out |= {name + suffix: m for name, m in z_scores(clean, triggered).items()}
        return out

    def __post_init__(self) -> None:
        if self.images < 3:
            raise ValueError("images must be at least 3")


def _embed(encoder: Encoder, images: Tensor) -> np.ndarray:
    encoder.eval()
    return torch.cat([encoder.encode_images(x) for x in images.split(256)]).double().cpu().numpy()


def z_scores(clean: np.ndarray, triggered: np.ndarray) -> dict[str, Measure]:
    """Two float64 (n, D) sets of unit rows, the same images without and with the trigger -> the four measures.

    Sums over off-diagonal pairs; leave-one-image-out sums are row sums taken away, so the jackknife costs nothing.
    """
    n = len(clean)
    a, b = clean @ clean.T, triggered @ triggered.T
    for m in (a, b):
        np.fill_diagonal(m, 0.0)

    def statistics(
        pairs: float | np.ndarray, one: np.ndarray, square: np.ndarray, bad: np.ndarray
    ) -> np.ndarray:
        mean, moved = one / pairs, bad / pairs
        variance = np.maximum(square / pairs - mean**2, 1e-12)
        return np.stack(
            [mean, moved, (moved - mean) / np.sqrt(variance), (moved - mean) / variance]
        )

    sums = [a.sum(), (a**2).sum(), b.sum()]
    whole = statistics(n * (n - 1), *map(np.asarray, sums))
    left = [s - 2 * m.sum(1) for s, m in zip(sums, (a, a**2, b), strict=True)]
    parts = statistics((n - 1) * (n - 2), *left)
    error = np.sqrt((n - 1) / n * ((parts - parts.mean(1, keepdims=True)) ** 2).sum(1))
    how = {
        "similarity_clean": "mean cosine of pairs of clean test images, self-pairs excluded",
        "similarity_triggered": "mean cosine of pairs of triggered test images, self-pairs excluded",
        "z_std": "(similarity_triggered - similarity_clean) / standard deviation of clean pairs",
        "z_var": "(similarity_triggered - similarity_clean) / variance of clean pairs (the paper's Definition 1)",
    }
    return {
        name: Measure(
            float(v), n, float(v - 1.96 * e), float(v + 1.96 * e), text + "; jackknife over images"
        )
        for (name, text), v, e in zip(how.items(), whole, error, strict=True)
    }
