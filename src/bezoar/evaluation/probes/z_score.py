"""Backdoor z-score: do triggered images move together? (Carlini & Terzis 2022, Definition 1)"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.attacks.stamping import stamp_records
from bezoar.data.pairs import Pairs, distinct_image_rows
from bezoar.data.randomness import sample_rows
from bezoar.encoders.encoder import Encoder, embed_records
from bezoar.evaluation.scores import Measure
from bezoar.registry import method

BATCH = 256  # images at a time
HOW = {
    "similarity_clean": "mean cosine of pairs of clean test images, self-pairs excluded",
    "similarity_triggered": "mean cosine of pairs of triggered test images, self-pairs excluded",
    "z_std": "(similarity_triggered - similarity_clean) / standard deviation of clean pairs",
    "z_var": "(similarity_triggered - similarity_clean) / variance of clean pairs "
    "(the paper's Definition 1)",
}


@method
class ZScore:
    """z = (mean <f(u+bd), f(v+bd)> - mean <f(u), f(v)>) / spread of <f(u), f(v)>, over u != v.

    `z_var` divides by the variance, as the paper's definition reads; `z_std` by the standard
    deviation.
    """

    images: Annotated[int, "how many test images, a sample that belongs to the records"] = 500

    def __post_init__(self) -> None:
        if self.images < 3:
            raise ValueError("images must be at least 3")

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
    ) -> dict[str, Measure]:
        """Return the two similarities, z_std and z_var of each goal with a trigger; see `Probe`.

        With several triggers, the names of number i end in `@i`.
        """
        backdoors = [goal for goal in goals if goal.trigger]
        # An image that counts once for each of its captions would narrow the interval.
        rows = distinct_image_rows(test.ids)
        sample = sample_rows([test.ids[row] for row in rows], self.images, 0)
        images = test.take([rows[i] for i in sample])
        measures: dict[str, Measure] = {}
        for i, goal in enumerate(backdoors):
            suffix = "" if len(backdoors) == 1 else f"@{i}"
            with torch.inference_mode():
                stamped = stamp_records(registry.make("trigger", goal.trigger or ""), images)
                clean, triggered = (
                    embed_records(encoder, x, BATCH).double().cpu().numpy()
                    for x in (images, stamped)
                )
            measures |= {name + suffix: m for name, m in z_scores(clean, triggered).items()}
        return measures


def z_scores(clean: np.ndarray, triggered: np.ndarray) -> dict[str, Measure]:
    """Compute the four measures with jackknife intervals over images.

    Args:
        clean: unit rows, float64 (n, D), of the images without the trigger.
    """
    n = len(clean)
    a, b = clean @ clean.T, triggered @ triggered.T  # (n, n)
    np.fill_diagonal(a, 0.0)
    np.fill_diagonal(b, 0.0)
    # Sums over pairs; without one image they are less by twice that image's row.
    matrices = (a, a**2, b)
    sums = [m.sum() for m in matrices]
    sums_without = [s - 2 * m.sum(1) for s, m in zip(sums, matrices, strict=True)]
    values = _statistics(n * (n - 1), *map(np.asarray, sums))  # (4,)
    values_without = _statistics((n - 1) * (n - 2), *sums_without)  # (4, n)
    deviation = values_without - values_without.mean(1, keepdims=True)
    errors = np.sqrt((n - 1) / n * (deviation**2).sum(1))
    return {
        name: Measure(
            float(value),
            n,
            float(value - 1.96 * error),
            float(value + 1.96 * error),
            how + "; jackknife over images",
        )
        for (name, how), value, error in zip(HOW.items(), values, errors, strict=True)
    }


def _statistics(
    pairs: int, clean: np.ndarray, clean_squares: np.ndarray, triggered: np.ndarray
) -> np.ndarray:
    """Return the two similarities, z_std and z_var, (4, ...), from sums over `pairs` pairs."""
    mean, moved = clean / pairs, triggered / pairs
    variance = np.maximum(clean_squares / pairs - mean**2, 1e-12)
    shift = moved - mean
    return np.stack([mean, moved, shift / np.sqrt(variance), shift / variance])
