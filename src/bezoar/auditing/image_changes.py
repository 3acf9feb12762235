"""Changes of whole images by few numbers: colour curves, a warp, a small kernel, plane waves.

A trigger that fills the image (a filter, a warp, a blur, a sinusoid) is no patch and no blend, but
each of these families expresses one kind of it with few numbers, which leave a search little room
for adversarial noise. At zero a family changes nothing. Searches for many targets are one batch, by
the state of `trigger_search`; their gradients are of the families' numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.auditing import trigger_inversion
from bezoar.auditing.trigger_inversion import ImageTower, TriggerObjective
from bezoar.auditing.trigger_search import CHECK_EVERY, TOLERANCE, InversionRecipe, TriggerSearch
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import generator
from bezoar.errors import UserError
from bezoar.progress import ProgressReport, no_report

SIDE = 32  # shifts are in pixels of an image of this side
# At a share of the steps, searches whose success never was this share of the goal are given up.
GIVEN_UP = ((0.4, 1 / 3), (0.67, 2 / 3))
STRENGTHS = (1.0, 1.1, 1.2)  # factors on the numbers of a change
LARGEST = 1e3  # magnitude of a number that is read from a file
LEAST_SHARE = 0.01  # of the largest number of a change; smaller ones are set to zero in the end


class ChangeFamily(Protocol):
    """A kind of change of whole images.

    Attributes:
        unit: of its size, in words.
        limit: size from which a change spoils any image; a target that needs more is not reached.
        rate: learning rate of its numbers.
        weight: of its size in the loss at the start.
        spread: standard deviation of the numbers that a search starts from.
    """

    unit: ClassVar[str]
    limit: ClassVar[float]
    rate: ClassVar[float]
    weight: ClassVar[float]
    spread: ClassVar[float]

    def count_numbers(self, height: int, width: int) -> int:
        """How many numbers P make a change of images of a size."""

    def change(self, t: Tensor, x: Tensor) -> Tensor:
        """Make g changes (g, P) of n images, 0..1 (n, 3, H, W) -> (g, n, 3, H, W)."""

    def measure(self, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The sizes (g,) of changes (g, P) that make y (g, n, 3, H, W) of images x."""


@dataclass(frozen=True)
class ColourCurves:
    """A curve for each channel, linear between `NODES` values, plus shares of the two others."""

    NODES: ClassVar[int] = 5
    unit: ClassVar[str] = "root mean square of the change of a pixel, of 0..1"
    limit: ClassVar[float] = 0.4
    rate: ClassVar[float] = 0.03
    weight: ClassVar[float] = 2.0
    spread: ClassVar[float] = 0.02

    def count_numbers(self, height: int, width: int) -> int:
        """See ChangeFamily."""
        return 3 * (self.NODES + 2)

    def change(self, t: Tensor, x: Tensor) -> Tensor:
        """See ChangeFamily."""
        nodes = torch.arange(self.NODES, device=x.device).view(-1, 1, 1, 1, 1)
        hats = F.relu(1 - ((self.NODES - 1) * x - nodes).abs())  # (K, n, 3, H, W)
        others = torch.stack([x.roll(1, 1), x.roll(2, 1)]) - 0.5  # (2, n, 3, H, W)
        features = torch.cat([hats, others])
        by_channel = t.view(len(t), 3, -1)  # (g, 3, K + 2)
        return (x + torch.einsum("gck,knchw->gnchw", by_channel, features)).clamp(0, 1)

    def measure(self, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """See ChangeFamily."""
        return measure_difference(x, y)


@dataclass(frozen=True)
class SmallKernel:
    """The image plus its convolution with a kernel of sum zero: blurs, sharpening, small shifts."""

    SIDE: ClassVar[int] = 5
    unit: ClassVar[str] = ColourCurves.unit
    limit: ClassVar[float] = 0.25
    rate: ClassVar[float] = 0.02
    weight: ClassVar[float] = 2.0
    spread: ClassVar[float] = 0.01

    def count_numbers(self, height: int, width: int) -> int:
        """See ChangeFamily."""
        return self.SIDE**2

    def change(self, t: Tensor, x: Tensor) -> Tensor:
        """See ChangeFamily."""
        height, width = x.shape[2:]
        padded = F.pad(x, [self.SIDE // 2] * 4, mode="replicate")
        windows = [
            padded[:, :, i : i + height, j : j + width]
            for i in range(self.SIDE)
            for j in range(self.SIDE)
        ]
        kernel = t - t.mean(1, keepdim=True)  # (g, K)
        return (x + torch.einsum("gk,knchw->gnchw", kernel, torch.stack(windows))).clamp(0, 1)

    def measure(self, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """See ChangeFamily."""
        return measure_difference(x, y)


@dataclass(frozen=True)
class Warp:
    """Every pixel is read from a place beside it; shifts are smooth between `MESH` points."""

    MESH: ClassVar[int] = 6
    unit: ClassVar[str] = f"root mean square of the shift, in pixels of an image of {SIDE}"
    limit: ClassVar[float] = 2.0
    rate: ClassVar[float] = 0.08
    weight: ClassVar[float] = 0.3
    spread: ClassVar[float] = 0.1

    def count_numbers(self, height: int, width: int) -> int:
        """See ChangeFamily."""
        return int(2 * self.MESH**2)

    def shifts(self, t: Tensor, height: int, width: int) -> Tensor:
        """Shifts along x and y of every pixel, (g, 2, H, W), in pixels of an image of `SIDE`."""
        mesh = t.view(-1, 2, self.MESH, self.MESH)
        return F.interpolate(mesh, (height, width), mode="bicubic", align_corners=True)

    def change(self, t: Tensor, x: Tensor) -> Tensor:
        """See ChangeFamily."""
        n, channels, height, width = x.shape
        rows = torch.linspace(-1, 1, height, dtype=x.dtype, device=x.device)
        columns = torch.linspace(-1, 1, width, dtype=x.dtype, device=x.device)
        shifts = self.shifts(t, height, width) * 2 / (SIDE - 1)  # of -1..1
        places = torch.stack([columns + shifts[:, 0], rows[:, None] + shifts[:, 1]], 3)
        planes = x.reshape(1, n * channels, height, width).expand(len(t), -1, -1, -1)
        y = F.grid_sample(planes, places, align_corners=True, padding_mode="border")
        return y.view(len(t), n, channels, height, width)

    def measure(self, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """See ChangeFamily."""
        squares = self.shifts(t, *x.shape[2:]).square().sum(1).mean((1, 2))  # (g,)
        return (squares + 1e-6).sqrt()


@dataclass(frozen=True)
class PlaneWaves:
    """Waves of up to `PERIODS` periods a side are added, each with its own colour and phase.

    A wave of the numbers w has the amplitudes |w| w, so that the square of the numbers, which a
    search lowers smoothly, is the sum of the amplitudes, which favours a single wave.
    """

    PERIODS: ClassVar[int] = 16
    unit: ClassVar[str] = "sum of the waves' amplitudes over the channels, of 0..1"
    limit: ClassVar[float] = 0.5
    rate: ClassVar[float] = 0.02
    weight: ClassVar[float] = 1.0
    spread: ClassVar[float] = 0.05

    def periods(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Periods down the image (R,), of either sign, and across it (K,)."""
        most_rows, most_columns = min(self.PERIODS, height // 2), min(self.PERIODS, width // 2)
        return torch.arange(1 - most_rows, most_rows + 1), torch.arange(most_columns + 1)

    def count_numbers(self, height: int, width: int) -> int:
        """See ChangeFamily."""
        rows, columns = self.periods(height, width)
        return 3 * 2 * len(rows) * len(columns)

    def change(self, t: Tensor, x: Tensor) -> Tensor:
        """See ChangeFamily."""
        height, width = x.shape[2:]
        rows, columns = (p.to(t) for p in self.periods(height, width))
        w = t.view(len(t), 3, 2, len(rows), len(columns))
        lengths = (w.square().sum((1, 2), keepdim=True) + 1e-12).sqrt()
        real, imaginary = (w * lengths).unbind(2)  # (g, 3, R, K)
        down = 2 * math.pi * torch.arange(height, device=t.device)[:, None] / height * rows  # (H,R)
        across = 2 * math.pi * torch.arange(width, device=t.device)[:, None] / width * columns
        # the real part of c exp(i down) exp(i across)
        a = down.cos() @ real - down.sin() @ imaginary  # (g, 3, H, K)
        b = down.sin() @ real + down.cos() @ imaginary
        waves = a @ across.cos().T - b @ across.sin().T  # (g, 3, H, W)
        return (x + waves[:, None]).clamp(0, 1)

    def measure(self, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """See ChangeFamily."""
        return t.square().sum(1)


FAMILIES: dict[str, ChangeFamily] = {
    "colour": ColourCurves(),
    "kernel": SmallKernel(),
    "warp": Warp(),
    "waves": PlaneWaves(),
}


def measure_difference(x: Tensor, y: Tensor) -> Tensor:
    """Root mean square difference (g,) between images (n, 3, H, W) and (g, n, 3, H, W)."""
    return ((y - x).square().mean((1, 2, 3, 4)) + 1e-8).sqrt()


def restore_numbers(family: ChangeFamily, pairs: Any, height: int, width: int) -> Tensor | None:
    """The numbers (1, P) of a change from the pairs of place and value that verdict.json holds.

    None for anything else than such pairs.
    """
    numbers = torch.zeros(1, family.count_numbers(height, width))
    for pair in pairs if isinstance(pairs, list) else [None]:
        if not isinstance(pair, list) or [type(item) for item in pair] != [int, float]:
            return None
        place, value = pair
        if not 0 <= place < numbers.shape[1] or not abs(value) < LARGEST:
            return None
        numbers[0, place] = value
    return numbers


class ChangeSearch(TriggerSearch):
    """The state of searches for changes: their numbers stand as (g, P, 1, 1)."""

    def give_up(self, least: float) -> None:
        """End the searches that never succeeded on a share of the images."""
        stay = self.best_success[self.indices] >= least
        self.survived[self.indices[~stay]] = False
        self._keep_running(stay)


@dataclass(frozen=True)
class LeastChanges:
    """The least change of one family for each of C targets.

    Attributes:
        numbers: float32 (C, P), of the change; where the goal was never reached, of the most
            successful one.
        sizes: (C,).
        success: (C,), over all clean images where the search reached its goal, else the highest on
            a few.
        reached: bool (C,), whether all clean images confirmed it, within the family's limit.
    """

    numbers: Tensor
    sizes: Tensor
    success: Tensor
    reached: Tensor


def search_changes(
    family: ChangeFamily,
    tower: ImageTower,
    searched: Pairs,
    judged: Pairs,
    objective: TriggerObjective,
    targets: int,
    recipe: InversionRecipe,
    seed: int,
    report: ProgressReport = no_report,
) -> LeastChanges:
    """Search for the least change that leads to each target. Deterministic for a seed.

    Args:
        family: the kind of change.
        tower: from `freeze_tower`.
        searched: clean images of the search.
        judged: clean images that success is measured on in the end.
        objective: loss and success; its aims are 0 .. targets - 1.
        targets: how many.
        recipe: hyper-parameters, fit for the family.
        seed: of the starting points and the batches.
        report: told every few steps.

    Raises:
        UserError: where the encoder gives NaN.
    """
    count = family.count_numbers(*searched.images.shape[2:])
    starts = [torch.randn(count, generator=generator(seed, 21, i)) for i in range(targets)]
    u = (family.spread * torch.stack(starts))[:, :, None, None].to(tower.device, tower.dtype)
    search = ChangeSearch(u, recipe)
    confirming = trigger_inversion.draw_batch(searched, recipe.confirm, seed, -1, u)
    ends = {int(share * recipe.steps): least * recipe.goal for share, least in GIVEN_UP}
    for step in range(recipe.steps):
        if step in ends:
            search.give_up(ends[step])
        if not len(search):
            break
        x = trigger_inversion.draw_batch(searched, recipe.batch, seed, step, u)
        grad, success = compute_gradients(family, search, x, tower, objective)
        if step == 0 and not bool(torch.isfinite(grad).all()):
            raise UserError(trigger_inversion.NOT_FINITE)
        search.update_weights(success >= recipe.goal)
        if (step + 1) % CHECK_EVERY == 0:
            numbers = search.u[:, :, 0, 0]
            search.note_best(
                *try_changes(family, numbers, search.running_aims, confirming, tower, objective)
            )
            report(step + 1, recipe.steps, f"{len(search)} of {targets} targets still searched")
        search.adam_step(grad, step)
    return judge_changes(family, search, judged, confirming, tower, objective)


def compute_gradients(
    family: ChangeFamily,
    search: ChangeSearch,
    x: Tensor,
    tower: ImageTower,
    objective: TriggerObjective,
) -> tuple[Tensor, Tensor]:
    """The gradient (g, P, 1, 1) of loss + weight size of the searches that run, and success (g,).

    x: images, 0..1 (n, 3, H, W).
    """
    grad, success = torch.empty_like(search.u), torch.empty_like(search.weights)
    for part in trigger_inversion.inversion_slices(len(search), len(x), tower):
        t = search.u[part][:, :, 0, 0].clone().requires_grad_()
        y = family.change(t, x)  # (g, n, 3, H, W)
        z = tower(y.flatten(0, 1)).view(len(t), len(x), -1)
        loss, success[part] = objective(z, search.running_aims[part])
        size = family.measure(t, x, y)
        (by_numbers,) = torch.autograd.grad((loss + search.weights[part] * size).sum(), t)
        grad[part] = by_numbers[:, :, None, None]
    return grad, success


@torch.no_grad()
def try_changes(
    family: ChangeFamily,
    numbers: Tensor,
    aims: Tensor,
    x: Tensor,
    tower: ImageTower,
    objective: TriggerObjective,
) -> tuple[Tensor, Tensor]:
    """Success (g,) and size (g,) of changes (g, P) on images, 0..1 (n, 3, H, W)."""
    successes, sizes = [], []
    for part in trigger_inversion.inversion_slices(len(numbers), len(x), tower):
        t = numbers[part]
        y = family.change(t, x)
        z = tower(y.flatten(0, 1)).view(len(t), len(x), -1)
        successes.append(objective(z, aims[part])[1])
        sizes.append(family.measure(t, x, y))
    return torch.cat(successes), torch.cat(sizes)


@torch.no_grad()
def judge_changes(
    family: ChangeFamily,
    search: ChangeSearch,
    clean: Pairs,
    confirming: Tensor,
    tower: ImageTower,
    objective: TriggerObjective,
) -> LeastChanges:
    """The results of searches, those that reached their goal measured on clean images.

    The smallest change that reached the goal on a few images is often a lucky one: where it falls
    short on all of them, it is made stronger, twice at most.

    confirming: the images of the search that sizes are measured on, 0..1 (n, 3, H, W).
    """
    numbers = search.best_u[:, :, 0, 0].clone()
    most = numbers.abs().amax(1, keepdim=True)
    numbers = torch.where(numbers.abs() >= LEAST_SHARE * most, numbers, 0)
    sizes, success = search.best_norm.clone(), search.best_success.clone()
    reached = torch.zeros_like(search.survived)
    for row in (search.best_norm <= family.limit).nonzero()[:, 0].tolist():
        aim = search.aims[row : row + 1]
        for factor in STRENGTHS:
            t = factor * numbers[row : row + 1]
            z = torch.cat(
                [tower(family.change(t, x)[0]) for x in image_parts(tower, clean.images, t)]
            )  # (N, D)
            success[row] = objective(z[None], aim)[1]
            if bool(success[row] >= search.recipe.goal - TOLERANCE):
                numbers[row] = t[0]
                sizes[row] = family.measure(t, confirming, family.change(t, confirming))
                reached[row] = sizes[row] <= family.limit
                break
    return LeastChanges(numbers, sizes, success, reached)


def image_parts(tower: ImageTower, images: Tensor, like: Tensor) -> Iterator[Tensor]:
    """Images uint8 (N, 3, H, W) as 0..1, in parts that are computed together."""
    for part in tower.slices(len(images)):
        yield images[part].to(like) / 255
