"""Poisons: rules that choose which records are poisoned, and how."""

from typing import Protocol

from bezoar.attacks.plan import Goal, Plan
from bezoar.data.pairs import Pairs


class Poison(Protocol):
    """A rule that chooses the records to poison, by draws that depend on the record."""

    def __call__(self, source: Pairs, goal: Goal, seed: int, victims: Pairs | None = None) -> Plan:
        """Plan a poisoning of a data set; nothing is changed yet.

        Args:
            source: the data set to poison.
            goal: the target and the trigger.
            seed: seed of the choice of poisoned records.
            victims: images from outside the data set that targeted poisoning may add.

        Returns:
            A plan without content hashes and without triggers; see `Plan.with_hashes` and
            `Plan.stamps`.

        Raises:
            UserError: if the data set has too few records or captions for the attack.
        """
        ...
