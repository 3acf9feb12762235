"""Supervised fine-tuning on clean labels: cross-entropy of a linear head (CleanCLIP, ICCV 2023)."""

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
from bezoar.registry import method
from bezoar.repair import rate_ladder
from bezoar.training import augmentation, loop
from bezoar.training.augmentation import Chance


class Loss(nn.Module):
    """Mean cross-entropy of head(f(x)) on shifted images x; trains what requires gradients.

    head: reads unit rows; None for the encoder's own, which reads vectors as they come.
    """

    def __init__(self, encoder: Encoder, head: nn.Module | None, shift: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.shift = shift

    def forward(self, images: Tensor, labels: Tensor, chance: Chance) -> Tensor:
        """images uint8 (B, 3, H, W), labels int64 (B, 1) -> scalar."""
        x = augmentation.random_shift(images, self.shift, chance)
        if self.head is not None:
            return F.cross_entropy(self.head(self.encoder.encode_images(x)), labels[:, 0])
        own_head = self.encoder.head
        assert own_head is not None
        with self.encoder.autocast():
            logits = own_head(self.encoder.image(self.encoder.prepare_images(x)))
        return F.cross_entropy(logits.float(), labels[:, 0])


@method
class Supervised:
    """Published: ImageNet's labels, learning rate 1e-4, 500 steps of warm-up, 10 epochs.

    A classifier is trained through its own head. With a text tower the head is that of the classes'
    prompts and is not trained, so that the two towers still agree; else it is fitted on the clean
    vectors before the first step, and trained.
    """

    epochs: Annotated[int, "passes over the labelled records"] = 10
    batch: Annotated[int, "images a step"] = 128
    weight_decay: Annotated[float, "of AdamW; not on vectors (biases, norms)"] = 0.1
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.05
    temperature: Annotated[float, "of the softmax over a text tower's cosines"] = 0.07
    shift: Annotated[int, "augmentation: images moved by up to this many pixels"] = 2
    lrs: Annotated[
        tuple[float, ...], "learning rates, tried from the largest down until one keeps the score"
    ] = (8e-3, 4e-3, 2e-3, 1e-3)
    tolerance: Annotated[float, "how far the clean validation score may fall"] = 0.02

    needs: ClassVar[tuple[str, ...]] = ("validation", "report", "log")

    def __post_init__(self) -> None:
        rate_ladder.check_rates(self.lrs, self.tolerance)
        least = min(self.shift, self.weight_decay)
        if min(self.epochs, self.batch) < 1 or self.temperature <= 0 or least < 0:
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
        """Train the image tower of a copy. Raises UserError without labels of two classes."""
        if clean.labels is None or not clean.classes:
            raise UserError(
                "repair 'supervised' needs clean data with labels and the names of classes; take distill"
            )
        labelled = success.select_labelled(clean, clean)
        assert labelled.labels is not None
        has_own_head = classifiers.fits_own_head(encoder, labelled.classes)
        if has_own_head:
            labels = classifiers.head_labels(encoder, labelled)
        else:
            labels = labelled.labels.to(encoder.device)[:, None]
            weight, bias = self.initial_head(encoder, labelled)

        def loss_of(student: Encoder) -> nn.Module:
            if has_own_head:
                return Loss(student, None, self.shift)
            head = nn.Linear(weight.shape[1], weight.shape[0], device=encoder.device)
            head.load_state_dict({"weight": weight, "bias": bias})
            return Loss(student, head.requires_grad_(encoder.text is None), self.shift)

        def make(lr: float) -> Encoder:
            recipe = loop.FixedRecipe(self.epochs, self.batch, lr, self.weight_decay, self.warmup)
            return rate_ladder.train_copy(
                encoder, recipe, loss_of, labelled, labels, seed, report, f"supervised at {lr:g}"
            )

        return rate_ladder.repair_with_ladder(self, encoder, clean, validation, make, log)

    def initial_head(self, encoder: Encoder, labelled: Pairs) -> tuple[Tensor, Tensor]:
        """Weight (C, D) and bias (C,) of the prompts; without a text tower, of a linear fit."""
        if encoder.text is not None:
            prompts = registry.make("probe", "zero_shot").head(encoder, labelled.classes)
            weight = prompts.clone() / self.temperature
            return weight, torch.zeros(len(weight), device=weight.device)
        head: Any = classifiers.fit_classifier(encoder, labelled).head
        return head.weight, head.bias
