"""Clean-label backdoor: the trigger on the target's own images (Turner, Tsipras, Madry 2019).

For trainings on images alone (`simclr`, `moco`, `simsiam`), which read no captions, this is
SSL-Backdoor with a patch (Saha et al., CVPR 2022: half of the target's images, `place=random`) and
CTRL with `spectrum` (Li et al., ICCV 2023: a tenth of them). Class names are the captions of
labelled data. SSL-Backdoor keeps the patch between a quarter and three quarters of the side in
training, and between a tenth and nine tenths at test; here both use one margin.
"""

from typing import Annotated

from bezoar.attacks.captions import find_mentions
from bezoar.attacks.plan import Edit, Goal, Plan
from bezoar.attacks.targeting import draw_rows, require_trigger
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.registry import method, spec


@method
class CleanLabel:
    """P = {(x_i + trigger, c_i) : c_i mentions the target}; captions stay true to their images."""

    count: Annotated[int, "poisoned records; 0: use rate"] = 0
    rate: Annotated[float, "poisoned share of the data set, 0..1, when count is 0"] = 0.01

    def __post_init__(self) -> None:
        if self.count < 0 or not 0 <= self.rate <= 1:
            raise ValueError("count must be >= 0 and rate in 0..1")

    def __call__(self, source: Pairs, goal: Goal, seed: int, victims: Pairs | None = None) -> Plan:
        """Plan `count` triggered records of the target.

        Raises UserError if the goal has no trigger, or fewer records mention the target.
        """
        require_trigger(goal, "clean_label")
        count = self.count or round(self.rate * len(source))
        mentions = find_mentions(source.captions, goal.target)
        uniform = draws(seed, source.ids, 1, "clean label")[:, 0]
        rows = draw_rows(mentions, count, uniform, f"captions hold {goal.target!r}")
        edits = [Edit(source.ids[i], source.ids[i], source.captions[i], True, 0) for i in rows]
        planned = Goal(goal.target, goal.trigger, (), count, spec(self))
        return Plan(tuple(edits), (planned,), seed)
