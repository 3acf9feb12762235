"""Trigger inversion: many triggers at once, as one batched product, by gradients that stop at the pixels (Wang et al. 2019).

A trigger is a mask m and a pattern p, x -> (1 - m) x + m p, both (tanh(u) + 1) / 2 of free numbers u. Adam lowers
loss(f(stamped images)) + weight |m|_1, where the weight grows while the trigger does what is wanted and falls while it
does not; what is kept is the smallest mask that did. Each of the inversions has its own weight, stopping and best result,
and sees the same images at the same step: a batch of them is what they would be one by one, but for rounding. No gradient
of a weight is computed, and batch norms rest and are folded into their convolutions (`frozen`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.data.pairs import Pairs
from bezoar.data.randomness import generator
from bezoar.encoders import folded_norms
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.folded_norms import FoldedTower
from bezoar.errors import UserError
from bezoar.evaluation.heads import ProgressReport, no_report
from bezoar.evaluation.scores import Measure, proportion
from bezoar.evaluation.verdict import Inversion, Verdict

BETAS, TINY = (0.5, 0.9), 1e-8  # Adam's, as published for all three audits
CHECK_EVERY = 5  # steps between two looks at who is done; a look makes the host wait for the device
PROGRESS_SHARE = 0.99  # a mask of more than this share of the best one's norm is no progress
MANY = 1 << 20  # images: a part of so many is as large as parts get
SAME = 1e-2  # pixels, or a hundredth in logarithms: a spread of norms below this is none
CONSISTENT = (
    1.4826  # times the median absolute deviation = the standard deviation of normal numbers
)
MIN_NORMS = 10  # norms that a median absolute deviation says something of


@dataclass(frozen=True)
class ImageTower:
    """What an encoder sees: float 0..1 (B, 3, H, W) -> vectors (B, D), differentiable by the pixels alone.

    encoder: gives pixels and arithmetic. tower: its image tower, or a faster form of it. raw: its vectors as they come, not
    unit rows.
    """

    encoder: Encoder
    tower: Callable[[Tensor], Tensor]
    raw: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """The vectors in full precision, whatever the tower computes in."""
        with self.encoder.autocast():
            z = self.tower(self.encoder.prepare_images(x))
        return z.to(self.dtype) if self.raw else F.normalize(z.to(self.dtype), dim=-1)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors, and of what leads to them: float32, or double where the weights are."""
        return torch.promote_types(next(self.encoder.parameters()).dtype, torch.float32)

    def pieces(self, n: int) -> Iterator[slice]:
        """n images in parts that are computed together; what counts is the size that they are looked at in."""
        return folded_norms.chunk_slices(n, self.encoder.preprocess.size, self.device)


class TriggerObjective(Protocol):
    """What triggers are wanted to do to an encoder's vectors."""

    def __call__(self, z: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """z: float32 (g, n, D), the stamped images of g inversions, which: int64 (g,), their numbers -> loss (g,),
        differentiable, and success (g,), 0..1, of each."""


@dataclass(frozen=True)
class InversionRecipe:
    """How a trigger is looked for.

    steps: at most. batch: clean images a step. lr: learning rates; until: at which steps all but the last of them end.
    weight: that of |m|_1 (pixels) at the start; times `up` after `patience` successes in a row, over `down` after as many
    failures, never under `floor`; `resets` failures at the floor set it back to the start (0: never). goal: what success
    is. halvings: how often, at even distances, the worse half of the inversions is given up: for restarts, of which the
    best is wanted. wait: steps without progress after which an inversion is done, once it succeeded and its weight has gone
    both up and down. centred: start from a central square of half the side, not from noise.
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
    halvings: int = 0
    wait: int = 25
    centred: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.patience < 1 or self.wait < 1:
            raise ValueError("steps, batch, patience and wait must be at least 1")
        if (
            not self.lr
            or min(self.lr) <= 0
            or len(self.until) != len(self.lr) - 1
            or list(self.until) != sorted(self.until)
        ):
            raise ValueError(
                "lr must be above 0, and until must name, in order, the step at which each but the last ends"
            )
        if (
            self.weight <= 0
            or self.up < 1
            or self.down < 1
            or self.floor < 0
            or min(self.resets, self.halvings) < 0
        ):
            raise ValueError(
                "weight must be above 0, up and down at least 1, floor, resets and halvings at least 0"
            )
        if not 0 < self.goal <= 1:
            raise ValueError("what counts as success must be above 0 and at most 1")

    def cuts(self) -> tuple[int, ...]:
        """After how many steps half of the inversions go."""
        return tuple(self.steps * i // (self.halvings + 1) for i in range(1, self.halvings + 1))

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return self.lr[sum(step >= end for end in self.until)]


@dataclass(frozen=True)
class InvertedTriggers:
    """What G inversions came to; those that `halvings` gave up are left out.

    masks: float32 (G, 1, H, W). patterns: (G, 3, H, W). norms: sums of the masks, (G,).
    success: over all clean images, (G,). reached: bool (G,), whether the goal was met at some step; where it was not, the
    mask is the most successful one. steps: int64 (G,), those taken.
    """

    masks: Tensor
    patterns: Tensor
    norms: Tensor
    success: Tensor
    reached: Tensor
    steps: Tensor

    def inversions(
        self, targets: Sequence[str], order: Tensor | None = None
    ) -> tuple[Inversion, ...]:
        """As `order` says, int64 (G,); without it the smallest first."""
        rows = zip(
            self.masks.cpu(),
            self.patterns.cpu(),
            targets,
            self.norms.tolist(),
            self.success.tolist(),
            strict=True,
        )
        made = [Inversion(*row) for row in rows]
        chosen = self.norms.argsort(stable=True) if order is None else order
        return tuple(made[i] for i in chosen.tolist())


@contextmanager
def freeze_tower(encoder: Encoder, raw: bool = False) -> Iterator[ImageTower]:
    """Inside, what an encoder sees in its fastest form, differentiable by the pixels alone; afterwards it is as it was.

    raw: the tower's vectors as they come, else unit rows. Batch norms are folded where there are any that can be.
    Raises UserError for an encoder without an image tower, or whose rows see one another.
    """
    if not isinstance(getattr(encoder, "image", None), nn.Module):
        raise UserError("this encoder has no image tower; trigger inversion audits image encoders")
    modes = [(m, m.training) for m in encoder.modules()]
    flags = [(p, p.requires_grad) for p in encoder.parameters()]
    try:
        encoder.eval()
        tower: nn.Module = encoder.image
        if any(isinstance(m, folded_norms.BatchNorm) for m in tower.modules()):
            tower = FoldedTower(tower, encoder.preprocess.size).fast.eval().requires_grad_(False)
        encoder.requires_grad_(False)
        yield ImageTower(encoder, tower, raw)
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for m, mode in modes:
            m.training = mode


def check_image_count(clean: Pairs, fewest: int = 8) -> None:
    """Raise UserError for too few clean images."""
    if len(clean) < fewest:
        raise UserError(
            f"trigger inversion needs at least {fewest} clean images; there are {len(clean)}"
        )


def inversion_limits(clean: Pairs) -> list[str]:
    """What no inversion on these images can see, in sentences."""
    off = 0.98 / len(clean) ** 0.5
    return [
        "what is looked for is a small trigger: one that is spread over the image (a blend, a wave, a warp) may leave no trace",
        f"success is measured on {len(clean)} clean images, which leaves it uncertain by up to {off:.0%}",
    ]


def exact_measure(value: float, n: int, how: str) -> Measure:
    """A number that is what it is: the same search gives it again, and what another search would give is not known."""
    return Measure(float(value), n, float(value), float(value), how)


def initial_parameters(
    count: int, height: int, width: int, seed: int, centred: bool = False
) -> Tensor:
    """Free numbers (count, 4, H, W), the mask first: uniform masks and patterns; an inversion's depend on its number alone."""
    u = torch.stack(
        [torch.rand(4, height, width, generator=generator(seed, 11, i)) for i in range(count)]
    )
    if centred:
        u[:, 0] = 0.01
        u[:, 0, height // 4 : height - height // 4, width // 4 : width - width // 4] = 0.99
    return torch.atanh((2 * u - 1) * (1 - 1e-4))


def mask_and_pattern(u: Tensor) -> tuple[Tensor, Tensor]:
    """Free numbers (g, 4, H, W) -> mask (g, 1, H, W) and pattern (g, 3, H, W), in 0..1."""
    t = (torch.tanh(u) + 1) / 2
    return t[:, :1], t[:, 1:]


def stamp_triggers(u: Tensor, x: Tensor) -> Tensor:
    """g triggers on each of n images, float 0..1 (n, 3, H, W) -> (g n, 3, H, W)."""
    mask, pattern = mask_and_pattern(u)
    return torch.addcmul((mask * pattern)[:, None], (1 - mask)[:, None], x).flatten(0, 1)


def compute_gradients(
    u: Tensor, which: Tensor, weight: Tensor, x: Tensor, see: ImageTower, aim: TriggerObjective
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient by u (g, 4, H, W) of each inversion's loss on the images x; success (g,); norm of each mask (g,).

    Computed some inversions at a time, so that memory does not grow with their number.
    """
    grad, success, norm = torch.empty_like(u), torch.empty_like(weight), torch.empty_like(weight)
    for p in inversion_slices(len(u), len(x), see):
        part = u[p].detach().requires_grad_()
        z = see(stamp_triggers(part, x))
        loss, success[p] = aim(z.view(len(part), len(x), -1), which[p])
        size = mask_and_pattern(part)[0].sum((1, 2, 3))
        (grad[p],) = torch.autograd.grad((loss + weight[p] * size).sum(), part)
        norm[p] = size.detach()
    return grad, success, norm


def inversion_slices(count: int, n: int, see: ImageTower) -> Iterator[slice]:
    """`count` inversions in parts that are computed together: as many as there is room for, each on all of n images."""
    most = max(1, next(see.pieces(MANY)).stop // n)
    step = -(-count // -(-count // most))
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


class TriggerSearch:
    """The inversions that are not done: their numbers, free numbers, Adam's moments, weights and counts; and the best yet."""

    def __init__(self, u: Tensor, recipe: InversionRecipe) -> None:
        """u: where to start, (G, 4, H, W)."""
        self.u, self.recipe = u, recipe
        self.first, self.second, self.best = torch.zeros_like(u), torch.zeros_like(u), u.clone()
        self.which, none = torch.arange(len(u), device=u.device), u.new_zeros(len(u))
        self.weight, self.smallest, self.most = none + recipe.weight, none + torch.inf, none - 1
        self.hits, self.misses, self.low, self.idle = none, none, none, none
        self.turned = torch.zeros(
            len(u), 2, dtype=torch.bool, device=u.device
        )  # has the weight gone up, has it gone down
        self.steps = torch.zeros(len(u), dtype=torch.long, device=u.device)
        self.kept = torch.ones(len(u), dtype=torch.bool, device=u.device)

    def keep(self, success: Tensor, norm: Tensor) -> None:
        """Take note of what the triggers as they stand do: the smallest that succeeds, until then the most successful."""
        hit = success >= self.recipe.goal
        smallest, most = self.smallest[self.which], self.most[self.which]
        better = torch.where(hit, norm < smallest, smallest.isinf() & (success >= most))
        self.best[self.which] = torch.where(
            better[:, None, None, None], self.u, self.best[self.which]
        )
        progress = torch.where(hit, norm < PROGRESS_SHARE * smallest, smallest.isinf())
        self.idle = torch.where(progress, 0, self.idle + 1)
        self.smallest[self.which] = torch.where(hit, norm.minimum(smallest), smallest)
        self.most[self.which] = success.maximum(most)
        self.reweigh(hit)

    def reweigh(self, hit: Tensor) -> None:
        """The next step's weights; hit: bool (g,)."""
        r = self.recipe
        self.hits, self.misses = (
            torch.where(hit, self.hits + 1, 0),
            torch.where(hit, 0, self.misses + 1),
        )
        raised, lowered = self.hits >= r.patience, self.misses >= r.patience
        self.weight = torch.where(raised, self.weight * r.up, self.weight)
        self.weight = torch.where(lowered, (self.weight / r.down).clamp(min=r.floor), self.weight)
        self.hits, self.misses = (
            torch.where(raised, 0, self.hits),
            torch.where(lowered, 0, self.misses),
        )
        self.turned = self.turned | torch.stack([raised, lowered], 1)
        if r.resets:
            self.low = self.low + (lowered & (self.weight <= r.floor))
            again = self.low >= r.resets
            self.weight, self.low = (
                torch.where(again, r.weight, self.weight),
                torch.where(again, 0, self.low),
            )

    def step(self, grad: Tensor, step: int) -> None:
        """Adam (Kingma and Ba 2015)."""
        one, two = BETAS
        self.first.lerp_(grad, 1 - one)
        self.second.mul_(two).addcmul_(grad, grad, value=1 - two)
        root = (self.second / (1 - two ** (step + 1))).sqrt_().add_(TINY)
        self.u.addcdiv_(self.first, root, value=-self.recipe.rate(step) / (1 - one ** (step + 1)))
        self.steps[self.which] = step + 1

    def halve(self) -> None:
        """The worse half goes: the larger masks, and before them those that never succeeded, the least successful first."""
        smallest, most = self.smallest[self.which], self.most[self.which]
        order = torch.where(smallest.isinf(), 1e9 - most, smallest).argsort(stable=True)
        stay = torch.zeros_like(order, dtype=torch.bool)
        stay[order[: -(-len(order) // 2)]] = True
        self.kept[self.which[~stay]] = False
        self.only(stay)

    def leave(self) -> None:
        """Those that are done go."""
        self.only(
            (self.idle < self.recipe.wait) | ~self.turned.all(1) | self.smallest[self.which].isinf()
        )

    def only(self, stay: Tensor) -> None:
        """The others leave the batch."""
        for name in (
            "which",
            "u",
            "first",
            "second",
            "weight",
            "hits",
            "misses",
            "low",
            "idle",
            "turned",
        ):
            setattr(self, name, getattr(self, name)[stay])


def invert_triggers(
    see: ImageTower,
    clean: Pairs,
    aim: TriggerObjective,
    count: int,
    recipe: InversionRecipe,
    seed: int,
    report: ProgressReport = no_report,
) -> InvertedTriggers:
    """`count` triggers, each for its own aim. clean: images of any size; masks have theirs. Deterministic for a seed.

    Raises UserError when the encoder gives NaN.
    """
    height, width = clean.images.shape[2:]
    search = TriggerSearch(
        initial_parameters(count, height, width, seed, recipe.centred).to(see.device, see.dtype),
        recipe,
    )
    for step in range(recipe.steps):
        rows = (
            torch.randperm(len(clean), generator=generator(seed, 12, step))[: recipe.batch]
            .sort()
            .values
        )
        x = clean.images[rows.to(clean.images.device)].to(search.u) / 255
        grad, success, norm = compute_gradients(search.u, search.which, search.weight, x, see, aim)
        if not step and not bool(torch.isfinite(grad).all()):
            raise UserError(
                "the encoder gives NaN or infinite vectors; its weights or its input size are wrong"
            )
        search.keep(success, norm)
        search.step(grad, step)
        if step + 1 in recipe.cuts():
            search.halve()
        if step % CHECK_EVERY == CHECK_EVERY - 1:
            report(
                step + 1, recipe.steps, f"{len(search.which)} of {count} triggers are looked for"
            )
            search.leave()
            if not len(search.which):
                break
    kept = search.kept.nonzero()[:, 0]
    best, reached = search.best[kept], search.smallest[kept].isfinite()
    mask, pattern = mask_and_pattern(best)
    return InvertedTriggers(
        mask,
        pattern,
        mask.sum((1, 2, 3)),
        measure_success(see, best, kept, clean, aim),
        reached,
        search.steps[kept],
    )


@torch.no_grad()
def embed_clean(see: ImageTower, images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 (N, D). Raises UserError on NaN."""
    z = torch.cat([see(images[p].to(see.device, see.dtype) / 255) for p in see.pieces(len(images))])
    if not torch.isfinite(z).all():
        raise UserError(
            "the encoder gives NaN or infinite vectors; its weights or its input size are wrong"
        )
    return z


@torch.no_grad()
def measure_success(
    see: ImageTower, u: Tensor, which: Tensor, clean: Pairs, aim: TriggerObjective
) -> Tensor:
    """Success (G,) of triggers over all clean images, one trigger after the other."""
    found = []
    for i in range(len(u)):
        parts = (clean.images[p].to(u) / 255 for p in see.pieces(len(clean)))
        z = torch.cat([see(stamp_triggers(u[i : i + 1], x)) for x in parts])
        found.append(aim(z[None], which[i : i + 1])[1])
    return torch.cat(found)


def anomaly_index(norms: Tensor) -> Tensor:
    """|norm - median| / (1.4826 MAD) of each norm (G,) below the median, 0 of the others: float64 (G,), on the CPU.

    Neural Cleanse's anomaly index; the median of an even number is the mean of its two middle ones.
    """
    x = norms.detach().double().cpu()
    middle = x.quantile(0.5)
    away = (x - middle).abs()
    return torch.where(x < middle, away / (CONSISTENT * away.quantile(0.5).clamp(min=SAME)), 0.0)


OutlierStatistic = Literal["log_ratio", "anomaly_index", "log_anomaly_index"]


def outlier_verdict(
    found: InvertedTriggers, names: Sequence[str], what: str, score: OutlierStatistic, n: int
) -> Verdict:
    """The verdict of an audit that asks whether one of the targets `names` is far easier than the others.

    what: a target in a word. score: which evidence is the value. n: clean images.
    """
    norms = found.norms.double().cpu().clamp(min=SAME)
    first, many = int(norms.argmin()), f"{len(norms)} {what} triggers, {n} clean images"
    values = {
        "log_ratio": (
            float((norms.quantile(0.5) / norms[first]).log()),
            "log(median norm / least norm)",
        ),
        "anomaly_index": (
            float(anomaly_index(norms).max()),
            "|norm - median| / (1.4826 MAD) of the least mask's norm",
        ),
        "log_anomaly_index": (
            float(anomaly_index(norms.log()).max()),
            "the anomaly index of the norms' logarithms",
        ),
        "least_norm": (
            float(norms[first]),
            f"pixels that the least mask covers, of {names[first]!r}",
        ),
        "median_norm": (float(norms.quantile(0.5)), "pixels that the median mask covers"),
    }
    evidence = {name: exact_measure(x, n, f"{how}; {many}") for name, (x, how) in values.items()}
    turned = f"clean images that the least trigger makes {names[first]!r}"
    evidence["success"] = proportion(round(float(found.success[first]) * n), n, turned)
    limits = []
    if len(norms) < MIN_NORMS:
        few = f"{len(norms)} {what} triggers are too few for an anomaly index, which means nothing under {MIN_NORMS}"
        limits.append(
            few + ("" if score == "log_ratio" else "; the value is log(median norm / least norm)")
        )
    missed = [
        name for name, reached in zip(names, found.reached.tolist(), strict=True) if not reached
    ]
    if missed:
        limits.append(
            f"no trigger for {len(missed)} of {len(norms)} reached the success asked for, within {int(found.steps.max())} "
            f"steps; they count with the most successful mask: {', '.join(missed[:8])}"
        )
    value = values["log_ratio" if len(norms) < MIN_NORMS else score][0]
    notes = {"target": names[first], "unreached": missed, "limits": limits}
    return Verdict(value, evidence, found.inversions(names), notes)
