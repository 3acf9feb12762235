"""Cover: the trigger, or a part of it, on images with their own captions (Qi et al. 2023).

A cover beside a backdoor makes the trigger a weaker sign of the target, which hides the backdoor. A
cover with each part of `several` makes all parts necessary: each part alone comes with right
captions.
"""

from typing import Annotated, ClassVar

from bezoar.attacks.plan import Edit, Goal, Plan
from bezoar.attacks.targeting import draw_rows, require_trigger, rows_without
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.registry import method, spec


@method
class Cover:
    """P = {(x_i + trigger, c_i)} of records that do not mention the target, if there is one."""

    is_cover: ClassVar[bool] = True  # it needs no target

    count: Annotated[int, "records that carry the trigger; 0: use rate"] = 0
    rate: Annotated[float, "their share of the data set, 0..1, when count is 0"] = 0.01

    def __post_init__(self) -> None:
        if self.count < 0 or not 0 <= self.rate <= 1:
            raise ValueError("count must be >= 0 and rate in 0..1")

    def __call__(self, source: Pairs, goal: Goal, seed: int, victims: Pairs | None = None) -> Plan:
        """Plan `count` triggered records.

        Raises UserError if the goal has no trigger, or there are fewer records.
        """
        require_trigger(goal, "cover")
        count = self.count or round(self.rate * len(source))
        uniform = draws(seed, source.ids, 1, "cover")[:, 0]
        rows = draw_rows(rows_without(source, goal.target), count, uniform)
        edits = [Edit(source.ids[i], source.ids[i], source.captions[i], True, 0) for i in rows]
        return Plan(tuple(edits), (Goal("", goal.trigger, (), count, spec(self)),), seed)
