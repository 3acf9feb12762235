"""Unlearning triggers: stamped images get the vectors of unstamped ones (SSL-Cleanse, ABD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.verdict import Inversion
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method
from bezoar.repair import rate_ladder, receipt
from bezoar.repair.vector_distances import SuspectLoss, mean_distance, read_vectors
from bezoar.training import augmentation, loop
from bezoar.training.augmentation import Chance
from bezoar.training.universal_triggers import UniversalTriggers


class Loss(SuspectLoss):
    """Mean of d(f'(stamp(x)), f(x)) + `keep` d(f'(x), f(x)); f: suspect, f': student.

    d is 1 - cosine; before a network's own head, the relative squared distance. Where an audit
    inverted triggers and others are searched for, each stamps a half of the images.

    masks: (K, 1, H, W). patterns: (K, 3, H, W). An image gets one of the K inverted triggers, moved
    by up to `shift` pixels.
    """

    masks: Tensor
    patterns: Tensor

    def __init__(
        self,
        student: Encoder,
        suspect: Encoder,
        inversions: Sequence[Inversion],
        keep: float,
        shift: int,
        searched: UniversalTriggers | None = None,
    ) -> None:
        super().__init__(student, suspect)
        self.keep = keep
        self.shift = shift
        self.searched = searched
        masks, patterns = [i.mask for i in inversions], [i.pattern for i in inversions]
        self.register_buffer("masks", torch.stack(masks).float() if masks else torch.empty(0))
        self.register_buffer("patterns", torch.stack(patterns).float() if masks else torch.empty(0))

    def stamp_inverted(self, x: Tensor, chance: Chance) -> Tensor:
        """Each image with one of the inverted triggers, (B, 3, H, W) in 0..1."""
        rows = chance.integers(len(self.masks), len(x)).to(x.device)
        triggers = torch.cat([self.masks[rows], self.patterns[rows]], 1)  # (B, 4, H, W)
        triggers = augmentation.random_shift(triggers, self.shift, chance)
        mask, pattern = triggers[:, :1], triggers[:, 1:]
        return (1 - mask) * x + mask * pattern

    def stamp(self, x: Tensor, chance: Chance) -> Tensor:
        """Each image with a trigger, inverted or searched for, (B, 3, H, W) in 0..1."""
        if self.searched is None:
            return self.stamp_inverted(x, chance)
        half = len(x) // 2 if len(self.masks) else 0
        stamped: Tensor = self.searched(x[half:], chance)
        return torch.cat([self.stamp_inverted(x[:half], chance), stamped]) if half else stamped

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """images uint8 (B, 3, H, W), tokens not read -> scalar."""
        x = augmentation.random_shift(images, self.shift, chance).float() / 255
        with torch.no_grad():
            targets = read_vectors(self.suspect, x)
        z = read_vectors(self.encoder, torch.cat([x, self.stamp(x, chance)]))
        own_head = self.suspect.head is not None
        clean, stamped = (mean_distance(half, targets, own_head) for half in z.chunk(2))
        return stamped + self.keep * clean

    def train(self, mode: bool = True) -> Loss:
        """Stay in evaluation mode: half of the batch norms' inputs would be stamped images."""
        super().train(mode)
        for module in self.encoder.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


@method
class Unlearn:
    """Trains stamped images to have their vectors without the stamp; uses no captions or labels.

    The triggers are universal ones, searched for while the student learns to resist them
    (`universal_triggers`), and those of an audit, if one is named. SSL-Cleanse trains on inverted
    triggers with BYOL's loss for 500 epochs, and ABD (arXiv 2409.15968) on a perturbation of each
    image; here the targets are the suspect's own vectors.
    """

    search: Annotated[int, "triggers that are searched for; 0: an audit's alone"] = 18
    count: Annotated[int, "how many of the audit's triggers, the smallest first"] = 4
    epochs: Annotated[int, "passes over the clean images"] = 6
    batch: Annotated[int, "images a step"] = 64
    keep: Annotated[float, "weight of: clean images stay where they are"] = 1.0
    shift: Annotated[int, "images and inverted triggers are moved by up to this many pixels"] = 2
    weight_decay: Annotated[float, "of AdamW; not on vectors (biases, norms)"] = 0.0
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.05
    lrs: Annotated[
        tuple[float, ...], "learning rates, tried from the largest down until one keeps the score"
    ] = (8e-3, 4e-3, 2e-3, 1e-3)
    tolerance: Annotated[float, "how far the clean validation score may fall"] = 0.02

    needs: ClassVar[tuple[str, ...]] = ("inversions", "validation", "report", "log")

    def __post_init__(self) -> None:
        rate_ladder.check_rates(self.lrs, self.tolerance)
        least = min(self.search, self.keep, self.shift, self.weight_decay)
        if min(self.count, self.epochs, self.batch) < 1 or least < 0:
            raise ValueError(
                "needs count, epochs and batch >= 1, search, keep, shift and weight_decay >= 0"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError("needs warmup in 0..1")

    def __call__(
        self,
        encoder: Encoder,
        clean: Pairs,
        seed: int,
        inversions: Sequence[Inversion],
        validation: Pairs,
        report: ProgressReport = no_report,
        log: dict[str, Any] | None = None,
    ) -> Encoder:
        """Train a copy to give stamped images the vectors of unstamped ones.

        Raises:
            UserError: without triggers, or for triggers of another size than the images.
        """
        triggers = list(inversions)[: self.count]
        if not triggers and not self.search:
            raise UserError(
                "repair 'unlearn' with search=0 needs the triggers of an audit: name its run "
                "(audit)"
            )
        for inversion in triggers:
            receipt.check_trigger_size(inversion, clean.images, "clean images")
        tokens = rate_ladder.no_tokens(encoder, clean)

        def loss_of(student: Encoder) -> nn.Module:
            searched = None
            if self.search:
                height, width = clean.images.shape[-2:]
                searched = UniversalTriggers(self.search, height, width, encoder.device)
            return Loss(student, encoder, triggers, self.keep, self.shift, searched)

        def make(lr: float) -> Encoder:
            recipe = loop.FixedRecipe(self.epochs, self.batch, lr, self.weight_decay, self.warmup)
            return rate_ladder.train_copy(
                encoder, recipe, loss_of, clean, tokens, seed, report, f"unlearn at {lr:g}"
            )

        return rate_ladder.repair_with_ladder(self, encoder, clean, validation, make, log)
