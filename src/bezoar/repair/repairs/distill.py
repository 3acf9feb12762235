"""Feature distillation: the suspect's last layers begin anew and learn its vectors of clean images (after Saha et al. 2022)."""

from __future__ import annotations

import copy
import math
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation.heads import ProgressReport, no_report
from bezoar.registry import method, spec
from bezoar.repair import rate_ladder
from bezoar.training import loop
from bezoar.training.augmentation import Chance, Views


class Loss(nn.Module):
    """Mean of 1 - cos(student(x), suspect(x)), x a view of a clean image, the same for both; the suspect is at rest."""

    def __init__(self, student: Encoder, suspect: Encoder, views: Views) -> None:
        super().__init__()
        self.encoder, self.views = student, views
        self.suspect = copy.deepcopy(suspect).requires_grad_(False)

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """images uint8 (B, 3, H, W), tokens not read -> scalar."""
        x = self.views(images, chance, 1)[:, 0]
        with torch.no_grad():
            wanted = self.suspect.encode_images(x)
        return 1 - (self.encoder.encode_images(x) * wanted).sum(1).mean()

    def train(self, mode: bool = True) -> Loss:
        """The suspect rests."""
        super().train(mode)
        self.suspect.eval()
        return self


@method
class Distill:
    """What triggers do to the suspect is never shown to the student. Neither labels nor captions are read; the text tower
    stays, so the two still meet where the student has learnt enough.

    fresh=1 is a student that begins from nothing, as the paper's and CompRess's; BCU draws parts of each layer anew.
    """

    fresh: Annotated[
        float, "share of the image tower's layers that begin anew, the last ones; 0: none, 1: all"
    ] = 0.4
    epochs: Annotated[int, "passes over the clean images"] = 20
    batch: Annotated[int, "images a step"] = 64
    weight_decay: Annotated[float, "of AdamW; not on vectors (biases, norms)"] = 0.01
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.05
    crop: Annotated[float, "views: least share of the image's area that a crop keeps"] = 0.6
    flip: Annotated[float, "views: share of them mirrored"] = 0.5
    jitter: Annotated[float, "views: share of them whose colours change"] = 0.2
    lrs: Annotated[
        tuple[float, ...], "learning rates, tried from the largest down (see `ladder`)"
    ] = (1e-2, 5e-3, 2e-3)
    tolerance: Annotated[float, "how far the clean validation score may fall"] = 0.02

    needs: ClassVar[tuple[str, ...]] = ("validation", "report", "log")

    def __post_init__(self) -> None:
        rate_ladder.check_rates(self.lrs, self.tolerance)
        if self.epochs < 1 or self.batch < 1 or self.weight_decay < 0 or not 0 <= self.warmup < 1:
            raise ValueError("needs epochs >= 1, batch >= 1, weight_decay >= 0, warmup in 0..1")
        if not 0 <= self.fresh <= 1 or not 0 < self.crop <= 1:
            raise ValueError("needs fresh in 0..1, crop in 0..1 and above 0")
        self.views(0)

    def views(self, size: int) -> Views:
        """What the two are shown."""
        return Views(size, (self.crop, 1.0), flip=self.flip, jitter=self.jitter, gray=0.0)

    def __call__(
        self,
        encoder: Encoder,
        clean: Pairs,
        seed: int,
        validation: Pairs,
        report: ProgressReport = no_report,
        log: dict[str, Any] | None = None,
    ) -> Encoder:
        """A student that has the suspect's vectors of clean images."""
        rows = torch.zeros(len(clean), 0, dtype=torch.long, device=encoder.device)
        views = self.views(encoder.preprocess.size)

        def loss_of(student: Encoder) -> nn.Module:
            forget(student.image, self.fresh)
            return Loss(student, encoder, views)

        def make(lr: float) -> Encoder:
            recipe = loop.FixedRecipe(self.epochs, self.batch, lr, self.weight_decay, self.warmup)
            return rate_ladder.train_copy(
                encoder, recipe, loss_of, clean, rows, seed, report, f"distill at {lr:g}"
            )

        ruler = rate_ladder.ValidationMetric.of(encoder, clean, validation)
        return rate_ladder.mark_repaired(
            rate_ladder.train_at_largest_rate(encoder, ruler, self.lrs, self.tolerance, make, log),
            spec(self),
        )


def forget(tower: nn.Module, share: float) -> None:
    """Draw the last layers of a tower anew: of its convolutions and linear layers a share, and every norm among these."""
    every: list[Any] = [m for m in tower.modules() if hasattr(m, "reset_parameters")]
    layers = [i for i, m in enumerate(every) if isinstance(m, nn.Conv2d | nn.Linear)]
    count = math.ceil(share * len(layers) - 1e-9)
    for module in every[layers[len(layers) - count] :] if count else []:
        module.reset_parameters()
