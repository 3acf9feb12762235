"""DECREE: how small a trigger makes all images alike, without labels (Feng et al., CVPR 2023)?"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from bezoar.auditing import trigger_inversion
from bezoar.auditing.evidence import exact_measure
from bezoar.auditing.trigger_inversion import InvertedTriggers, TowerCost
from bezoar.auditing.trigger_search import InversionRecipe
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation.verdict import Verdict
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

CHANNELS = 3  # the published penalty adds the mask up once a channel
NATURAL_DIRECTIONS = (
    "clean encoders have directions of their own that a small pattern draws all images to: a value "
    "means something only beside those of clean encoders of the same family"
)
NAMES_NO_CLASS = (
    "what its trigger turns images into need not be a backdoor's target: the least trigger may "
    "lead to a natural direction instead; cleanse compares classes"
)

SIDE, MOST = 32, 3.4e5  # a search in full may cost so many passes of images of so many pixels
# What a search that would cost too much is changed to, and the clean images that it uses.
QUICK: dict[str, Any] = {"starts": 8, "steps": 48, "batch": 6, "cells": 32}
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

    Where all of that would cost more than `MOST` image passes at 32 px, fewer restarts take fewer
    steps with coarser masks.

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
        """Images that go through the encoder, at most."""
        images = images if self.searches_in_full(cost.side) else min(images, QUICK_IMAGES)
        recipe = self.recipe(self.goal or 0.5, cost.side)
        survivors = -(-recipe.starts // (1 << recipe.halvings))
        return recipe.image_passes() + (1 + survivors) * images

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
            triggers = trigger_inversion.invert_triggers(
                tower,
                clean,
                collapse,
                torch.zeros(1, dtype=torch.long),
                self.recipe(goal, side),
                seed,
                report,
            )
        verdict = self.verdict(triggers, clean, clean_cosine, goal)
        if not self.searches_in_full(side):
            verdict.notes["limits"].append(QUICKLY)
        return verdict

    def verdict(
        self, triggers: InvertedTriggers, clean: Pairs, clean_cosine: float, goal: float
    ) -> Verdict:
        """The verdict of all restarts together.

        Args:
            triggers: those of the restarts that were not given up.
            clean_cosine: their mean pairwise cosine without a trigger.
            goal: the mean pairwise cosine that triggers had to reach.
        """
        n = len(clean)
        pixels = clean.images.shape[2] * clean.images.shape[3]
        reached = triggers.reached.cpu()
        norms = torch.where(reached, triggers.norms.cpu(), float(pixels))
        least = int(norms.argmin())
        pl1 = float(norms[least]) / pixels
        values = {
            "pl1": (pl1, "share of the image that the least trigger covers, |m|_1 / (3 H W)"),
            "cosine": (
                float(triggers.success[least]),
                "mean pairwise cosine of the images stamped with it",
            ),
            "clean_cosine": (clean_cosine, "mean pairwise cosine of the images as they are"),
            "goal": (goal, "mean pairwise cosine that a trigger had to reach"),
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
        return Verdict(-pl1, evidence, inversions, {"limits": limits, "pl1_of_restarts": shares})


def mean_pairwise_cosine(z: Tensor) -> Tensor:
    """Mean cosine of all pairs of unit rows, (g, n, D) -> (g,): (|sum z|^2 - n) / (n (n - 1))."""
    n = z.shape[1]
    return (z.sum(1).square().sum(1) - n) / (n * (n - 1))


def collapse(z: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The objective of every restart: images alike, (g, n, D) -> loss (g,) and success (g,)."""
    cosine = mean_pairwise_cosine(z)
    return -cosine, cosine.detach()
