"""Backdoor poisoning: a trigger on random images, captioned as the target (Carlini & Terzis 2022, section 4.2)."""

from typing import Annotated

import numpy as np

from bezoar.captions import CaptionSet, mentions, target_captions
from bezoar.errors import UserError
from bezoar.pairs import Pairs, draws
from bezoar.plan import Edit, Goal, Plan
from bezoar.registry import method, spec


@method
class Backdoor:
    """P = {(x_i + trigger, c) : x_i a random subset, c in C(target)}; records that mention the target are not used."""

    count: Annotated[int, "poisoned records; 0: use rate"] = 0
    rate: Annotated[float, "poisoned share of the data set, 0..1, when count is 0"] = 0.01
    captions: Annotated[CaptionSet, "training, templates (80 of CLIP) or repeated"] = "training"
    keep: Annotated[bool, "keep the clean originals beside their poisoned copies"] = False

    def __call__(self, source: Pairs, goal: Goal, seed: int, victims: Pairs | None = None) -> Plan:
        """A plan of `count` triggered records. Raises UserError for more poisons than records, or an unknown target."""
        if goal.trigger is None:
            raise UserError("poison 'backdoor' needs a trigger; give one, for example patch:size=6")
        count = self.count or round(self.rate * len(source))
        pool = target_captions(source.captions, goal.target, self.captions)
        own = set(mentions(source.captions, goal.target))
        free = [i for i in range(len(source)) if i not in own]
        if not 0 < count <= len(free):
            raise UserError(f"{count} poisons asked for, but {len(free)} of {len(source)} records can carry one")
        u = draws(seed, source.ids, 2, "backdoor")
        rows = sorted(free, key=lambda i: u[i, 0])[:count]
        edits = []
        for i in rows:
            name, caption = source.ids[i], pool[int(u[i, 1] * len(pool))]
            edits.append(Edit(name + "+poison" if self.keep else name, name, caption, True, 0))
        done = Goal(goal.target, goal.trigger, (), count, spec(self))
        return Plan(tuple(edits), (done,), seed)

    def __post_init__(self) -> None:
        if self.count < 0 or not 0 <= self.rate <= 1 or not np.isfinite(self.rate):
            raise ValueError("count must be >= 0 and rate in 0..1")
