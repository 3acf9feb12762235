"""Verdict: what an audit found in an encoder. A number, what it was made of, and the triggers that were inverted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bezoar.evaluation.scores import Measure


@dataclass(frozen=True)
class Inversion:
    """A trigger that an audit came up with: x -> (1 - mask) x + mask pattern, x in 0..1.

    mask: float32 (1, H, W) in 0..1. pattern: float32 (3, H, W) in 0..1; H, W are those of the clean images it was made on.
    target: the class or cluster that stamped images go to, "" where the audit knows none. norm: sum of the mask, in pixels.
    success: share of stamped images that go there, or, without a target, their mean pairwise cosine.
    """

    mask: Tensor
    pattern: Tensor
    target: str
    norm: float
    success: float

    def __post_init__(self) -> None:
        if (
            self.mask.ndim != 3
            or self.mask.shape[0] != 1
            or self.pattern.shape != (3, *self.mask.shape[1:])
        ):
            raise ValueError(
                f"a mask (1, H, W) and a pattern (3, H, W), not {self.mask.shape} and {self.pattern.shape}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Stamp it. uint8 (N, 3, H, W) -> uint8, or float 0..1 -> float."""
        mask, pattern = self.mask.to(images.device), self.pattern.to(images.device)
        if images.is_floating_point():
            return (1 - mask) * images + mask * pattern
        return ((1 - mask) * images + mask * pattern * 255).round().clamp(0, 255).to(images.dtype)


@dataclass(frozen=True)
class Verdict:
    """How suspicious an encoder is. No threshold: that is a bank's (`bank.Bank`), of encoders like it.

    value: higher = more suspicious, comparable among encoders of one family alone. evidence: what it was computed from, by
    name. inversions: most suspicious first. notes: what the audit says in words and numbers that JSON holds; a key `limits`
    (a list of sentences) says what it could not see here.
    """

    value: float
    evidence: dict[str, Measure] = field(default_factory=dict)
    inversions: tuple[Inversion, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError("a verdict's value must be finite")
