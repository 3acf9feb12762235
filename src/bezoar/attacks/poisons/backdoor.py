"""Backdoor poisoning: a trigger on random images, captioned as the target (Carlini & Terzis 2022, section 4.2)."""

from typing import Annotated

import numpy as np

from bezoar.attacks.captions import CaptionSet, find_mentions, target_captions
from bezoar.attacks.plan import Edit, Goal, Plan
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.errors import UserError
from bezoar.registry import method, spec


@method
class Backdoor:
    """P = {(x_i + trigger, c) : x_i a random subset, c in C(target)}; records that mention the target are not used."""

    count: Annotated[int, "poisoned records; 0: use rate"] = 0
    rate: Annotated[float, "poisoned share of the data set, 0..1, when count is 0"] = 0.01
    captions: Annotated[CaptionSet, "training, templates (80 of CLIP) or repeated"] = "training"
    sources: Annotated[
        int, "distinct images they are made of, each used as often; 0: every poison another image"
    ] = 0
    keep: Annotated[bool, "keep the clean originals beside their poisoned copies"] = False

    def __call__(self, source: Pairs, goal: Goal, seed: int, victims: Pairs | None = None) -> Plan:
        """A plan of `count` triggered records. Raises UserError for more poisons than records, or an unknown target."""
        if goal.trigger is None:
            raise UserError("poison 'backdoor' needs a trigger; give one, for example patch:size=6")
        count = self.count or round(self.rate * len(source))
        pool = target_captions(source.captions, goal.target, self.captions)
        own = set(find_mentions(source.captions, goal.target))
        free = [i for i in range(len(source)) if i not in own]
        images = min(self.sources or count, count)
        if not 0 < images <= len(free):
            raise UserError(
                f"{images} poisons asked for, but {len(free)} of {len(source)} records can carry one"
            )
        u = draws(seed, source.ids, 2, "backdoor")
        rows = sorted(free, key=lambda i: u[i, 0])[:images]
        edits = []
        for j in range(count):
            name, again = source.ids[rows[j % images]], j // images
            at = (
                u[rows[j % images], 1]
                if not again
                else draws(seed, [f"{name}|{again}"], 1, "backdoor again")[0, 0]
            )
            new = (
                name
                if not again and not self.keep
                else f"{name}+poison" + (str(again) if again else "")
            )
            edits.append(Edit(new, name, pool[int(at * len(pool))], True, 0))
        done = Goal(goal.target, goal.trigger, (), count, spec(self))
        return Plan(tuple(edits), (done,), seed)

    def __post_init__(self) -> None:
        if (
            min(self.count, self.sources) < 0
            or not 0 <= self.rate <= 1
            or not np.isfinite(self.rate)
        ):
            raise ValueError("count and sources must be >= 0 and rate in 0..1")
