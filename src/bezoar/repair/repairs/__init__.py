"""Repairs: an encoder without its backdoor, by clean data alone. The kind `repair`."""

from typing import Any, ClassVar, Protocol

from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder


class Repair(Protocol):
    """Makes a copy of an encoder and removes a backdoor from it.

    `needs` names its arguments beside encoder, clean records and seed. `validation` (Pairs) are
    clean records for choosing learning rates, `inversions` (Sequence[Inversion]) are triggers that
    an audit inverted, `report` (ProgressReport) is called with the progress, and `log` (dict)
    receives facts about the repair, as JSON. No repair is told the attack. The encoder is not
    changed; the copy's `about["repaired"]` gains the repair's spec.
    """

    needs: ClassVar[tuple[str, ...]]

    def __call__(
        self, encoder: Encoder, clean: Pairs, seed: int, /, *args: Any, **offered: Any
    ) -> Encoder: ...
