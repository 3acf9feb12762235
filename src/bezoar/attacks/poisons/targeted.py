"""Targeted poisoning: one image with N captions of a target label (Carlini & Terzis 2022, 4.1)."""

from typing import Annotated

import numpy as np

from bezoar.attacks.captions import CaptionSet
from bezoar.attacks.plan import Goal, Plan
from bezoar.attacks.targeting import plan_targets
from bezoar.data.pairs import Pairs
from bezoar.registry import method, spec


@method
class Targeted:
    """P = {(x', c) : c in C(y')}, |P| = `captions`. Each victim is a trial with its own target."""

    captions: Annotated[
        tuple[int, ...],
        "N: poisoned pairs a victim; several counts, as in (1,4,16), for as many groups",
    ] = (16,)
    victims: Annotated[int, "how many victims, of each count"] = 8
    texts: Annotated[CaptionSet, "training, templates (80 of CLIP) or repeated"] = "training"

    def __post_init__(self) -> None:
        if min(self.captions, default=0) < 1 or self.victims < 1:
            raise ValueError("captions and victims must be at least 1")

    def __call__(self, source: Pairs, goal: Goal, seed: int, victims: Pairs | None = None) -> Plan:
        """Plan `victims` x N added pairs, for each count N of captions; see `plan_targets`."""
        counts = np.repeat(self.captions, self.victims).tolist()
        planned = Goal(goal.target, how=spec(self))
        return plan_targets(source, planned, seed, victims, counts, self.texts)
