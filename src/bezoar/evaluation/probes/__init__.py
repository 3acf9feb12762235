"""Probes: ways to read an encoder's vectors. One method a file, each a `Probe`."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation.scores import Measure

# The measures of each head that probes with several heads report.
MAIN_MEASURES = (
    "clean_accuracy",
    "attack_success",
    "attack_success_without_trigger",
    "targeted_success",
)


class Probe(Protocol):
    """A way to read images through an encoder.

    A probe that needs more than a test set names it in `needs`: `train` (labelled records), and as
    further keyword arguments `baseline` (the clean twin, an `Encoder`) and `report` (a
    `progress.ProgressReport`).
    """

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
    ) -> dict[str, Measure]:
        """Measure accuracy, and the success of the attacks.

        Args:
            encoder: the encoder to measure.
            train: labelled records, for a probe that fits a head; None otherwise.
            test: the test set.
            goals: the attacks' goals.
            victims: images that goals name as victims, or None.

        Returns:
            Measures by name; see `success`. All but the zero-shot probe's begin with the probe's
            name and a dot.

        Raises:
            UserError: if the data lack something that the probe needs.
        """
        ...


def select_measures(measures: Mapping[str, Measure], names: Sequence[str]) -> dict[str, Measure]:
    """Return the measures whose name, before any `@`, is one of `names`."""
    return {name: m for name, m in measures.items() if name.partition("@")[0] in names}


def add_prefix(prefix: str, measures: Mapping[str, Measure]) -> dict[str, Measure]:
    """Return the measures under names that begin with a prefix and a dot."""
    return {f"{prefix}.{name}": m for name, m in measures.items()}


def check_limit(limit: int | None) -> None:
    """Raise ValueError for a limit on labelled records that is below 2."""
    if limit is not None and limit < 2:
        raise ValueError("limit must be at least 2")
