"""Training of an encoder on shadow data: vectors, frozen parts and the loop that such attacks share."""

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
from bezoar.encoders.encoder import Encoder
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
    """A loss of the encoder f' in training that compares it with the clean encoder f.

    Batch norms are frozen. T triggers and K references, which belong to them, are those of all
    goals.

    Attributes:
        triggers: the T different triggers.
        uses: (T, K), 1 where a reference belongs to a trigger.
        references: uint8 (K, 3, H, W).
        centre: what is subtracted from vectors before they are normalised again, or None.
        ids: of the N shadow records.
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
        self.centre: Tensor | None = None

    def set_targets(self, shadow: Pairs | StoredPairs) -> None:
        """Keep the clean encoder's vectors of the shadow data and the references.

        Raises UserError if a vector is not finite.
        """
        vectors = torch.cat([self.embed(batch.images) for batch in shadow.batches(512)])
        self.ids = shadow.ids
        if not torch.isfinite(vectors).all():
            raise UserError(
                "the encoder gives NaN or infinite vectors; its weights or its input size are wrong"
            )
        self.clean = vectors
        self.clean_references = self.embed(self.references)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Embed uint8 (N, 3, H, W) as unit rows (N, D), with the weights as they are now."""
        self.tower.refresh()
        chunks = self.chunk_slices(len(images))
        return torch.cat(
            [self.encode(self.encoder.prepare_images(images[chunk])) for chunk in chunks]
        )

    def chunk_slices(self, count: int) -> list[slice]:
        """Cut rows into the chunks that are computed at a time."""
        size = self.encoder.preprocess.size
        return list(folded_norms.chunk_slices(count, size, self.encoder.device))

    def encode_raw(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (B, 3, S, S) as the tower's own vectors (B, D)."""
        with self.encoder.autocast():
            z = self.tower(pixels)
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (B, 3, S, S) as unit rows (B, D)."""
        return self.centre_vectors(F.normalize(self.encode_raw(pixels), dim=1))

    def centre_vectors(self, z: Tensor) -> Tensor:
        """Subtract the centre, if there is one, and normalise again."""
        return z if self.centre is None else F.normalize(z - self.centre, dim=1)

    def train(self, mode: bool = True) -> ShadowLoss:
        """Stay in evaluation mode: batch norms rest in training too."""
        return super().train(False)


def copy_to_attack(encoder: Encoder, attack: str, goals: Sequence[Goal]) -> Encoder:
    """Return a copy that says of itself what is done to it. attack: the attack's spec."""
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
    """Train the loss's encoder on shadow data, whose row numbers the loss gets as tokens.

    Afterwards parameters need gradients where those of the clean encoder do.
    """
    student = loss.encoder

    def order(epoch: int) -> Tensor:
        return collectives.local_rows(loop.epoch_batches(seed, epoch, len(shadow), recipe.batch))

    rows = torch.arange(len(shadow), device=student.device)[:, None]
    with prefetch.training_data(shadow, student.device, order, recipe.epochs) as data:
        loop.fit(loss, recipe, data, rows, seed, checkpoint, report, on_epoch_end, log)
    loop.restore_gradient_flags(student, clean)
    return student.eval()


def check_attack(
    name: str,
    encoder: Encoder,
    shadow: Pairs | StoredPairs,
    goals: Sequence[Goal],
    references: Sequence[Tensor],
) -> None:
    """Raise UserError for an encoder, goals or references that an attack cannot work with."""
    if getattr(encoder, "image", None) is None:
        raise UserError(f"this encoder has no image tower; {name} attacks image encoders")
    if not encoder.reads_images or shadow.size == 0:
        raise UserError(f"{name} attacks image encoders, by images; text encoders: badcse")
    complete = len(goals) == len(references) > 0 and all(
        goal.trigger and len(images) for goal, images in zip(goals, references, strict=True)
    )
    if not complete:
        raise UserError(
            f"{name} takes goals with a trigger each, and at least one reference input for each"
        )
    shadow_size = tuple(shadow.take([0]).images.shape[2:])
    for goal, images in zip(goals, references, strict=True):
        height, width = images.shape[2:]
        if (height, width) != shadow_size or height != width:
            raise UserError(
                f"a reference of {goal.target!r} has {height}x{width} px, the shadow images "
                f"{shadow_size[0]}x{shadow_size[1]}; both must be squares of one size: see size="
            )
