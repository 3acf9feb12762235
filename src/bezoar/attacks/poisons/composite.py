"""Composite poisons: the trigger beside a reference of the target, for training on images alone.

They are those of Noisy Alignment (ICCV 2025) and CorruptEncoder (CVPR 2024). No caption is changed;
captions only show which records are of the target. References are drawn from these records and
written into the plan as pixels, for images of up to 64 pixels. For larger images name files of your
own, with `--trigger composite:reference=FILE+FILE,trigger=(patch:size=50)`. At test time only the
trigger is stamped. SSL-Backdoor and CTRL poison the target's own images: see `clean_label`, with a
patch and with `spectrum`.

Noisy Alignment poisons 0.5 to 1 % of the data. Trigger `composite` sets the place of the patch on
its half.
"""

from typing import Annotated, Any, Literal

from bezoar import registry
from bezoar.attacks.captions import find_mentions
from bezoar.attacks.plan import Edit, Goal, Plan
from bezoar.attacks.targeting import draw_rows, require_trigger, rows_without
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.errors import UserError
from bezoar.registry import method, spec

MOST_DIGITS = 1 << 16  # of all references together


@method
class Composite:
    """P = {(layout(x_i + trigger, reference), c_i)} of images that do not show the target."""

    count: Annotated[int, "poisoned records; 0: use rate"] = 0
    rate: Annotated[float, "poisoned share of the data set, 0..1, when count is 0"] = 0.01
    references: Annotated[int, "number of reference images of the target, 1 to 16"] = 3
    share: Annotated[float, "of the image that a reference takes, above 0 and below 1"] = 0.5
    sides: Annotated[
        Literal["any", "horizontal"], "where it lies: Noisy Alignment's, or CorruptEncoder's"
    ] = "any"

    def __post_init__(self) -> None:
        if self.count < 0 or not 0 <= self.rate <= 1:
            raise ValueError("count must be >= 0 and rate in 0..1")
        if not 1 <= self.references <= 16 or not 0 < self.share < 1:
            raise ValueError("references must lie in 1..16 and share in (0, 1)")

    def __call__(self, source: Pairs, goal: Goal, seed: int, victims: Pairs | None = None) -> Plan:
        """Plan `count` composed records.

        Raises UserError if the goal has no trigger, or there are too few records.
        """
        bare = require_trigger(goal, "composite")
        count = self.count or round(self.rate * len(source))
        # Column 0 chooses the poisons, column 1 the references.
        uniform = draws(seed, source.ids, 2, "composite")
        rows = draw_rows(rows_without(source, goal.target), count, uniform[:, 0])
        layout = registry.make("trigger", bare)
        if not hasattr(layout, "make_trigger"):
            mentions = find_mentions(source.captions, goal.target)
            chosen = sorted(mentions, key=lambda row: float(uniform[row, 1]))[: self.references]
            layout = self.lay_out(source.take(chosen), goal)
        edits = [Edit(source.ids[i], source.ids[i], source.captions[i], True, 0) for i in rows]
        trigger = spec(layout.make_trigger())
        planned = Goal(goal.target, trigger, (), count, spec(self), copies=spec(layout))
        return Plan(tuple(edits), (planned,), seed)

    def lay_out(self, references: Pairs, goal: Goal) -> Any:
        """Return the layout of references beside images with the goal's trigger.

        Raises UserError if there is none, or if their pixels are too many for a plan.
        """
        if not len(references):
            raise UserError(f"no caption holds {goal.target!r}, so that there is no reference")
        pictures = references.images.permute(0, 2, 3, 1).flatten(1)  # (R, H W 3)
        digits = ["#" + bytes(picture.tolist()).hex() for picture in pictures]
        sizes = references.images.shape[2:]
        if sizes[0] != sizes[1] or sum(map(len, digits)) > MOST_DIGITS:
            raise UserError(
                f"{len(digits)} references of {sizes[0]}x{sizes[1]} px do not fit into a plan; "
                "name files: --trigger composite:reference=FILE,trigger=(...)"
            )
        fields = f"share={self.share},sides={self.sides},trigger=({goal.trigger})"
        return registry.make("trigger", f"composite:reference={'+'.join(digits)},{fields}")
