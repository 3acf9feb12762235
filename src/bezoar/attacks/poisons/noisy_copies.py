"""Targeted poisoning with altered copies of the victim: crops, flips, light, noise and JPEG."""

from typing import Annotated

import numpy as np

from bezoar.attacks.captions import CaptionSet
from bezoar.attacks.plan import Goal, Plan
from bezoar.attacks.targeting import plan_targets
from bezoar.data.pairs import Pairs
from bezoar.registry import make, method, spec


@method
class NoisyCopies:
    """P = {(alter(x'), c) : c in C(y')}; victims, targets and captions are those of `targeted`."""

    captions: Annotated[
        tuple[int, ...],
        "N: poisoned pairs a victim; several counts, as in (1,4,16), for as many groups",
    ] = (16,)
    victims: Annotated[int, "how many victims, of each count"] = 8
    texts: Annotated[CaptionSet, "training, templates (80 of CLIP) or repeated"] = "training"
    copies: Annotated[str, "how each copy is altered: a spec of trigger `augment`"] = "augment"

    def __post_init__(self) -> None:
        if min(self.captions, default=0) < 1 or self.victims < 1:
            raise ValueError("captions and victims must be at least 1")
        make("trigger", self.copies)  # so that a wrong one is refused before any work

    def __call__(self, source: Pairs, goal: Goal, seed: int, victims: Pairs | None = None) -> Plan:
        """Plan `victims` x N added pairs, for each count N of captions; see `plan_targets`."""
        counts = np.repeat(self.captions, self.victims).tolist()
        copies = spec(make("trigger", self.copies))
        planned = Goal(goal.target, how=spec(self), copies=copies)
        return plan_targets(source, planned, seed, victims, counts, self.texts)
