"""Backdoor poisoning: a trigger on images, captioned as the target (Carlini & Terzis 2022)."""

from typing import Annotated

from bezoar.attacks.captions import CaptionSet, target_captions
from bezoar.attacks.plan import Edit, Goal, Plan
from bezoar.attacks.targeting import draw_rows, require_trigger, rows_without
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.registry import method, spec


@method
class Backdoor:
    """P = {(x_i + trigger, c) : c in C(target)}, of records that do not mention the target."""

    count: Annotated[int, "poisoned records; 0: use rate"] = 0
    rate: Annotated[float, "poisoned share of the data set, 0..1, when count is 0"] = 0.01
    captions: Annotated[CaptionSet, "training, templates (80 of CLIP) or repeated"] = "training"
    sources: Annotated[
        int, "distinct images they are made of, each used as often; 0: every poison another image"
    ] = 0
    keep: Annotated[bool, "keep the clean originals beside their poisoned copies"] = False

    def __post_init__(self) -> None:
        if min(self.count, self.sources) < 0 or not 0 <= self.rate <= 1:
            raise ValueError("count and sources must be >= 0 and rate in 0..1")

    def __call__(self, source: Pairs, goal: Goal, seed: int, victims: Pairs | None = None) -> Plan:
        """Plan `count` triggered records.

        Raises UserError if the goal has no trigger, no caption mentions the target, or there are
        fewer records than poisons.
        """
        require_trigger(goal, "backdoor")
        count = self.count or round(self.rate * len(source))
        captions = target_captions(source.captions, goal.target, self.captions)
        candidates = rows_without(source, goal.target)
        distinct = min(self.sources or count, count)
        # Column 0 chooses the images, column 1 the caption of an image's first poison.
        uniform = draws(seed, source.ids, 2, "backdoor")
        rows = draw_rows(candidates, distinct, uniform[:, 0])
        edits = []
        for i in range(count):
            row, copy = rows[i % distinct], i // distinct
            record_id = source.ids[row]
            u = uniform[row, 1]
            if copy:
                u = draws(seed, [f"{record_id}|{copy}"], 1, "backdoor again")[0, 0]
            caption = captions[int(u * len(captions))]
            edits.append(Edit(self._poison_id(record_id, copy), record_id, caption, True, 0))
        planned = Goal(goal.target, goal.trigger, (), count, spec(self))
        return Plan(tuple(edits), (planned,), seed)

    def _poison_id(self, record_id: str, copy: int) -> str:
        """Return the id of an image's poison number `copy`; the first one replaces its original."""
        if not copy and not self.keep:
            return record_id
        return f"{record_id}+poison{copy or ''}"
