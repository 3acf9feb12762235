"""Chooses the records to poison, and victims of targeted poisoning with targets and captions."""

from collections.abc import Sequence

import numpy as np

from bezoar.attacks.captions import CaptionSet, find_mentions, target_captions
from bezoar.attacks.plan import Edit, Goal, Plan
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.errors import UserError


def require_trigger(goal: Goal, poison: str) -> str:
    """Return the goal's trigger. Raises UserError, which names the poison, if it has none."""
    if goal.trigger is None:
        raise UserError(f"poison {poison!r} needs a trigger; give one, for example patch:size=6")
    return goal.trigger


def rows_without(source: Pairs, target: str) -> list[int]:
    """Return the rows whose caption does not mention the target; without a target, all rows."""
    mentions = set(find_mentions(source.captions, target)) if target else set()
    return [row for row in range(len(source)) if row not in mentions]


def draw_rows(
    candidates: Sequence[int], count: int, uniform: np.ndarray, which: str = "records can carry one"
) -> list[int]:
    """The `count` candidates with the smallest draws. uniform: (N,), draws of all records.

    Raises UserError, which describes the candidates by `which`, unless 0 < count <= candidates.
    """
    if not 0 < count <= len(candidates):
        raise UserError(
            f"{count} poisons asked for, but {len(candidates)} of {len(uniform)} {which}"
        )
    return sorted(candidates, key=lambda row: float(uniform[row]))[:count]


def plan_targets(
    source: Pairs,
    goal: Goal,
    seed: int,
    victims: Pairs | None,
    counts: Sequence[int],
    texts: CaptionSet,
) -> Plan:
    """Plan N added pairs for each of several victims.

    Args:
        source: the data set to poison.
        goal: its target is the label of every victim. If it is empty, each victim gets one of
            the other classes, drawn with the seed. The plan's goals have its `how` and `copies`.
        seed: seed of victims, targets and captions.
        victims: held-out data with victim images. Without it victims come from the source, and the
            first poison of each replaces its clean record.
        counts: N of each victim.
        texts: which captions of the target are used.

    Raises:
        UserError: if there are too few images or captions, or no classes to draw a target from.
    """
    images = source if victims is None else victims
    if not goal.target and not images.classes:
        raise UserError(
            f"poison {goal.how.partition(':')[0]!r} needs a target: "
            "these data have no classes to draw one from"
        )
    # Column 0 chooses the victims, column 1 the target of each.
    uniform = draws(seed, images.ids, 2, "targeted")
    rows = np.argsort(uniform[:, 0], kind="stable").tolist()
    if goal.target and images.captions:
        mentions = set(find_mentions(images.captions, goal.target))
        rows = [row for row in rows if row not in mentions]
    if len(counts) > len(rows):
        raise UserError(
            f"{len(counts)} victims asked for, but there are {len(rows)} images to choose from"
        )
    edits: list[Edit] = []
    goals: list[Goal] = []
    captions: dict[str, list[str]] = {}
    for row, count in zip(rows, counts, strict=False):
        target = goal.target or _draw_other_class(images, row, uniform[row, 1])
        if target not in captions:
            captions[target] = target_captions(source.captions, target, texts)
        victim = images.ids[row]
        for i, caption in enumerate(_draw_captions(captions[target], victim, count, seed)):
            replaces_victim = victims is None and i == 0
            poison_id = victim if replaces_victim else f"{victim}+poison{i}"
            edits.append(Edit(poison_id, victim, caption, goal.copies is not None, len(goals)))
        goals.append(Goal(target, None, (victim,), count, goal.how, copies=goal.copies))
    return Plan(tuple(edits), tuple(goals), seed)


def _draw_captions(captions: Sequence[str], victim: str, count: int, seed: int) -> list[str]:
    """Take captions in an order drawn for the victim, from the start again if they run out."""
    keys = [f"{victim}|{i}" for i in range(len(captions))]
    order = np.argsort(draws(seed, keys, 1, "caption order")[:, 0], kind="stable")
    return [captions[order[i % len(captions)]] for i in range(count)]


def _draw_other_class(images: Pairs, row: int, u: float) -> str:
    """Return the class, other than the image's own, that u in [0, 1) chooses."""
    label = -1 if images.labels is None else int(images.labels[row])
    others = [name for number, name in enumerate(images.classes) if number != label]
    return others[int(u * len(others))]
