"""Feature distillation: last layers learn the suspect's vectors anew (after Saha et al. 2022)."""

import math
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method
from bezoar.repair import rate_ladder
from bezoar.repair.vector_distances import SuspectLoss, mean_distance, read_vectors
from bezoar.training import loop
from bezoar.training.augmentation import Chance, Views


class Loss(SuspectLoss):
    """Mean distance of student(x) to suspect(x): 1 - cosine, or that of the own head's inputs.

    x is a view of a clean image, the same for both.
    """

    def __init__(self, student: Encoder, suspect: Encoder, views: Views) -> None:
        super().__init__(student, suspect)
        self.views = views

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """images uint8 (B, 3, H, W), tokens not read -> scalar."""
        x = self.views(images, chance, 1)[:, 0]  # (B, 3, S, S)
        with torch.no_grad():
            targets = read_vectors(self.suspect, x)
        z = read_vectors(self.encoder, x)
        return mean_distance(z, targets, self.suspect.head is not None)


@method
class Distill:
    """The student never sees how the suspect responds to triggers.

    Labels and captions are not used. The text tower is kept, so the two towers still agree once the
    student has learnt enough. With fresh=1 the student starts from random weights, as in the paper
    and in CompRess; BCU reinitialises parts of each layer.
    """

    fresh: Annotated[
        float, "share of the image tower's layers, the last ones, that are reinitialised; 1: all"
    ] = 0.4
    epochs: Annotated[int, "passes over the clean images"] = 20
    batch: Annotated[int, "images a step"] = 64
    weight_decay: Annotated[float, "of AdamW; not on vectors (biases, norms)"] = 0.01
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.05
    crop: Annotated[float, "views: least share of the image's area that a crop keeps"] = 0.6
    flip: Annotated[float, "views: share of them mirrored"] = 0.5
    jitter: Annotated[float, "views: share of them whose colours change"] = 0.2
    lrs: Annotated[
        tuple[float, ...], "learning rates, tried from the largest down until one keeps the score"
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
        """The augmentation of the images. Raises ValueError for invalid fields."""
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
        """Distil a suspect into a student that has its vectors of clean images."""
        tokens = rate_ladder.no_tokens(encoder, clean)
        views = self.views(encoder.preprocess.size)

        def loss_of(student: Encoder) -> nn.Module:
            reset_last_layers(student.image, self.fresh)
            return Loss(student, encoder, views)

        def make(lr: float) -> Encoder:
            recipe = loop.FixedRecipe(self.epochs, self.batch, lr, self.weight_decay, self.warmup)
            return rate_ladder.train_copy(
                encoder, recipe, loss_of, clean, tokens, seed, report, f"distill at {lr:g}"
            )

        return rate_ladder.repair_with_ladder(self, encoder, clean, validation, make, log)


def reset_last_layers(tower: nn.Module, share: float) -> None:
    """Draw anew the last `share` of a tower's convolutions and linear layers, with their norms."""
    modules: list[Any] = [m for m in tower.modules() if hasattr(m, "reset_parameters")]
    layers = [i for i, m in enumerate(modules) if isinstance(m, nn.Conv2d | nn.Linear)]
    count = math.ceil(share * len(layers) - 1e-9)
    first = layers[len(layers) - count] if count else len(modules)
    for module in modules[first:]:
        module.reset_parameters()
