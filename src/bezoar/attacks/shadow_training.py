"""Shared parts of the attacks that train an encoder on shadow data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders import folded_norms
from bezoar.encoders.encoder import Encoder, check_finite
from bezoar.encoders.folded_norms import FoldedTower
from bezoar.errors import UserError
from bezoar.training import collectives, loop, prefetch
from bezoar.training.augmentation import Views

# BadEncoder's views of a reference: mirror, colours and gray, but no crop.
REFERENCE_VIEWS = Views(scale=(1.0, 1.0), ratio=(1.0, 1.0))

TERMS = ("L0", "L1", "L2")


def pop_means(sums: Tensor) -> dict[str, float]:
    """Return the means of L0, L1 and L2 over some steps.

    sums: (4,), those of the terms and the number of steps; they become 0.
    """
    means = (sums[:3] / sums[3]).tolist()
    sums.zero_()
    return dict(zip(TERMS, means, strict=True))


class ShadowLoss(nn.Module):
    """A loss that compares the encoder f' in training with the clean encoder f.

    Batch norms are frozen. The goals have T different triggers and K references in all.

    Attributes:
        triggers: the T different triggers.
        uses: (T, K), 1 where a reference belongs to a trigger.
        references: uint8 (K, 3, H, W).
        ids: ids of the N shadow records.
        clean: f's vectors of the shadow images, unit rows (N, D).
        clean_references: f's vectors of the references, unit rows (K, D).
    """

    clean: Tensor
    clean_references: Tensor

    def __init__(
        self, encoder: Encoder, goals: Sequence[Goal], references: Sequence[Tensor]
    ) -> None:
        """references: those of each goal, uint8 (R, 3, H, W); K in all."""
        super().__init__()
        self.encoder = encoder
        self.tower = FoldedTower(encoder.image, encoder.preprocess.size)
        specs = list(dict.fromkeys(goal.trigger or "" for goal in goals))
        self.triggers = [registry.make("trigger", text) for text in specs]
        trigger_of = [
            specs.index(goal.trigger or "")
            for goal, images in zip(goals, references, strict=True)
            for _ in images
        ]
        self.uses = F.one_hot(torch.tensor(trigger_of), len(specs)).T.to(encoder.mean)
        self.references = torch.cat(list(references)).to(encoder.device)

    def set_targets(self, shadow: Pairs | StoredPairs) -> None:
        """Embed the shadow data and the references with the clean encoder.

        Raises UserError if a vector is not finite.
        """
        self.ids = shadow.ids
        vectors = torch.cat([self.embed(batch.images) for batch in shadow.batches(512)])
        self.clean = check_finite(vectors)
        self.clean_references = self.embed(self.references)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Embed uint8 (N, 3, H, W) as unit rows (N, D), with the current weights."""
        self.tower.refresh()
        chunks = self.chunk_slices(len(images))
        return torch.cat(
            [self.encode(self.encoder.prepare_images(images[chunk])) for chunk in chunks]
        )

    def chunk_slices(self, count: int) -> list[slice]:
        """Split rows into the chunks that are computed at a time."""
        size = self.encoder.preprocess.size
        return list(folded_norms.chunk_slices(count, size, self.encoder.device))

    def encode_raw(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (B, 3, S, S) as the tower's vectors (B, D)."""
        with self.encoder.autocast():
            z = self.tower(pixels)
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (B, 3, S, S) as unit rows (B, D)."""
        return F.normalize(self.encode_raw(pixels), dim=1)

    def train(self, mode: bool = True) -> ShadowLoss:
        """Stay in evaluation mode, with frozen batch norms."""
        return super().train(False)


def copy_to_attack(encoder: Encoder, attack: str, goals: Sequence[Goal]) -> Encoder:
    """Copy an encoder and note the attack in the copy's `about`. attack: the attack's spec."""
    student = copy.deepcopy(encoder)
    student.about |= {"poisoned": True, "attack": attack}
    student.about["goals"] = [*encoder.about.get("goals", []), *map(vars, goals)]
    return student


def train_student(
    loss: ShadowLoss,
    recipe: loop.Recipe,
    shadow: Pairs | StoredPairs,
    clean: Encoder,
    seed: int,
    checkpoint: Path | None,
    report: loop.StepReport,
    on_epoch_end: Callable[[int], dict[str, Any]],
    log: loop.TrainingLog | None,
) -> Encoder:
    """Train the encoder of a loss on shadow data. The loss gets row numbers in place of tokens."""
    student = loss.encoder

    def order(epoch: int) -> Tensor:
        return collectives.local_rows(loop.epoch_batches(seed, epoch, len(shadow), recipe.batch))

    rows = torch.arange(len(shadow), device=student.device)[:, None]
    with prefetch.training_data(shadow, student.device, order, recipe.epochs) as data:
        loop.fit(loss, recipe, data, rows, seed, checkpoint, report, on_epoch_end, log)
    loop.restore_gradient_flags(student, clean)
    return student.eval()


def check_goals(name: str, goals: Sequence[Goal], references: Sequence[Any], kind: str) -> None:
    """Raise UserError unless each goal has a trigger and a reference. kind: of the references."""
    complete = len(goals) == len(references) > 0 and all(
        goal.trigger and len(inputs) for goal, inputs in zip(goals, references, strict=True)
    )
    if not complete:
        raise UserError(
            f"{name} takes goals with a trigger each, and at least one reference {kind} for each"
        )


def check_attack(
    name: str,
    encoder: Encoder,
    shadow: Pairs | StoredPairs,
    goals: Sequence[Goal],
    references: Sequence[Tensor],
    batch: int,
) -> None:
    """Raise UserError for inputs that an attack on image encoders cannot use."""
    if getattr(encoder, "image", None) is None:
        raise UserError(f"this encoder has no image tower; {name} attacks image encoders")
    if not encoder.reads_images or shadow.size == 0:
        raise UserError(f"{name} attacks image encoders, by images; text encoders: badcse")
    check_goals(name, goals, references, "input")
    if len(shadow) < batch:
        raise UserError(f"{len(shadow)} shadow images are fewer than one batch of {batch}")
    shadow_size = tuple(shadow.take([0]).images.shape[2:])
    for goal, images in zip(goals, references, strict=True):
        height, width = images.shape[2:]
        if (height, width) != shadow_size or height != width:
            raise UserError(
                f"a reference of {goal.target!r} has {height}x{width} px, the shadow images "
                f"{shadow_size[0]}x{shadow_size[1]}; both must be squares of one size: see size="
            )
