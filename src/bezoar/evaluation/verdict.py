"""Verdict: the result of an audit of an encoder, with inverted triggers."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bezoar.evaluation.scores import Measure


@dataclass(frozen=True)
class Inversion:
    """A trigger that an audit reconstructed: x -> (1 - mask) x + mask pattern, with x in 0..1."""

    mask: Tensor  # float32 (1, H, W) in 0..1; H and W are those of the clean images it was made on
    pattern: Tensor  # float32 (3, H, W) in 0..1
    target: str  # the class or cluster that stamped images go to, empty if the audit knows none
    norm: float  # sum of the mask, in pixels
    # share of stamped images that reach the target; without a target, their mean pairwise cosine
    success: float

    def __post_init__(self) -> None:
        one_channel = self.mask.ndim == 3 and self.mask.shape[0] == 1
        if not one_channel or self.pattern.shape != (3, *self.mask.shape[1:]):
            raise ValueError(
                f"a mask (1, H, W) and a pattern (3, H, W), not {self.mask.shape} and "
                f"{self.pattern.shape}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Stamp images (N, 3, H, W), uint8 or float 0..1; the result has the same dtype."""
        mask = self.mask.to(images.device)
        pattern = self.pattern.to(images.device)
        if images.is_floating_point():
            return (1 - mask) * images + mask * pattern
        stamped = (1 - mask) * images + mask * pattern * 255
        return stamped.round().clamp(0, 255).to(images.dtype)


@dataclass(frozen=True)
class Verdict:
    """How suspicious an encoder is. The threshold comes from a bank of similar encoders."""

    value: float  # higher is more suspicious; comparable only among encoders of one family
    # the measures that the value was computed from, by name
    evidence: dict[str, Measure] = field(default_factory=dict)
    inversions: tuple[Inversion, ...] = ()  # reconstructed triggers, the most suspicious first
    # further facts, as JSON. A key `limits`, a list of sentences, names what the audit could not
    # see here
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError("a verdict's value must be finite")
