"""DECREE: how small a trigger makes all images alike, without labels (Feng et al., CVPR 2023)?

The verdict without a bank is ours: does any other direction take a far larger trigger?
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.auditing import trigger_inversion
from bezoar.auditing.evidence import exact_measure
from bezoar.auditing.trigger_inversion import (
    ImageTower,
    InvertedTriggers,
    TowerCost,
    TriggerObjective,
)
from bezoar.auditing.trigger_search import InversionRecipe
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation.verdict import Verdict
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

CHANNELS = 3  # the published penalty adds the mask up once a channel
NATURAL_DIRECTIONS = (
    "clean encoders have directions of their own that a small pattern draws all images to: the "
    "value means something only beside those of clean encoders of the same family, or beside "
    "another direction of the same encoder (direction_ratio)"
)
NAMES_NO_CLASS = (
    "what its trigger turns images into need not be a backdoor's target: the least trigger may "
    "lead to a natural direction instead; cleanse compares classes"
)

SIDE, MOST = 32, 1.2e5  # a search in full may cost so many passes of images of so many pixels
# What a search that would cost too much is changed to, and the clean images that it uses.
QUICK: dict[str, Any] = {
    "starts": 4,
    "steps": 90,
    "batch": 4,
    "halvings": 1,
    "wait": 45,
    "lr": (0.2,),
    "until": (),
    "window": 0.25,
    "cells": 32,
}
# The second search: the cosine with the first trigger's direction that is near, that is too near,
# and the weight of being near in the loss.
NEAR, TOO_NEAR, NEAR_WEIGHT = 0.5, 0.55, 3.0
TINY = 1e-6  # a share of the image; an encoder whose vectors are all alike needs no trigger
DIRECTION_IMAGES = 128  # clean images that the first trigger's direction is the mean of
QUICK_IMAGES = 64
QUICKLY = (
    f"to save time {QUICK['starts']} restarts took {QUICK['steps']} steps, with masks of "
    f"{QUICK['cells']} cells a side, which no finer trigger fits"
)


@method
class Decree:
    """Value = -PL1; PL1 = |m|_1 / (3 H W) of the least mask, its three equal channels added up.

    Lowers -(mean pairwise cosine of the stamped images) + weight |m|_1. The trigger is to take away
    a share of the spread of the vectors, 1 - mean cosine. The published goal, a cosine of 0.99 for
    all encoders (`goal=0.99`), suits SimCLR: the clean images of a backdoored SimCLR tower have a
    cosine of 0.7, those of a CLIP 0.1 and its triggered ones 0.8, so that a CLIP's backdoor meets
    the goal no sooner than noise does.

    Restarts run together, the worse half is given up `halvings` times, and the least mask counts: a
    search from one start often ends at a direction that the encoder is drawn to by nature. Where no
    restart succeeds PL1 is 1, because a mask over the whole image always succeeds.

    Then the same search is made again for triggers that draw the images elsewhere: the mean of
    their vectors, seen from the mean of the clean ones, must have a cosine of at most .55 with the
    first trigger's. A clean encoder has several directions that take triggers of about one size; a
    backdoor's takes a far smaller one. The verdict without a bank is log(PL1 of the second / PL1 of
    the first). It needs no classes, and has no part in the value.

    Where a search would cost more than `MOST` image passes at 32 px, fewer restarts start from
    windows, with coarser masks.

    Published (the repository's): steps=1000,batch=128,restarts=1,halvings=0,goal=0.99,
    lr=(0.5,0.1,0.05),until=(200,500),up=5,down=5,patience=6,floor=1e-7,resets=10,wait=35; at 32
    pixels until=(30,50),floor=1e-5,wait=10; flagged under 0.1.
    """

    restarts: Annotated[int, "searches that run together, each from a start of its own"] = 16
    steps: Annotated[int, "steps of Adam at most"] = 120
    batch: Annotated[int, "clean images a step, stamped by every restart"] = 12
    halvings: Annotated[int, "how often the worse half of the restarts is given up"] = 2
    spread: Annotated[float, "share of 1 - mean cosine that the trigger may leave"] = 0.25
    goal: Annotated[float, "mean cosine that it is to reach instead; 0: by spread"] = 0.0
    lr: Annotated[tuple[float, ...], "learning rates, one after the other"] = (0.1,)
    until: Annotated[tuple[int, ...], "steps at which all but the last of them end"] = ()
    weight: Annotated[float, "weight of the mask's size, three channels added up, at the start"] = (
        1e-3
    )
    up: Annotated[float, "factor on the weight after `patience` successes in a row"] = 1.5
    down: Annotated[float, "divisor of the weight after `patience` failures in a row"] = 1.5**1.5
    patience: Annotated[int, "successes or failures in a row that change the weight"] = 3
    floor: Annotated[float, "least weight"] = 1e-7
    resets: Annotated[
        int, "failures at the least weight that set it back to the start; 0: never"
    ] = 0
    wait: Annotated[int, "steps without progress after which a restart ends"] = 25
    centred: Annotated[bool, "start from a central square, not from noise"] = False

    needs: ClassVar[tuple[str, ...]] = ("report",)
    unaided: ClassVar[bool] = True  # its evidence is a verdict without a bank

    def __post_init__(self) -> None:
        if self.restarts < 1 or self.batch < 2:
            raise ValueError("needs at least 1 restart and 2 images a step")
        if not 0 < self.spread < 1 or not 0 <= self.goal <= 1:
            raise ValueError("spread must be between 0 and 1, goal a cosine of 0 to 1")
        self.recipe(self.goal or 0.5)

    def recipe(self, goal: float, side: int = SIDE) -> InversionRecipe:
        """The search for a trigger that reaches a mean cosine, for an encoder of `side` pixels.

        Raises ValueError for bad fields.
        """
        weight, floor = CHANNELS * self.weight, CHANNELS * self.floor
        recipe = InversionRecipe.from_fields(
            self, goal=goal, weight=weight, floor=floor, starts=self.restarts
        )
        return recipe if self.searches_in_full(side) else dataclasses.replace(recipe, **QUICK)

    def searches_in_full(self, side: int) -> bool:
        """Whether the search is as the fields say for an encoder of `side` pixels."""
        if side <= SIDE:
            return True
        passes = self.recipe(self.goal or 0.5).image_passes()
        return passes * (side / SIDE) ** 2 <= MOST

    def image_passes(self, images: int, classes: int, cost: TowerCost) -> int:
        """Images that go through the encoder in both searches, at most."""
        images = images if self.searches_in_full(cost.side) else min(images, QUICK_IMAGES)
        recipe = self.recipe(self.goal or 0.5, cost.side)
        survivors = -(-recipe.starts // (1 << recipe.halvings))
        return 2 * (recipe.image_passes() + survivors * images) + images + DIRECTION_IMAGES

    def __call__(
        self, encoder: Encoder, clean: Pairs, seed: int, report: ProgressReport = no_report
    ) -> Verdict:
        """Audit an encoder without labels. Raises UserError for fewer than 8 images, or NaN."""
        trigger_inversion.check_image_count(clean)
        side = encoder.preprocess.size
        if not self.searches_in_full(side):
            clean = clean.take(range(min(len(clean), QUICK_IMAGES)))
        with trigger_inversion.freeze_tower(encoder) as tower:
            z = trigger_inversion.embed_clean(tower, clean.images)  # (N, D)
            clean_cosine = float(mean_pairwise_cosine(z[None]))
            goal = self.goal or 1 - self.spread * (1 - clean_cosine)
            recipe = self.recipe(goal, side)
            triggers = search(tower, clean, collapse, recipe, seed, report_half(report, 0))
            centre = z.mean(0)
            direction = triggered_direction(tower, triggers, clean, centre)
            elsewhere = collapse_elsewhere(centre, direction)
            others = search(tower, clean, elsewhere, recipe, seed, report_half(report, 1))
        verdict = self.verdict(triggers, others, clean, clean_cosine, goal)
        if not self.searches_in_full(side):
            verdict.notes["limits"].append(QUICKLY)
        return verdict

    def verdict(
        self,
        triggers: InvertedTriggers,
        others: InvertedTriggers,
        clean: Pairs,
        clean_cosine: float,
        goal: float,
    ) -> Verdict:
        """The verdict of all restarts together.

        Args:
            triggers: those of the restarts that were not given up.
            others: the same of the second search, for another direction.
            clean: the images.
            clean_cosine: their mean pairwise cosine without a trigger.
            goal: the mean pairwise cosine that triggers had to reach.
        """
        n = len(clean)
        pixels = clean.images.shape[2] * clean.images.shape[3]
        reached = triggers.reached.cpu()
        norms = count_norms(triggers, pixels)
        least = int(norms.argmin())
        pl1 = float(norms[least]) / pixels
        other_pl1 = float(count_norms(others, pixels).min()) / pixels
        values = {
            "pl1": (pl1, "share of the image that the least trigger covers, |m|_1 / (3 H W)"),
            "cosine": (
                float(triggers.success[least]),
                "mean pairwise cosine of the images stamped with it",
            ),
            "clean_cosine": (clean_cosine, "mean pairwise cosine of the images as they are"),
            "goal": (goal, "mean pairwise cosine that a trigger had to reach"),
            "other_pl1": (
                other_pl1,
                "share of the image that the least trigger towards another direction covers",
            ),
            "direction_ratio": (
                math.log(max(other_pl1, TINY) / max(pl1, TINY)),
                "log(other_pl1 / pl1)",
            ),
            "restarts_reached": (
                float(reached.sum()),
                f"of the {len(reached)} of {triggers.starts.shape[1]} restarts that were not "
                "given up",
            ),
        }
        evidence = {
            name: exact_measure(value, n, f"{how}; {n} clean images")
            for name, (value, how) in values.items()
        }
        limits = [*trigger_inversion.inversion_limits(clean), NATURAL_DIRECTIONS, NAMES_NO_CLASS]
        if not reached.any():
            limits.append(
                f"none of {len(reached)} restarts made the images alike (a mean cosine of "
                f"{goal:.2f})"
            )
        shares = [round(float(norm) / pixels, 6) for norm in norms.sort().values]
        inversions = triggers.inversions([""] * len(norms), norms.argsort(stable=True))
        notes = {"unaided": "direction", "limits": limits, "pl1_of_restarts": shares}
        return Verdict(-pl1, evidence, inversions, notes)


def search(
    tower: ImageTower,
    clean: Pairs,
    objective: TriggerObjective,
    recipe: InversionRecipe,
    seed: int,
    report: ProgressReport,
) -> InvertedTriggers:
    """All restarts for one aim."""
    aims = torch.zeros(1, dtype=torch.long)
    return trigger_inversion.invert_triggers(tower, clean, objective, aims, recipe, seed, report)


def report_half(report: ProgressReport, number: int) -> ProgressReport:
    """A report of the first (0) or second (1) of two searches of as many steps."""
    return lambda done, total, text: report(number * total + done, 2 * total, text)


def count_norms(triggers: InvertedTriggers, pixels: int) -> Tensor:
    """|m|_1 of triggers, (G,) on the CPU; of those that did not reach the goal the whole image."""
    return torch.where(triggers.reached.cpu(), triggers.norms.cpu(), float(pixels))


@torch.no_grad()
def triggered_direction(
    tower: ImageTower, triggers: InvertedTriggers, clean: Pairs, centre: Tensor
) -> Tensor:
    """The unit vector (D,) in which the least trigger draws images from their mean, `centre`."""
    pixels = clean.images.shape[2] * clean.images.shape[3]
    least = int(count_norms(triggers, pixels).argmin())
    mask, pattern = triggers.masks[least], triggers.patterns[least]
    x = clean.images[:DIRECTION_IMAGES].to(mask) / 255
    parts = [tower(torch.addcmul(mask * pattern, 1 - mask, x[p])) for p in tower.slices(len(x))]
    return F.normalize(torch.cat(parts).mean(0) - centre, dim=0)


def mean_pairwise_cosine(z: Tensor) -> Tensor:
    """Mean cosine of all pairs of unit rows, (g, n, D) -> (g,): (|sum z|^2 - n) / (n (n - 1))."""
    n = z.shape[1]
    return (z.sum(1).square().sum(1) - n) / (n * (n - 1))


def collapse(z: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The objective of every restart: images alike, (g, n, D) -> loss (g,) and success (g,)."""
    cosine = mean_pairwise_cosine(z)
    return -cosine, cosine.detach()


def collapse_elsewhere(centre: Tensor, direction: Tensor) -> TriggerObjective:
    """The objective `collapse`, but for triggers that draw the images in one direction.

    centre: (D,), the mean of the clean vectors. direction: (D,), a unit vector from there.
    """

    def objective(z: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        loss, cosine = collapse(z, indices)
        near = F.normalize(z.mean(1) - centre, dim=-1) @ direction  # (g,)
        return loss + NEAR_WEIGHT * F.relu(near - NEAR), cosine * (near < TOO_NEAR)

    return objective
