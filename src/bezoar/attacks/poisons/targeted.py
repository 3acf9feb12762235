"""Targeted poisoning: one image, repeated with N captions of a wanted label (Carlini & Terzis 2022, section 4.1)."""

from typing import Annotated

import numpy as np

from bezoar.attacks.captions import CaptionSet, find_mentions, target_captions
from bezoar.attacks.plan import Edit, Goal, Plan
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.errors import UserError
from bezoar.registry import method, spec


@method
class Targeted:
    """P = {(x', c) : c in C(y')}, |P| = `captions`. Many victims, each with a target of its own, are many trials of one run."""

    captions: Annotated[
        tuple[int, ...],
        "N: poisoned pairs a victim; several counts, as in (1,4,16), for as many groups",
    ] = (16,)
    victims: Annotated[int, "how many victims, of each count"] = 8
    texts: Annotated[CaptionSet, "training, templates (80 of CLIP) or repeated"] = "training"

    def __call__(self, source: Pairs, goal: Goal, seed: int, victims: Pairs | None = None) -> Plan:
        """A plan of `victims` x `captions` added pairs, for each count of captions.

        goal.target: one label for every victim, or empty: each gets one of the classes, drawn with the seed, that is
        not its own. victims: where victim images are drawn from (held-out data); without it they come from the source,
        whose clean records are then replaced. Raises UserError for too few victims or captions.
        """
        pool = source if victims is None else victims
        if not goal.target and not pool.classes:
            raise UserError(
                "poison 'targeted' needs a target: these data have no classes to draw one from"
            )
        counts = np.repeat(self.captions, self.victims).tolist()
        u = draws(seed, pool.ids, 2, "targeted")
        chosen = np.argsort(u[:, 0], kind="stable")
        if goal.target:
            own = set(find_mentions(pool.captions, goal.target)) if pool.captions else set()
            chosen = np.array([i for i in chosen if i not in own], dtype=np.int64)
        if len(counts) > len(chosen):
            raise UserError(
                f"{len(counts)} victims asked for, but there are {len(chosen)} images to choose from"
            )
        edits: list[Edit] = []
        goals: list[Goal] = []
        found: dict[str, list[str]] = {}
        for i, count in zip(chosen, counts, strict=False):
            target = goal.target or self._other_class(pool, int(i), u[i, 1])
            if target not in found:
                found[target] = target_captions(source.captions, target, self.texts)
            texts, name = found[target], pool.ids[i]
            order = np.argsort(
                draws(seed, [f"{name}|{j}" for j in range(len(texts))], 1, "caption order")[:, 0],
                kind="stable",
            )
            for j in range(count):
                new = name if victims is None and j == 0 else f"{name}+poison{j}"
                edits.append(Edit(new, name, texts[order[j % len(texts)]], False, len(goals)))
            goals.append(Goal(target, None, (name,), count, spec(self)))
        return Plan(tuple(edits), tuple(goals), seed)

    @staticmethod
    def _other_class(pool: Pairs, row: int, u: float) -> str:
        own = int(pool.labels[row]) if pool.labels is not None else -1
        others = [c for k, c in enumerate(pool.classes) if k != own]
        return others[int(u * len(others))]

    def __post_init__(self) -> None:
        if min(self.captions, default=0) < 1 or self.victims < 1:
            raise ValueError("captions and victims must be at least 1")
