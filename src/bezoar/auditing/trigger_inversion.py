"""Trigger inversion: many triggers at once, as one batched product, with gradients of pixels alone.

Stamping is x -> (1 - m) x + m p with a mask m and a pattern p, found by the search of
`trigger_search` (after Wang et al. 2019). Each inversion has its own weight, stopping and best
result, and all of them see the same images at the same step, so that a batch of inversions gives
what they would give one by one, but for rounding. No gradient of an encoder's weight is computed;
batch norms are in evaluation mode and folded into their convolutions (`encoders.folded_norms`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bezoar.auditing.trigger_search import (
    CHECK_EVERY,
    TOLERANCE,
    InversionRecipe,
    TriggerSearch,
    enlarge_cells,
    initial_parameters,
    mask_and_pattern,
)
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import generator
from bezoar.encoders import folded_norms
from bezoar.encoders.encoder import Encoder, precision_for
from bezoar.encoders.folded_norms import FoldedTower
from bezoar.errors import UserError
from bezoar.evaluation.verdict import Inversion
from bezoar.progress import ProgressReport, no_report

MANY_IMAGES = 1 << 20  # more than are ever computed together
LARGE = 3e8  # operations an image from which a tower computes in bfloat16, where the device can
PIXEL_OPERATIONS = 4e4  # what moving a pixel through a tower costs beside its sums and products
NOT_FINITE = "the encoder gives NaN or infinite vectors; its weights or its input size are wrong"


@dataclass(frozen=True)
class TowerCost:
    """What an image's pass through a tower costs.

    Attributes:
        side: of the input in pixels.
        operations: sums and products.
    """

    side: int
    operations: float = 0.0

    @property
    def total(self) -> float:
        """In operations, those that move pixels too."""
        return self.operations + PIXEL_OPERATIONS * self.side**2


@dataclass(frozen=True)
class ImageTower:
    """An image tower as a function of the pixels alone: float 0..1 (B, 3, H, W) -> vectors (B, D).

    Attributes:
        encoder: prepares the pixels and sets the arithmetic.
        tower: its image tower, or a faster form of it.
        raw: whether vectors are as the tower gives them; else they are unit rows.
        cost: of a pass.
    """

    encoder: Encoder
    tower: Callable[[Tensor], Tensor]
    raw: bool
    cost: TowerCost

    def __call__(self, x: Tensor) -> Tensor:
        """The vectors, of `dtype` whatever the tower computes in."""
        with self.encoder.autocast():
            z = self.tower(self.encoder.prepare_images(x))
        return z.to(self.dtype) if self.raw else F.normalize(z.to(self.dtype), dim=-1)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors and of the triggers: float32, or float64 where the weights are."""
        return torch.promote_types(next(self.encoder.parameters()).dtype, torch.float32)

    def slices(self, n: int) -> Iterator[slice]:
        """n images in parts that are computed together, as large as the input size allows."""
        return folded_norms.chunk_slices(n, self.encoder.preprocess.size, self.device)


class TriggerObjective(Protocol):
    """What triggers are to do to an encoder's vectors."""

    def __call__(self, z: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and success of g inversions.

        Args:
            z: float32 (g, n, D), the vectors of n images stamped by each inversion.
            indices: int64 (g,), the inversions' aims.

        Returns:
            The loss (g,), differentiable, and the success (g,), 0..1.
        """


@dataclass(frozen=True)
class InvertedTriggers:
    """The results of G searches; those that were given up at a halving are left out.

    Attributes:
        aims: int64 (G,), what each is for.
        masks: float32 (G, 1, H, W) in 0..1; where the goal was never reached, of the most
            successful trigger.
        patterns: float32 (G, 3, H, W) in 0..1.
        norms: (G,), the sums of the masks, in pixels.
        success: (G,), over all clean images.
        reached: bool (G,), whether the goal was reached at some step.
        steps: int64 (G,), steps taken.
        starts: (G, R), the norms that all R searches for the same aim reached, those that were
            given up too; infinite where one reached nothing.
    """

    aims: Tensor
    masks: Tensor
    patterns: Tensor
    norms: Tensor
    success: Tensor
    reached: Tensor
    steps: Tensor
    starts: Tensor

    def take(self, rows: Tensor) -> InvertedTriggers:
        """Some of them, by number, int64 (G',)."""
        return InvertedTriggers(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))

    def best_of_aims(self, other: InvertedTriggers | None = None) -> InvertedTriggers:
        """The best trigger for each aim, in the order of the aims.

        That is the smallest which reached the goal, else the most successful. other: more results.
        """
        every = self if other is None else self.join(other)
        badness = torch.where(every.reached, every.norms, 1e9 - every.success)
        order = badness.argsort(stable=True)
        order = order[every.aims[order].argsort(stable=True)]
        _, counts = every.aims[order].unique_consecutive(return_counts=True)
        return every.take(order[counts.cumsum(0) - counts])

    def join(self, other: InvertedTriggers) -> InvertedTriggers:
        """Both, one after the other."""
        names = [f.name for f in dataclasses.fields(self)]
        parts = [torch.cat([getattr(self, n), getattr(other, n)]) for n in names]
        return InvertedTriggers(*parts)

    def inversions(
        self, targets: Sequence[str], order: Tensor | None = None
    ) -> tuple[Inversion, ...]:
        """The triggers with their targets, in an order int64 (G,); else the smallest first."""
        masks, patterns = self.masks.cpu(), self.patterns.cpu()
        norms, success = self.norms.tolist(), self.success.tolist()
        order = self.norms.argsort(stable=True) if order is None else order
        return tuple(
            Inversion(masks[i], patterns[i], targets[i], norms[i], success[i])
            for i in order.tolist()
        )


@contextmanager
def freeze_tower(encoder: Encoder, raw: bool = False) -> Iterator[ImageTower]:
    """Within the block, the image tower in its fastest form, differentiable by the pixels alone.

    Batch norms are folded where there are any that can be, and large towers compute in bfloat16.
    Afterwards the encoder is as it was.

    Args:
        encoder: its modes and gradient flags are changed within the block.
        raw: whether vectors are as the tower gives them; else they are unit rows.

    Raises:
        UserError: for an encoder without an image tower, or whose vectors depend on the other
            images of the batch.
    """
    if not isinstance(getattr(encoder, "image", None), nn.Module):
        raise UserError("this encoder has no image tower; trigger inversion audits image encoders")
    modes = [(m, m.training) for m in encoder.modules()]
    precision = encoder.precision
    flags = [(p, p.requires_grad) for p in encoder.parameters()]
    try:
        encoder.eval()
        tower: nn.Module = encoder.image
        if any(isinstance(m, folded_norms.BatchNorm) for m in tower.modules()):
            folded = FoldedTower(tower, encoder.preprocess.size)
            tower = folded.fast.eval().requires_grad_(False)
        encoder.requires_grad_(False)
        cost = count_operations(encoder, tower)
        if cost.operations >= LARGE:
            encoder.precision = precision_for(encoder.device)
        yield ImageTower(encoder, tower, raw, cost)
    finally:
        encoder.precision = precision
        for p, flag in flags:
            p.requires_grad_(flag)
        for m, mode in modes:
            m.training = mode


@torch.no_grad()
def count_operations(encoder: Encoder, tower: nn.Module) -> TowerCost:
    """What a pass of one image through an encoder's tower costs."""
    side = encoder.preprocess.size
    with FlopCounterMode(display=False) as counter:
        tower(encoder.prepare_images(torch.zeros(1, 3, side, side)))
    return TowerCost(side, float(counter.get_total_flops()))


def check_image_count(clean: Pairs, least: int = 8) -> None:
    """Raise UserError for too few clean images."""
    if len(clean) < least:
        raise UserError(
            f"trigger inversion needs at least {least} clean images; there are {len(clean)}"
        )


def inversion_limits(clean: Pairs) -> list[str]:
    """What no inversion on these images can detect, in sentences."""
    margin = 0.98 / len(clean) ** 0.5  # half the width of a 95 % interval, at most
    return [
        "only small triggers are searched for: one that is spread over the image (a blend, a "
        "wave, a warp) may leave no trace",
        f"success is measured on {len(clean)} clean images, which leaves it uncertain by up to "
        f"{margin:.0%}",
    ]


def stamp_triggers(u: Tensor, x: Tensor) -> Tensor:
    """Stamp g triggers (g, 4, h, w) on n images each, float 0..1 (n, 3, H, W) -> (g n, 3, H, W)."""
    mask, pattern = (enlarge_cells(t, *x.shape[2:]) for t in mask_and_pattern(u))
    return torch.addcmul((mask * pattern)[:, None], (1 - mask)[:, None], x).flatten(0, 1)


def compute_gradients(
    search: TriggerSearch, x: Tensor, tower: ImageTower, objective: TriggerObjective
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the searches that still run.

    Some are computed at a time, so that memory does not grow with their number.

    Args:
        search: g searches.
        x: images, float 0..1 (n, 3, H, W).
        tower: the image tower.
        objective: loss and success.

    Returns:
        The gradient by the free numbers (g, 4, H, W) of loss + weight |m|_1; success (g,); and
        |m|_1 (g,).
    """
    grad = torch.empty_like(search.u)
    success = torch.empty_like(search.weights)
    norm = torch.empty_like(search.weights)
    for part in inversion_slices(len(search), len(x), tower):
        u = search.u[part].detach().requires_grad_()
        z = tower(stamp_triggers(u, x)).view(len(u), len(x), -1)  # (g, n, D)
        loss, success[part] = objective(z, search.running_aims[part])
        size = mask_and_pattern(u)[0].sum((1, 2, 3))
        (grad[part],) = torch.autograd.grad((loss + search.weights[part] * size).sum(), u)
        norm[part] = size.detach()
    return grad, success, norm


def inversion_slices(count: int, n: int, tower: ImageTower) -> Iterator[slice]:
    """`count` inversions, each on n images, in parts of even length that are computed together."""
    longest = next(tower.slices(MANY_IMAGES)).stop  # images that are computed together at most
    most = max(1, longest // n)
    step = -(-count // -(-count // most))
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def invert_triggers(
    tower: ImageTower,
    clean: Pairs,
    objective: TriggerObjective,
    aims: Tensor,
    recipe: InversionRecipe,
    seed: int,
    report: ProgressReport = no_report,
    judged: Pairs | None = None,
) -> InvertedTriggers:
    """Search for triggers, `recipe.starts` for each aim. Deterministic for a seed.

    Args:
        tower: from `freeze_tower`.
        clean: images of any size; the masks have theirs.
        objective: loss and success.
        aims: int64 (A,), numbers that the objective knows.
        recipe: hyper-parameters of the search.
        seed: of the starting points and the batches.
        report: told every few steps.
        judged: images that success is measured on in the end; else those of the search.

    Raises:
        UserError: where the encoder gives NaN.
    """
    height, width = clean.images.shape[2:]
    count = len(aims) * recipe.starts
    grid = recipe.grid_size(height, width)
    u = initial_parameters(count, *grid, seed, recipe.centred, recipe.window, recipe.even)
    search = TriggerSearch(u.to(tower.device, tower.dtype), recipe, aims)
    confirming = draw_batch(clean, recipe.confirm, seed, -1, search.u) if recipe.confirm else None
    halving_steps = recipe.halving_steps()
    for step in range(recipe.steps):
        halvings = sum(step >= halving for halving in halving_steps)
        x = draw_batch(clean, recipe.batch_size(halvings), seed, step, search.u)
        grad, success, norm = compute_gradients(search, x, tower, objective)
        if step == 0 and not bool(torch.isfinite(grad).all()):
            raise UserError(NOT_FINITE)
        if confirming is None:
            search.record(success, norm)
        else:
            search.update_weights(success >= recipe.goal)
            if (step + 1) % CHECK_EVERY == 0:
                confirm_triggers(search, success, norm, confirming, tower, objective)
        search.adam_step(grad, step)
        if step + 1 in halving_steps:
            search.halve()
        if (step + 1) % CHECK_EVERY == 0:
            report(step + 1, recipe.steps, f"{len(search)} of {count} searches still run")
            search.drop_finished()
            if not len(search):
                break
    return collect_triggers(search, clean if judged is None else judged, tower, objective)


def confirm_triggers(
    search: TriggerSearch,
    success: Tensor,
    norm: Tensor,
    images: Tensor,
    tower: ImageTower,
    objective: TriggerObjective,
) -> None:
    """Let triggers count that succeed on a step's images and on further ones.

    Args:
        search: g searches.
        success: (g,), on the step's images.
        norm: (g,), |m|_1.
        images: float 0..1 (n, 3, H, W), further images.
        tower: the image tower.
        objective: loss and success.
    """
    rows = search.candidates(success, norm).nonzero()[:, 0]
    success = success.clamp(max=search.recipe.goal - 1e-6)  # what is not confirmed is not reached
    if len(rows):
        u, aims = search.u[rows], search.running_aims[rows]
        success[rows] = success_on(tower, u, aims, images, objective)
    search.note_best(success, norm)


def collect_triggers(
    search: TriggerSearch, clean: Pairs, tower: ImageTower, objective: TriggerObjective
) -> InvertedTriggers:
    """The results of the searches that were not given up, measured on clean images."""
    survivors = search.survived.nonzero()[:, 0]
    best_u = search.best_u[survivors]
    side = clean.images.shape[2:]
    masks, patterns = (enlarge_cells(t, *side) for t in mask_and_pattern(best_u))
    aims = search.aims[survivors]
    success = measure_success(tower, masks, patterns, aims, clean.images, objective)
    reached = search.best_norm[survivors].isfinite()
    if search.recipe.confirm:
        reached &= success >= search.recipe.goal - TOLERANCE
    starts = search.best_norm.view(-1, search.recipe.starts)[survivors // search.recipe.starts]
    pixels_a_cell = side.numel() / best_u[0, 0].numel()
    return InvertedTriggers(
        aims=aims,
        masks=masks,
        patterns=patterns,
        norms=masks.sum((1, 2, 3)),
        success=success,
        reached=reached,
        steps=search.steps[survivors],
        starts=starts * pixels_a_cell,
    )


def draw_batch(clean: Pairs, batch: int, seed: int, step: int, like: Tensor) -> Tensor:
    """The images of a step, 0..1 (n, 3, H, W), on the device and of the dtype of another tensor."""
    shuffled = torch.randperm(len(clean), generator=generator(seed, 12, step))
    rows = shuffled[:batch].sort().values
    return clean.images[rows.to(clean.images.device)].to(like) / 255


@torch.no_grad()
def embed_clean(tower: ImageTower, images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 (N, D). Raises UserError on NaN."""
    parts = (images[part] for part in tower.slices(len(images)))
    z = torch.cat([tower(part.to(tower.device, tower.dtype) / 255) for part in parts])
    if not torch.isfinite(z).all():
        raise UserError(NOT_FINITE)
    return z


@torch.no_grad()
def measure_success(
    tower: ImageTower,
    masks: Tensor,
    patterns: Tensor,
    aims: Tensor,
    images: Tensor,
    objective: TriggerObjective,
) -> Tensor:
    """Success (G,) of triggers on images uint8 (N, 3, H, W), one trigger after the other.

    masks: (G, 1, H, W). patterns: (G, 3, H, W). aims: int64 (G,).
    """
    successes = []
    for mask, pattern, aim in zip(masks, patterns, aims, strict=True):
        parts = (images[part].to(mask) / 255 for part in tower.slices(len(images)))
        z = torch.cat([tower(torch.addcmul(mask * pattern, 1 - mask, x)) for x in parts])  # (N, D)
        successes.append(objective(z[None], aim[None])[1])
    return torch.cat(successes)


@torch.no_grad()
def success_on(
    tower: ImageTower, u: Tensor, aims: Tensor, images: Tensor, objective: TriggerObjective
) -> Tensor:
    """Success (g,) of triggers (g, 4, H, W) on a few images, float 0..1 (n, 3, H, W)."""
    successes = []
    for part in inversion_slices(len(u), len(images), tower):
        z = tower(stamp_triggers(u[part], images)).view(len(u[part]), len(images), -1)
        successes.append(objective(z, aims[part])[1])
    return torch.cat(successes)
