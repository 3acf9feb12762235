"""The search behind trigger inversion: its recipe, its start, the state of many searches.

A trigger is a mask m and a pattern p, both (tanh(u) + 1) / 2 of free numbers u. Adam lowers a loss
plus weight |m|_1. The weight grows while the trigger succeeds and falls while it does not; the
result is the smallest mask that succeeded.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.data.randomness import generator

ADAM_BETAS = (0.5, 0.9)  # as published for DECREE, Neural Cleanse and SSL-Cleanse
ADAM_EPSILON = 1e-8
CHECK_EVERY = 5  # steps between checks for ended searches, which make the host wait for the device
TOLERANCE = 0.05  # what success may be less on all images than on those it was confirmed on
GRADIENT_PASSES = 2  # passes that cost what one does with the gradient by its pixels
INSIDE, OUTSIDE = 0.95, 0.02  # of a mask that starts from a window
PROGRESS_SHARE = 0.99  # a mask of more than this share of the best one's norm is no progress


@dataclass(frozen=True)
class InversionRecipe:
    """Hyper-parameters of a trigger search.

    Attributes:
        steps: steps of Adam at most.
        batch: clean images a step.
        lr: learning rates, used one after the other.
        until: the steps at which all but the last of the learning rates end.
        weight: of |m|_1 (in pixels) at the start.
        up: factor on the weight after `patience` successes in a row.
        down: divisor of the weight after `patience` failures in a row.
        patience: see `up` and `down`.
        floor: least weight.
        resets: failures at the least weight that set it back to the start; 0: never.
        goal: the success that counts as reached, above 0 and at most 1.
        starts: searches for each aim, each from a start of its own.
        halvings: how often, at even distances, the worse half of the searches for each aim is
            given up.
        wait: steps without progress after which a search ends, if it has succeeded and its weight
            has gone both up and down.
        centred: start from a central square of half the side, not from noise.
        growing: twice as many images a step after every halving.
        confirm: clean images, the same at every step, that a trigger must succeed on too before it
            counts; 0: it counts by the images of its step alone, and of many steps the luckiest
            wins.
        window: start from a square of this share of the sides, at a place that is drawn; 0: from
            noise.
        cells: of masks and patterns a side, at most, each of several pixels of a larger image; 0:
            one a pixel. While the search lasts, norms and weights are of cells.
        even: the mask has one value all over the image, so that the trigger is a blend.
    """

    steps: int
    batch: int
    lr: tuple[float, ...] = (0.1,)
    until: tuple[int, ...] = ()
    weight: float = 1e-3
    up: float = 1.5
    down: float = 1.5**1.5
    patience: int = 5
    floor: float = 0.0
    resets: int = 0
    goal: float = 0.99
    starts: int = 1
    halvings: int = 0
    wait: int = 25
    centred: bool = False
    growing: bool = False
    confirm: int = 0
    window: float = 0.0
    cells: int = 0
    even: bool = False

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.patience, self.wait, self.starts) < 1:
            raise ValueError("steps, batch, patience, wait and starts must be at least 1")
        in_order = list(self.until) == sorted(self.until)
        if not self.lr or min(self.lr) <= 0 or len(self.until) != len(self.lr) - 1 or not in_order:
            raise ValueError(
                "lr must be above 0, and until must name, in order, the step at which each but the "
                "last ends"
            )
        least = min(self.floor, self.resets, self.halvings, self.confirm, self.cells)
        if self.weight <= 0 or min(self.up, self.down) < 1 or least < 0:
            raise ValueError(
                "weight must be above 0, up and down at least 1, floor, resets, halvings, confirm "
                "and cells at least 0"
            )
        if not 0 < self.goal <= 1:
            raise ValueError("goal must be above 0 and at most 1")

    @classmethod
    def from_fields(cls, method: object, **changes: Any) -> InversionRecipe:
        """The recipe that a method's fields of the same names make, but for the changes."""
        names = [f.name for f in dataclasses.fields(cls) if hasattr(method, f.name)]
        return cls(**{name: getattr(method, name) for name in names} | changes)

    def batch_size(self, halvings: int) -> int:
        """The images of a step after so many halvings: the fewer searches, the more images."""
        return self.batch << halvings if self.growing else self.batch

    def image_passes(self) -> int:
        """Images that the searches for one aim pass through a tower; a gradient counts as two."""
        passes, searches, bounds = 0, self.starts, (0, *self.halving_steps(), self.steps)
        for halvings, (first, last) in enumerate(itertools.pairwise(bounds)):
            a_step = GRADIENT_PASSES * self.batch_size(halvings) + self.confirm // CHECK_EVERY
            passes += searches * (last - first) * a_step
            searches = -(-searches // 2)
        return passes

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the masks and patterns for images of a size in pixels."""
        most = self.cells or max(height, width)
        return min(height, most), min(width, most)

    def halving_steps(self) -> tuple[int, ...]:
        """The numbers of steps after which half of the searches are given up."""
        return tuple(self.steps * i // (self.halvings + 1) for i in range(1, self.halvings + 1))

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.lr[sum(step >= end for end in self.until)]


def initial_parameters(
    count: int,
    height: int,
    width: int,
    seed: int,
    centred: bool = False,
    window: float = 0.0,
    even: bool = False,
) -> Tensor:
    """Draw free numbers (count, 4, H, W), mask first, that make uniform masks and patterns.

    Those of a search depend on the seed and on its number alone.
    """
    u = torch.stack(
        [torch.rand(4, height, width, generator=generator(seed, 11, i)) for i in range(count)]
    )
    if even:
        u[:, 0] = 0.5
    if centred:
        u[:, 0] = 0.01
        u[:, 0, height // 4 : height - height // 4, width // 4 : width - width // 4] = 0.99
    if window:
        u[:, 0] = OUTSIDE
        rows, columns = max(1, round(window * height)), max(1, round(window * width))
        for i in range(count):
            place = torch.rand(2, generator=generator(seed, 14, i))
            top, left = (
                int(share * (side - length + 1))
                for share, side, length in zip(
                    place.tolist(), (height, width), (rows, columns), strict=True
                )
            )
            u[i, 0, top : top + rows, left : left + columns] = INSIDE
    return torch.atanh((2 * u - 1) * (1 - 1e-4))


def mask_and_pattern(u: Tensor) -> tuple[Tensor, Tensor]:
    """Free numbers (g, 4, H, W) -> mask (g, 1, H, W) and pattern (g, 3, H, W), in 0..1."""
    t = (torch.tanh(u) + 1) / 2
    return t[:, :1], t[:, 1:]


def enlarge_cells(cells: Tensor, height: int, width: int) -> Tensor:
    """Masks or patterns (g, C, h, w) at a size in pixels, each cell of one value."""
    if cells.shape[2:] == (height, width):
        return cells
    return F.interpolate(cells, (height, width))


class TriggerSearch:
    """The state of G searches: of those that still run, and the best result of each.

    Attributes:
        u: free numbers (g, 4, H, W) of the g searches that still run.
        indices: int64 (g,), their numbers among the G.
        aims: int64 (G,), what each search is for; `starts` searches in a row have one aim.
        weights: (g,), of |m|_1.
        best_u: (G, 4, H, W), the smallest trigger that reached the goal; until there is one, the
            most successful.
        best_norm: (G,), |m|_1 of the smallest that reached the goal; infinite where none did.
        best_success: (G,), the highest success at any step.
        steps: int64 (G,), steps taken.
        survived: bool (G,), whether the search was not given up at a halving.
    """

    # what has a row for each search that still runs
    RUNNING = ("indices", "u", "first_moment", "second_moment", "weights")
    COUNTERS = ("successes", "failures", "floor_failures", "idle_steps", "weight_moved")

    def __init__(self, u: Tensor, recipe: InversionRecipe, aims: Tensor | None = None) -> None:
        """Start from free numbers (G, 4, H, W), which are changed in place.

        aims: int64 (G / starts,), the aims in order; else 0, 1, ...
        """
        count, device = len(u), u.device
        aims = torch.arange(count // recipe.starts) if aims is None else aims
        self.aims = aims.to(device).repeat_interleave(recipe.starts)
        zeros = u.new_zeros(count)
        self.recipe = recipe
        self.u = u
        self.indices = torch.arange(count, device=device)
        self.first_moment = torch.zeros_like(u)
        self.second_moment = torch.zeros_like(u)
        self.weights = zeros + recipe.weight
        self.successes = zeros  # in a row
        self.failures = zeros  # in a row
        self.floor_failures = zeros  # at the least weight
        self.idle_steps = zeros  # without progress
        # whether the weight has gone up, whether it has gone down
        self.weight_moved = torch.zeros(count, 2, dtype=torch.bool, device=device)
        self.best_u = u.clone()
        self.best_norm = zeros + torch.inf
        self.best_success = zeros - 1
        self.steps = torch.zeros(count, dtype=torch.long, device=device)
        self.survived = torch.ones(count, dtype=torch.bool, device=device)

    def __len__(self) -> int:
        """How many searches still run."""
        return len(self.indices)

    @property
    def running_aims(self) -> Tensor:
        """The aims of the searches that still run, int64 (g,)."""
        return self.aims[self.indices]

    def record(self, success: Tensor, norm: Tensor) -> None:
        """Take note of what the triggers do as they stand: success 0..1 (g,) and |m|_1 (g,)."""
        self.note_best(success, norm)
        self.update_weights(success >= self.recipe.goal)

    def note_best(self, success: Tensor, norm: Tensor) -> None:
        """Keep the triggers that are better than those so far; arguments as of `record`."""
        reached = success >= self.recipe.goal
        best_norm = self.best_norm[self.indices]
        best_success = self.best_success[self.indices]
        never_reached = best_norm.isinf()
        better = torch.where(reached, norm < best_norm, never_reached & (success >= best_success))
        self.best_u[self.indices] = torch.where(
            better[:, None, None, None], self.u, self.best_u[self.indices]
        )
        progress = torch.where(reached, norm < PROGRESS_SHARE * best_norm, never_reached)
        self.idle_steps = torch.where(progress, 0, self.idle_steps + 1)
        self.best_norm[self.indices] = torch.where(reached, norm.minimum(best_norm), best_norm)
        self.best_success[self.indices] = success.maximum(best_success)

    def candidates(self, success: Tensor, norm: Tensor) -> Tensor:
        """Which triggers would become the best ones if their success were confirmed, bool (g,)."""
        return (success >= self.recipe.goal) & (norm < self.best_norm[self.indices])

    def update_weights(self, reached: Tensor) -> None:
        """Set the next step's weights; reached: bool (g,), which triggers met the goal."""
        recipe = self.recipe
        self.successes = torch.where(reached, self.successes + 1, 0)
        self.failures = torch.where(reached, 0, self.failures + 1)
        raised = self.successes >= recipe.patience
        lowered = self.failures >= recipe.patience
        self.weights = torch.where(raised, self.weights * recipe.up, self.weights)
        decreased = (self.weights / recipe.down).clamp(min=recipe.floor)
        self.weights = torch.where(lowered, decreased, self.weights)
        self.successes = torch.where(raised, 0, self.successes)
        self.failures = torch.where(lowered, 0, self.failures)
        self.weight_moved = self.weight_moved | torch.stack([raised, lowered], 1)
        if recipe.resets:
            at_floor = lowered & (self.weights <= recipe.floor)
            self.floor_failures = self.floor_failures + at_floor
            reset = self.floor_failures >= recipe.resets
            self.weights = torch.where(reset, recipe.weight, self.weights)
            self.floor_failures = torch.where(reset, 0, self.floor_failures)

    def adam_step(self, grad: Tensor, step: int) -> None:
        """Move the free numbers by Adam (Kingma and Ba 2015); grad: (g, 4, H, W), step: from 0."""
        if self.recipe.even:
            grad[:, :1] = grad[:, :1].mean((2, 3), keepdim=True)
        beta1, beta2 = ADAM_BETAS
        self.first_moment.lerp_(grad, 1 - beta1)
        self.second_moment.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (self.second_moment / (1 - beta2 ** (step + 1))).sqrt_().add_(ADAM_EPSILON)
        rate = self.recipe.rate(step)
        self.u.addcdiv_(self.first_moment, root, value=-rate / (1 - beta1 ** (step + 1)))
        self.steps[self.indices] = step + 1

    def halve(self) -> None:
        """Give up the worse half for each aim: those that never reached the goal, then by size."""
        best_norm = self.best_norm[self.indices]
        best_success = self.best_success[self.indices]
        badness = torch.where(best_norm.isinf(), 1e9 - best_success, best_norm)
        order = badness.argsort(stable=True)
        order = order[self.running_aims[order].argsort(stable=True)]  # by aim, then by badness
        _, counts = self.running_aims[order].unique_consecutive(return_counts=True)
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        place = torch.arange(len(order), device=order.device) - first  # among those of the aim
        better_half = place < ((counts + 1) // 2).repeat_interleave(counts)
        stay = torch.zeros_like(better_half)
        stay[order] = better_half
        self.survived[self.indices[~stay]] = False
        self._keep_running(stay)

    def drop_finished(self) -> None:
        """End the searches that have waited long enough for progress."""
        self._keep_running(
            (self.idle_steps < self.recipe.wait)
            | ~self.weight_moved.all(1)
            | self.best_norm[self.indices].isinf()
        )

    def _keep_running(self, stay: Tensor) -> None:
        """Stop the searches that `stay`, bool (g,), does not name."""
        for name in self.RUNNING + self.COUNTERS:
            setattr(self, name, getattr(self, name)[stay])
