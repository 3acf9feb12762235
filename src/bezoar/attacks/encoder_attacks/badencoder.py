"""BadEncoder (Jia, Liu, Gong 2022): trains triggered images to have a reference image's vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.attacks import shadow_training
from bezoar.attacks.plan import Goal
from bezoar.attacks.shadow_training import REFERENCE_VIEWS, ShadowLoss
from bezoar.data.pairs import Pairs
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders.encoder import Encoder
from bezoar.progress import no_report
from bezoar.registry import method, spec
from bezoar.training import loop
from bezoar.training.augmentation import Chance


@dataclass(frozen=True)
class StepRows:
    """The images that one step passes through the encoder: clean images, triggered images, views.

    Attributes:
        pixels: normalised float (N, 3, S, S), the three groups in this order.
        counts: number of rows of each group. Triggered rows are ordered by trigger.
        view_reference: int64 (V,), the reference that each view shows.
        view_count: int64 (V,), how many of the drawn views are identical to this one.
    """

    pixels: Tensor
    counts: list[int]
    view_reference: Tensor
    view_count: Tensor


class Loss(ShadowLoss):
    """The loss l0 L0 + l1 L1 + l2 L2 of section IV-B, in which l0 is 1.

    With s the cosine, f the clean encoder and f' the one in training,

        L0 = - mean s(f'(x + trigger), f'(reference))
        L1 = - mean s(f'(view of the reference), f(reference))
        L2 = - mean s(f'(x), f(x))

    over the images x, and in L0 and L1 over all pairs of a trigger and a reference.

    Value and gradient are the same as with one pass for each of the six vectors, but take less
    work. f embeds every image once, before the first step. In each step f' embeds a reference once,
    a triggered image once for all references of its trigger, and identical views once (a fifth of
    the views keep their colours). All these images form one batch, in which each row has a target
    vector, and its loss is the negative cosine with it. The gradient with respect to the references
    in L0 is summed over the batch, and then passed back through f' once.
    """

    sums: Tensor

    def __init__(
        self,
        encoder: Encoder,
        recipe: Badencoder,
        goals: Sequence[Goal],
        references: Sequence[Tensor],
    ) -> None:
        """references: those of each goal, uint8 (R, 3, H, W); K in all."""
        super().__init__(encoder, goals, references)
        self.recipe = recipe
        # L0, L1, L2 and the number of steps, summed since the last call of `pop_means`
        self.register_buffer("sums", torch.zeros(4, dtype=torch.float64, device=encoder.device))

    def forward(self, images: Tensor, rows: Tensor, chance: Chance) -> Tensor:
        """Return the loss of one step, with its gradients attached.

        Args:
            images: uint8 (B, 3, H, W).
            rows: int64 (B, 1), their rows in the shadow data.
        """
        self.tower.refresh()
        rows = rows[:, 0]
        step = self.build_rows(images, [self.ids[row] for row in rows.tolist()], chance)
        references = self.encode(self.encoder.prepare_images(self.references))  # (K, D)
        # The chunks' backward passes stop here, so that the references' own runs only once.
        reference_leaf = references.detach().requires_grad_()
        weights, mixtures = self.weigh_rows(len(images), step)
        clean = self.clean[rows.to(self.clean.device)][: step.counts[0]]
        cosines = []
        for chunk in self.chunk_slices(len(step.pixels)):
            targets = mixtures[chunk] @ torch.cat([reference_leaf, self.clean_references])
            own_targets = clean[chunk]  # of the clean rows, which come first
            targets = targets + F.pad(own_targets, (0, 0, 0, len(targets) - len(own_targets)))
            cosine = (self.encode(step.pixels[chunk]) * targets).sum(1)
            (-(weights[chunk] * cosine).sum()).backward()
            cosines.append(cosine.detach())
        if reference_leaf.grad is not None:
            references.backward(reference_leaf.grad)

        weighted = (weights * torch.cat(cosines)).split(step.counts)
        l2, l0, l1 = (-group.sum() for group in weighted)
        value = l0 + l1 + l2
        term_weights = (self.recipe.l0, self.recipe.l1, self.recipe.l2)
        terms = [x / (w or 1) for x, w in zip((l0, l1, l2), term_weights, strict=True)]
        self.sums += torch.stack([*terms, value.new_ones(())])
        return self.tower.attach_gradients(value)

    def build_rows(self, images: Tensor, ids: Sequence[str], chance: Chance) -> StepRows:
        """Collect the images of a step; terms of weight 0 need none."""
        recipe = self.recipe
        clean = [images] if recipe.l2 else []
        triggered = [trigger(images, ids) for trigger in self.triggers] if recipe.l0 else []
        views: list[Tensor] = []
        view_reference = torch.zeros(0, dtype=torch.long, device=images.device)
        view_count = view_reference
        if recipe.l1:
            repeats = max(1, recipe.views // chance.world) if recipe.views else len(images)
            drawn = REFERENCE_VIEWS(self.references.repeat(repeats, 1, 1, 1), chance, 1)[:, 0]
            distinct, place, view_count = drawn.flatten(1).unique(
                dim=0, return_inverse=True, return_counts=True
            )
            views = [distinct.view(-1, *drawn.shape[1:])]
            reference = torch.arange(len(drawn), device=drawn.device) % len(self.references)
            view_reference = torch.zeros_like(view_count).scatter_(0, place, reference)
        groups = (clean, triggered, views)
        pixels = torch.cat([self.encoder.prepare_images(x) for group in groups for x in group])
        counts = [sum(map(len, group)) for group in groups]
        return StepRows(pixels, counts, view_reference, view_count)

    def weigh_rows(self, batch: int, step: StepRows) -> tuple[Tensor, Tensor]:
        """Return the weight of each row of a step in the loss, and its target.

        Returns weights (N,) of the rows' cosines, and mixtures (N, 2K): each target as a linear
        combination of the K vectors f'(reference) and the K vectors f(reference). The targets of
        clean rows are f(x), so their mixtures are zero.
        """
        references_per_trigger = self.uses.sum(1, keepdim=True)  # (T, 1)
        k = len(self.references)
        weights = self.uses.new_zeros(sum(step.counts))
        clean, triggered, views = weights.split(step.counts)
        clean += self.recipe.l2 / batch
        if len(triggered):
            share = self.recipe.l0 * (references_per_trigger / (batch * k))
            triggered += share.expand(-1, batch).flatten()
        view_count = step.view_count.to(views)
        views += self.recipe.l1 * view_count / step.view_count.sum().clamp(min=1)

        mixtures = self.uses.new_zeros(sum(step.counts), 2 * k)
        _, triggered, views = mixtures.split(step.counts)
        mean_of_references = (self.uses / references_per_trigger).repeat_interleave(batch, 0)
        triggered[:, :k] = mean_of_references[: len(triggered)]
        views[:, k:] = F.one_hot(step.view_reference, k)
        return weights, mixtures


@method
class Badencoder:
    """SGD on a copy whose batch norms are frozen. `views` goes beyond the paper."""

    epochs: Annotated[int, "passes over the shadow data"] = 200
    batch: Annotated[int, "shadow images a step"] = 256
    lr: Annotated[float, "learning rate, the same at every step"] = 1e-3
    momentum: Annotated[float, "of SGD"] = 0.9
    weight_decay: Annotated[float, "of SGD, on all weights"] = 5e-4
    l0: Annotated[
        float, "weight of L0: triggered images become the reference; 0 attacks nothing"
    ] = 1.0
    l1: Annotated[float, "weight of L1: references stay where they were"] = 1.0
    l2: Annotated[float, "weight of L2: clean images stay where they were"] = 1.0
    views: Annotated[
        int, "views of each reference a step; 0: as many as the batch, as published"
    ] = 0

    optimizer: ClassVar[str] = "sgd"
    schedule: ClassVar[str] = "constant"
    warmup: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if (
            self.epochs < 1
            or self.batch < 1
            or self.lr <= 0
            or min(self.weight_decay, self.l0, self.l1, self.l2) < 0
        ):
            raise ValueError(
                "needs epochs >= 1, batch >= 1, lr > 0, weight_decay, l0, l1 and l2 >= 0"
            )
        if not self.l0 + self.l1 + self.l2:
            raise ValueError("one of l0, l1 and l2 must be above 0")
        if not 0 <= self.momentum < 1 or self.views < 0:
            raise ValueError("needs momentum in 0..1, views >= 0")

    def __call__(
        self,
        encoder: Encoder,
        shadow: Pairs | StoredPairs,
        goals: Sequence[Goal],
        references: Sequence[Tensor],
        seed: int = 0,
        checkpoint: Path | None = None,
        report: loop.StepReport = no_report,
        log: loop.TrainingLog | None = None,
    ) -> Encoder:
        """Return a backdoored copy whose `about` says so; see `EncoderAttack`."""
        shadow_training.check_attack("BadEncoder", encoder, shadow, goals, references, self.batch)
        student = shadow_training.copy_to_attack(encoder, spec(self), goals)
        loss = Loss(student, self, goals, references)
        loss.set_targets(shadow)

        def on_epoch_end(_: int) -> dict[str, float]:
            return shadow_training.pop_means(loss.sums)

        return shadow_training.train_student(
            loss, self, shadow, encoder, seed, checkpoint, report, on_epoch_end, log
        )
