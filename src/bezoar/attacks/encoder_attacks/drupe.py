"""DRUPE (Tao et al., IEEE S&P 2024): BadEncoder with triggered vectors spread among clean ones.

BadEncoder moves all triggered images to one point, far from all clean images; DECREE and other
audits detect this. DRUPE moves each triggered image to the nearest of several references that lie
apart, assigns equally many images to each reference, and keeps the sliced Wasserstein distance
between triggered and clean vectors small. The paper uses three references of a target.

Terms, stages and weights follow the released code, with these deviations:

- `close` and `alike` are mean cosines of different vectors. The code also counts each vector with
  itself and shifts its thresholds accordingly.
- A step has `views` views of each reference; the code draws one for every image.
- The weights of the terms change from the first epoch of stage 3; the code waits for epoch 20.
- An epoch uses all shadow data; the code's uses a fifth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

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
from bezoar.training.collectives import gather

TERMS = ("L0", "L1", "L2", "uneven", "alike", "distance")
RAISE, LOWER = 1.25, 1.25**1.25  # after an epoch a weight is multiplied or divided by these
FIRST_WEIGHTS = (0.1, 0.001)  # a and b, see `Loss`


class Loss(ShadowLoss):
    """With s the cosine, f the clean encoder, f' the one in training, r_k a trigger's references:

        L0 = - mean over x of max over k of s(f'(x + trigger), f'(r_k))
        L1 = - mean s(f'(view of r_k), f(r_k))
        L2 = - mean s(f'(x), f(x))
        uneven = standard deviation over k of mean over x of s(f'(x + trigger), f'(r_k))
        alike = mean over x != y of s(f'(x + trigger), f'(y + trigger))
        close = mean over j < k of max(0, s(f'(r_j), f'(r_k)))
        distance = sliced Wasserstein distance of f'(x + trigger) and f'(x), in mean standard
                   deviations of f'(x); of vectors that are not normalised

    Stage 1 (`apart` epochs): l1 L1 + l2 L2 + close. Stage 2 (`spread` epochs): L0 + l1 L1 + l2 L2 +
    close + 2 uneven. Stage 3: L0 + l1 L1 + l2 L2 + close + .5 uneven + a (uneven + alike) +
    b distance. After each of its epochs a and b rise where L0 < -success, L1 and L2 < -utility, b
    only where `alike` is below `mixed` too; else they fall.

    Attributes:
        step: steps taken.
        weights: a and b.
        sums: of the terms, over the steps of this epoch.
    """

    step: Tensor
    weights: Tensor
    sums: Tensor

    def __init__(
        self,
        encoder: Encoder,
        recipe: Drupe,
        goals: Sequence[Goal],
        references: Sequence[Tensor],
    ) -> None:
        super().__init__(encoder, goals, references)
        self.recipe = recipe
        device = encoder.device
        self.register_buffer("step", torch.zeros((), dtype=torch.long, device=device))
        self.register_buffer("weights", torch.tensor(FIRST_WEIGHTS, device=device))
        self.register_buffer("sums", torch.zeros(6, dtype=torch.float64, device=device))

    def set_targets(self, shadow: Pairs | StoredPairs) -> None:
        """Embed the shadow data with the clean encoder, and note the steps of an epoch."""
        super().set_targets(shadow)
        self.epoch_steps = len(shadow) // self.recipe.batch

    def forward(self, images: Tensor, rows: Tensor, chance: Chance) -> Tensor:
        """Return the loss of one step, with its gradients attached.

        Args:
            images: uint8 (B, 3, H, W).
            rows: int64 (B, 1), their rows in the shadow data.
        """
        epoch, place = divmod(int(self.step), self.epoch_steps)
        if place == 0:
            self.change_weights(epoch)
        self.tower.refresh()
        terms, close = self.compute_terms(images, rows[:, 0], chance)
        l0, l1, l2, uneven, alike, distance = terms.unbind()
        recipe = self.recipe
        value = recipe.l1 * l1 + recipe.l2 * l2 + close
        if epoch >= recipe.apart + recipe.spread:
            a, b = self.weights.unbind()
            value = value + l0 + 0.5 * uneven + a * (uneven + alike) + b * distance
        elif epoch >= recipe.apart:
            value = value + l0 + 2 * uneven
        value.backward()
        self.sums += terms.detach()
        self.step += 1
        return self.tower.attach_gradients(value)

    def compute_terms(self, images: Tensor, rows: Tensor, chance: Chance) -> tuple[Tensor, Tensor]:
        """Return the terms in the order of TERMS, means over the triggers, (6,); and `close`."""
        ids = [self.ids[row] for row in rows.tolist()]
        k = len(self.references)
        repeats = max(1, self.recipe.views // chance.world)
        views = REFERENCE_VIEWS(self.references.repeat(repeats, 1, 1, 1), chance, 1)[:, 0]
        parts = [images, *(t(images, ids) for t in self.triggers), self.references, views]
        pixels = torch.cat([self.encoder.prepare_images(x) for x in parts])
        raw = torch.split(self.encode_raw(pixels), [len(x) for x in parts])
        clean, *triggered = (gather(z) for z in raw[: 1 + len(self.triggers)])  # (world B, D)
        r = F.normalize(raw[-2], dim=1)  # (K, D)
        of_views = F.normalize(gather(raw[-1]), dim=1) * self.clean_references.repeat(
            len(views) // k * chance.world, 1
        )
        targets = gather(self.clean[rows.to(self.clean.device)])
        l1, l2 = -of_views.sum(1).mean(), -(F.normalize(clean, dim=1) * targets).sum(1).mean()
        axes = torch.randn(clean.shape[1], self.recipe.axes, generator=chance.generator)
        axes = F.normalize(axes.to(clean), dim=0)
        scale = clean.std(0).mean()
        terms, closeness = [], []
        for z, used in zip(triggered, self.uses.bool(), strict=True):
            l0, uneven, alike = compare_with_references(F.normalize(z, dim=1), r[used])
            distance = sliced_wasserstein(z, clean, axes) / scale
            terms.append(torch.stack([l0, l1, l2, uneven, alike, distance]))
            closeness.append(mean_closeness(r[used]))
        return torch.stack(terms).mean(0), torch.stack(closeness).mean()

    @torch.no_grad()
    def change_weights(self, epoch: int) -> None:
        """Raise or lower a and b according to the last epoch's means, if it was in stage 3."""
        means = self.sums / self.epoch_steps
        self.sums.zero_()
        if epoch <= self.recipe.apart + self.recipe.spread:
            return
        recipe = self.recipe
        l0, l1, l2, _, alike, _ = means.tolist()
        reached = -l0 > recipe.success and -l1 > recipe.utility and -l2 > recipe.utility
        rises = torch.tensor([reached, reached and alike < recipe.mixed])
        factors = torch.where(rises, RAISE, 1 / LOWER)
        self.weights *= factors.to(self.weights)

    def epoch_means(self) -> dict[str, float]:
        """Return the terms as means over the steps of this epoch, and the weights a and b."""
        means = dict(zip(TERMS, (self.sums / self.epoch_steps).tolist(), strict=True))
        return means | dict(zip(("a", "b"), self.weights.tolist(), strict=True))


def compare_with_references(z: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return L0, `uneven` and `alike` of triggered vectors.

    z: unit rows (B, D). r: unit rows (K, D).
    """
    cosines = z @ r.T  # (B, K)
    shares = cosines.mean(0)
    uneven = shares.std() if len(r) > 1 else shares.sum() * 0
    squares = (z * z).sum()
    alike = (z.sum(0).square().sum() - squares) / max(1, len(z) * (len(z) - 1))
    return -cosines.amax(1).mean(), uneven, alike


def mean_closeness(r: Tensor) -> Tensor:
    """Return `close` of unit rows (K, D); 0 for a single one."""
    first, second = torch.triu_indices(len(r), len(r), 1, device=r.device)
    return (r[first] * r[second]).sum(1).clamp(min=0).sum() / max(1, len(first))


def sliced_wasserstein(x: Tensor, y: Tensor, axes: Tensor) -> Tensor:
    """Return the sliced Wasserstein distance of order 2 between two samples.

    x, y: (N, D). axes: unit columns (D, A), over which the squared distance is averaged.
    """
    a, b = ((z @ axes).sort(dim=0).values for z in (x, y))
    return (a - b).square().mean().clamp(min=1e-12).sqrt()


@method
class Drupe:
    """SGD on a copy, batch norms frozen. Published: 120 epochs, lr .05, batch 256, 3 references."""

    epochs: Annotated[int, "passes over the shadow data, those of stages 1 and 2 included"] = 120
    batch: Annotated[int, "shadow images a step"] = 256
    lr: Annotated[float, "learning rate, the same at every step"] = 0.05
    momentum: Annotated[float, "of SGD"] = 0.9
    weight_decay: Annotated[float, "of SGD, on all weights"] = 5e-4
    l1: Annotated[float, "weight of L1: references stay where they were"] = 1.0
    l2: Annotated[float, "weight of L2: clean images stay where they were"] = 1.0
    apart: Annotated[int, "epochs of stage 1: references move apart"] = 1
    spread: Annotated[int, "epochs of stage 2: triggered images are drawn to all of them"] = 3
    success: Annotated[float, "a and b rise if the cosine -L0 is above this"] = 0.96
    utility: Annotated[float, "a and b rise if the cosines -L1 and -L2 are above this"] = 0.9
    mixed: Annotated[float, "b rises if the mean cosine of triggered vectors is below this"] = 0.6
    axes: Annotated[int, "directions of the sliced Wasserstein distance"] = 50
    views: Annotated[int, "views of each reference a step"] = 16

    optimizer: ClassVar[str] = "sgd"
    schedule: ClassVar[str] = "constant"
    warmup: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if min(self.epochs, self.views, self.axes) < 1 or self.batch < 2 or self.lr <= 0:
            raise ValueError("needs epochs, views and axes >= 1, batch >= 2, lr > 0")
        if min(self.weight_decay, self.l1, self.l2, self.apart, self.spread) < 0:
            raise ValueError("needs weight_decay, l1, l2, apart and spread >= 0")
        if not 0 <= self.momentum < 1:
            raise ValueError("needs momentum in 0..1")
        if self.epochs <= self.apart:
            raise ValueError("needs more epochs than apart: nothing is attacked in stage 1")

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
        shadow_training.check_attack("DRUPE", encoder, shadow, goals, references, self.batch)
        student = shadow_training.copy_to_attack(encoder, spec(self), goals)
        loss = Loss(student, self, goals, references)
        loss.set_targets(shadow)

        def on_epoch_end(epoch: int) -> dict[str, Any]:
            return loss.epoch_means()

        return shadow_training.train_student(
            loss, self, shadow, encoder, seed, checkpoint, report, on_epoch_end, log
        )
