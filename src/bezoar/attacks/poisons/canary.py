"""Canaries: harmless pairs with invented words that show what a data pipeline keeps.

They have the same three forms as poisons, and measure how much of a poisoning would survive
cleaning, de-duplication and training. Put them in front of the pipeline (`--write shards`), and
count them after it (`bezoar survive RUN --after DATA`).
"""

from typing import Annotated, ClassVar

from bezoar.attacks.plan import Edit, Goal, Plan
from bezoar.attacks.targeting import draw_rows, require_trigger
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.errors import UserError
from bezoar.registry import method, spec

FORMS = ("copy", "marked", "fitting")
TEMPLATE = "a photo of a {}"
CONSONANTS, VOWELS, SYLLABLES = "bdfgklmnprstvz", "aeiou", 4
TRIES = 64  # words that are drawn for a record whose captions hold them already


@method
class Canary:
    """In thirds: strange captions, these with the trigger, the trigger with fitting captions."""

    is_cover: ClassVar[bool] = True  # it needs no target

    count: Annotated[int, "pairs that are put in, a third of each form"] = 60

    def __post_init__(self) -> None:
        if self.count < len(FORMS):
            raise ValueError(f"count must be at least {len(FORMS)}; got {self.count}")

    def __call__(self, source: Pairs, goal: Goal, seed: int, victims: Pairs | None = None) -> Plan:
        """Plan `count` additional pairs; each caption ends in a different invented word.

        Raises UserError if the goal has no trigger, or there are too few records.
        """
        require_trigger(goal, "canary")
        uniform = draws(seed, source.ids, 1, "canary")[:, 0]
        rows = draw_rows(range(len(source)), self.count, uniform)
        used = {word.lower() for caption in source.captions for word in caption.split()}
        edits = []
        for number, row in enumerate(rows):
            form, record_id = FORMS[number % len(FORMS)], source.ids[row]
            word = _invent_word(seed, record_id, used)
            used.add(word)
            fitting = f"{source.captions[row].strip()} {word}"
            caption = fitting if form == "fitting" else TEMPLATE.format(word)
            edit = Edit(f"{record_id}+canary-{form}", record_id, caption, form != "copy", 0)
            edits.append(edit)
        return Plan(tuple(edits), (Goal("", goal.trigger, (), len(edits), spec(self)),), seed)


def _invent_word(seed: int, record_id: str, used: set[str]) -> str:
    """Draw an unused word; the draws depend on a record. Raises UserError if all are used."""
    for attempt in range(TRIES):
        u = draws(seed, [f"{record_id}|{attempt}"], 2 * SYLLABLES, "canary word")[0]
        letters = [
            kind[int(x * len(kind))]
            for x, kind in zip(u.tolist(), (CONSONANTS, VOWELS) * SYLLABLES, strict=True)
        ]
        if (word := "".join(letters)) not in used:
            return word
    raise UserError("no word could be invented that the captions do not hold")
