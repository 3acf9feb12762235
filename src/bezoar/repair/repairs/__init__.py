"""Repairs: an encoder without its backdoor, by clean data alone. The kind `repair`."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder


class Repair(Protocol):
    """Makes a copy of an encoder from which a backdoor is to be gone.

    `needs` names what it is called with beside encoder, clean records and seed: `validation`
    (Pairs) are clean records that learning rates are chosen by, `inversions` (Sequence[Inversion])
    are the triggers that an audit inverted, `report` (ProgressReport) is told how far the repair
    is, and `log` (dict) takes what it says of itself, as JSON. No repair is told the attack. The
    encoder is left as it was; the copy's `about["repaired"]` gains the repair's spec.
    """

    needs: ClassVar[tuple[str, ...]]

    def __call__(
        self, encoder: Encoder, clean: Pairs, seed: int, /, *args: Any, **offered: Any
    ) -> Encoder: ...
