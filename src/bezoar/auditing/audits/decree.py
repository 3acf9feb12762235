"""DECREE: how small a trigger makes all images alike? No labels, no text (Feng et al., CVPR 2023)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from bezoar.auditing import trigger_inversion
from bezoar.auditing.trigger_inversion import InversionRecipe, InvertedTriggers
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation.heads import ProgressReport, no_report
from bezoar.evaluation.verdict import Verdict
from bezoar.registry import method

CHANNELS = 3  # the published penalty adds the mask up once a channel


@method
class Decree:
    """Value = -PL1, PL1 = |m|_1 / (3 H W) of the least mask found, its three equal channels added up: the mask's mean.

    Lowers -(mean pairwise cosine of the stamped images) + weight |m|_1. The trigger is to take away a share of the spread
    of the vectors, 1 - mean cosine: a backdoored SimCLR tower's clean images have a cosine of 0.7, a CLIP's of 0.1, and its
    triggered ones 0.8, so that the published goal, 0.99 for all (`goal=0.99`), is met by a CLIP's backdoor no sooner than
    by noise. Restarts run together, the worse half is given up `halvings` times, the least mask counts: a search from one
    start often ends at a direction that the encoder is drawn to by nature. Where no restart succeeds PL1 is 1, for a mask
    over the whole image always does.

    Published (the repository's): steps=1000,batch=128,restarts=1,halvings=0,goal=0.99,lr=(0.5,0.1,0.05),until=(200,500),
    up=5,down=5,patience=6,floor=1e-7,resets=10,wait=35; at 32 pixels until=(30,50),floor=1e-5,wait=10; flagged under 0.1.
    """

    restarts: Annotated[int, "searches that run together, each from a start of its own"] = 16
    steps: Annotated[int, "of Adam at most"] = 120
    batch: Annotated[int, "clean images a step, stamped by every restart"] = 12
    halvings: Annotated[int, "how often the worse half of the restarts is given up"] = 2
    spread: Annotated[float, "share of 1 - mean cosine that the trigger may leave"] = 0.25
    goal: Annotated[float, "mean cosine that it is to reach instead; 0: by spread"] = 0.0
    lr: Annotated[tuple[float, ...], "learning rates"] = (0.1,)
    until: Annotated[tuple[int, ...], "steps at which all but the last of them end"] = ()
    weight: Annotated[float, "of the mask's size, three channels added up, at the start"] = 1e-3
    up: Annotated[float, "the weight is multiplied by this after `patience` successes"] = 1.5
    down: Annotated[float, "... and divided by this after as many failures"] = 1.5**1.5
    patience: Annotated[int, "successes or failures in a row that change the weight"] = 3
    floor: Annotated[float, "least weight"] = 1e-7
    resets: Annotated[
        int, "failures at the least weight that set it back to the start; 0: never"
    ] = 0
    wait: Annotated[int, "steps without progress after which a restart is done"] = 25
    centred: Annotated[bool, "start from a central square, not from noise"] = False

    needs: ClassVar[tuple[str, ...]] = ("report",)

    def __post_init__(self) -> None:
        if self.restarts < 1 or self.batch < 2:
            raise ValueError("needs at least 1 restart and 2 images a step")
        if not 0 < self.spread < 1 or not 0 <= self.goal <= 1:
            raise ValueError("spread must be between 0 and 1, goal a cosine of 0 to 1")
        self.descent(self.goal or 0.5)

    def descent(self, goal: float) -> InversionRecipe:
        """The search for a trigger that reaches a mean cosine."""
        return InversionRecipe(
            self.steps,
            self.batch,
            self.lr,
            self.until,
            CHANNELS * self.weight,
            self.up,
            self.down,
            self.patience,
            CHANNELS * self.floor,
            self.resets,
            goal,
            self.halvings,
            self.wait,
            self.centred,
        )

    def __call__(
        self, encoder: Encoder, clean: Pairs, seed: int, report: ProgressReport = no_report
    ) -> Verdict:
        """clean: labels and classes are not read. Raises UserError for fewer than 8 images, or NaN."""
        trigger_inversion.check_image_count(clean)
        with trigger_inversion.freeze_tower(encoder) as see:
            z = trigger_inversion.embed_clean(see, clean.images)
            before = float(cosine(z[None]))
            goal = self.goal or 1 - self.spread * (1 - before)
            found = trigger_inversion.invert_triggers(
                see, clean, collapse, self.restarts, self.descent(goal), seed, report
            )
        return self.verdict(found, clean, before, goal)

    def verdict(self, found: InvertedTriggers, clean: Pairs, before: float, goal: float) -> Verdict:
        """What the restarts say together."""
        pixels, n, reached = (
            clean.images.shape[2] * clean.images.shape[3],
            len(clean),
            found.reached.cpu(),
        )
        norms = torch.where(reached, found.norms.cpu(), float(pixels))
        least = int(norms.argmin())
        pl1 = float(norms[least]) / pixels
        evidence = {
            "pl1": (pl1, "share of the image that the least trigger covers, |m|_1 / (3 H W)"),
            "cosine": (
                float(found.success[least]),
                "mean pairwise cosine of the images stamped with it",
            ),
            "clean_cosine": (before, "mean pairwise cosine of the images as they are"),
            "goal": (goal, "mean pairwise cosine that a trigger had to reach"),
            "restarts_reached": (
                float(reached.sum()),
                f"of the {len(reached)} of {self.restarts} restarts that were not given up",
            ),
        }
        limits = [*trigger_inversion.inversion_limits(clean), NATURAL]
        if not reached.any():
            limits.append(
                f"none of {len(reached)} restarts made the images alike (a mean cosine of {goal:.2f})"
            )
        return Verdict(
            -pl1,
            {
                name: trigger_inversion.exact_measure(value, n, f"{how}; {n} clean images")
                for name, (value, how) in evidence.items()
            },
            found.inversions([""] * len(norms), norms.argsort(stable=True)),
            {
                "limits": limits,
                "pl1_of_restarts": [round(float(x) / pixels, 6) for x in norms.sort().values],
            },
        )


NATURAL = (
    "clean encoders have directions of their own that a small pattern draws all images to: a value says something beside "
    "those of clean encoders of the same family alone"
)


def cosine(z: Tensor) -> Tensor:
    """Unit rows (g, n, D) -> (g,), mean cosine of all pairs of two rows: (|sum z|^2 - n) / (n (n - 1))."""
    n = z.shape[1]
    return (z.sum(1).square().sum(1) - n) / (n * (n - 1))


def collapse(z: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """The aim of every restart: images alike."""
    found = cosine(z)
    return -found, found.detach()
