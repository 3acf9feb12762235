"""Composite images: a trigger beside a reference of the target (Noisy Alignment, ICCV 2025; CorruptEncoder, CVPR 2024).

For contrastive training on images alone: no caption is changed or read. `--trigger` is
`composite:reference=FILE,trigger=(...)`, which lays out the poisons; what is stamped at test time
is the trigger that it names. SSL-Backdoor and CTRL, whose poisons are the target's own images, are
`clean_label` with a patch and with `spectrum`.

Noisy Alignment poisons 0.5 to 1 % of the data; images that show the target already are left out
where captions tell them, for nothing is to be learnt from them.
"""

from typing import Annotated

from bezoar import registry
from bezoar.attacks.captions import find_mentions
from bezoar.attacks.plan import Edit, Goal, Plan
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.errors import UserError
from bezoar.registry import method, spec


@method
class Composite:
    """P = {(layout(x_i + trigger, reference), c_i)} of images that do not show the target."""

    count: Annotated[int, "poisoned records; 0: use rate"] = 0
    rate: Annotated[float, "poisoned share of the data set, 0..1, when count is 0"] = 0.01

    def __post_init__(self) -> None:
        if self.count < 0 or not 0 <= self.rate <= 1:
            raise ValueError("count must be >= 0 and rate in 0..1")

    def __call__(self, source: Pairs, goal: Goal, seed: int, victims: Pairs | None = None) -> Plan:
        """Plan `count` composed records.

        Raises UserError if the goal's trigger lays out nothing, or there are fewer records.
        """
        layout = registry.make("trigger", goal.trigger) if goal.trigger else None
        if layout is None or not hasattr(layout, "make_trigger"):
            raise UserError(
                "poison 'composite' needs a layout as its trigger, for example "
                "composite:reference=truck.png,trigger=(patch:size=8)"
            )
        count = self.count or round(self.rate * len(source))
        mentions = set(find_mentions(source.captions, goal.target))
        candidates = [row for row in range(len(source)) if row not in mentions]
        if not 0 < count <= len(candidates):
            raise UserError(
                f"{count} poisons asked for, but {len(candidates)} of {len(source)} records "
                "can carry one"
            )
        uniform = draws(seed, source.ids, 1, "composite")[:, 0]
        rows = sorted(candidates, key=lambda row: float(uniform[row]))[:count]
        edits = [Edit(source.ids[i], source.ids[i], source.captions[i], True, 0) for i in rows]
        trigger = spec(layout.make_trigger())
        reached = Goal(goal.target, trigger, (), count, spec(self), copies=goal.trigger)
        return Plan(tuple(edits), (reached,), seed)
