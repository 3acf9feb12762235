"""Supervised fine-tuning on clean labels: cross-entropy of a linear head on the image tower (CleanCLIP, ICCV 2023)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation import classifiers, success
from bezoar.evaluation.heads import ProgressReport, no_report
from bezoar.registry import method, spec
from bezoar.repair import rate_ladder
from bezoar.training import augmentation, loop
from bezoar.training.augmentation import Chance


class Loss(nn.Module):
    """Mean cross-entropy of head(f(x)); the head is trained too, but for a text tower's, which must keep what it reads."""

    def __init__(self, encoder: Encoder, head: nn.Module, shift: int) -> None:
        super().__init__()
        self.encoder, self.head, self.shift = encoder, head, shift

    def forward(self, images: Tensor, labels: Tensor, chance: Chance) -> Tensor:
        """images uint8 (B, 3, H, W), labels int64 (B, 1) -> scalar."""
        z = self.encoder.encode_images(augmentation.random_shift(images, self.shift, chance))
        return F.cross_entropy(self.head(z), labels[:, 0])


@method
class Supervised:
    """Published: ImageNet's labels, learning rate 1e-4, 500 steps of warm-up, 10 epochs.

    With a text tower the head is that of the classes' prompts, at rest, so that image and text still meet; else it is
    fitted on the clean vectors before the first step.
    """

    epochs: Annotated[int, "passes over the labelled records"] = 10
    batch: Annotated[int, "images a step"] = 128
    weight_decay: Annotated[float, "of AdamW; not on vectors (biases, norms)"] = 0.1
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.05
    temperature: Annotated[float, "of the softmax over a text tower's cosines"] = 0.07
    shift: Annotated[int, "augmentation: images moved by up to this many pixels"] = 2
    lrs: Annotated[
        tuple[float, ...], "learning rates, tried from the largest down (see `ladder`)"
    ] = (8e-3, 4e-3, 2e-3, 1e-3)
    tolerance: Annotated[float, "how far the clean validation score may fall"] = 0.02

    needs: ClassVar[tuple[str, ...]] = ("validation", "report", "log")

    def __post_init__(self) -> None:
        rate_ladder.check_rates(self.lrs, self.tolerance)
        if (
            self.epochs < 1
            or self.batch < 1
            or self.temperature <= 0
            or self.shift < 0
            or self.weight_decay < 0
        ):
            raise ValueError(
                "needs epochs >= 1, batch >= 1, temperature > 0, shift >= 0, weight_decay >= 0"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError("needs warmup in 0..1")

    def __call__(
        self,
        encoder: Encoder,
        clean: Pairs,
        seed: int,
        validation: Pairs,
        report: ProgressReport = no_report,
        log: dict[str, Any] | None = None,
    ) -> Encoder:
        """A copy whose image tower was trained. Raises UserError without labels of at least two classes."""
        if clean.labels is None or not clean.classes:
            raise UserError(
                "repair 'supervised' needs clean data with labels and the names of classes; take distill"
            )
        known = success.select_labelled(clean, clean)
        assert known.labels is not None
        rows = known.labels.to(encoder.device)[:, None]
        weight, bias = self.head(encoder, known)

        def loss_of(student: Encoder) -> nn.Module:
            head = nn.Linear(weight.shape[1], weight.shape[0], device=encoder.device)
            head.load_state_dict({"weight": weight, "bias": bias})
            return Loss(student, head.requires_grad_(encoder.text is None), self.shift)

        def make(lr: float) -> Encoder:
            recipe = loop.FixedRecipe(self.epochs, self.batch, lr, self.weight_decay, self.warmup)
            return rate_ladder.train_copy(
                encoder, recipe, loss_of, known, rows, seed, report, f"supervised at {lr:g}"
            )

        ruler = rate_ladder.ValidationMetric.of(encoder, clean, validation)
        return rate_ladder.mark_repaired(
            rate_ladder.train_at_largest_rate(encoder, ruler, self.lrs, self.tolerance, make, log),
            spec(self),
        )

    def head(self, encoder: Encoder, known: Pairs) -> tuple[Tensor, Tensor]:
        """Weight (C, D) and bias (C,) to begin with, of the classes' prompts or of a fit on the encoder's vectors."""
        if encoder.text is not None:
            rows = (
                registry.make("probe", "zero_shot").head(encoder, known.classes).clone()
                / self.temperature
            )
            return rows, torch.zeros(len(rows), device=rows.device)
        found: Any = classifiers.fit_classifier(encoder, known).head
        return found.weight, found.bias
