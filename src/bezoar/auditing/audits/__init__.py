"""Audits: is this encoder backdoored? The kind `audit`."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation.verdict import Verdict


class Audit(Protocol):
    """A measure of how suspicious an encoder is, from clean images.

    `needs` names what it is called with beside encoder, images and seed: `classifier` (Classifier)
    reads the encoder's vectors as classes, `parent` (Encoder) is what it was tuned from, and
    `report` (ProgressReport) is told how far the audit is. The encoder is left as it was. The
    verdict's `notes["limits"]` says what the audit cannot detect.
    """

    needs: ClassVar[tuple[str, ...]]

    def __call__(
        self, encoder: Encoder, clean: Pairs, seed: int, /, *args: Any, **offered: Any
    ) -> Verdict: ...
