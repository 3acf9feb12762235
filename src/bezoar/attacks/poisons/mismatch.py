"""Wrong pairs that make a text query retrieve images of another class (mmPoison, Yang et al. 2023).

These are the paper's attacks I and II: captions of class A with images of class B, of one image or
of several. Here `query` is A, the goal's target is B, and `images` is the number of images of B.
The paper replaces the images of A's records. Here the wrong pairs are added, so A's right pairs
stay, and the attack has to outweigh them. The probe `retrieval` measures Hit@k and MinRank.
"""

from typing import Annotated

from bezoar.attacks.captions import find_mentions
from bezoar.attacks.plan import Edit, Goal, Plan
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.errors import UserError
from bezoar.registry import method, spec


@method
class Mismatch:
    """P = {(x_i, c_j) : c_i mentions the target, not the query; c_j the query, not the target}."""

    query: Annotated[str, "class or word of the captions that shall retrieve the target"]
    count: Annotated[int, "added pairs; 0: use rate"] = 0
    rate: Annotated[float, "added pairs as a share of the data set, 0..1, when count is 0"] = 0.01
    images: Annotated[int, "distinct images of the target, each used as often; 0: all"] = 0

    def __post_init__(self) -> None:
        if not self.query.strip():
            raise ValueError("query must name what captions mention")
        if min(self.count, self.images) < 0 or not 0 <= self.rate <= 1:
            raise ValueError("count and images must be >= 0 and rate in 0..1")

    def __call__(self, source: Pairs, goal: Goal, seed: int, victims: Pairs | None = None) -> Plan:
        """Plan `count` added pairs.

        Raises UserError if the goal has a trigger, or no record shows the target, or mentions the
        query, alone.
        """
        if goal.trigger:
            raise UserError("poison 'mismatch' stamps nothing; leave the trigger out")
        count = self.count or round(self.rate * len(source))
        of_target = find_mentions(source.captions, goal.target)
        of_query = find_mentions(source.captions, self.query)
        both = set(of_target) & set(of_query)
        image_rows = [row for row in of_target if row not in both]
        caption_rows = [row for row in of_query if row not in both]
        for rows, word in ((image_rows, goal.target), (caption_rows, self.query)):
            if not rows:
                raise UserError(
                    f"no caption holds {word!r} alone ({len(source)} captions searched, by whole "
                    "words)"
                )
        if not count:
            raise UserError("no pairs asked for: give count, or a larger rate")
        # Column 0 orders images, column 1 captions; either begins again where it runs out.
        uniform = draws(seed, source.ids, 2, "mismatch")
        image_rows.sort(key=lambda row: float(uniform[row, 0]))
        caption_rows.sort(key=lambda row: float(uniform[row, 1]))
        image_rows = image_rows[: self.images or None]
        edits = []
        for i in range(count):
            record_id = source.ids[image_rows[i % len(image_rows)]]
            caption = source.captions[caption_rows[i % len(caption_rows)]]
            poison_id = f"{record_id}+poison{i // len(image_rows)}"
            edits.append(Edit(poison_id, record_id, caption, False, 0))
        planned = Goal(goal.target, None, (), count, spec(self), query=self.query)
        return Plan(tuple(edits), (planned,), seed)
