"""The small model that a scan trains on the suspect data where no encoder is given: its spec,
records and duration.

A trigger shows only in a model that was trained on it. The training is bounded: a number of pairs,
spread over the records, up to a number of passes that small sets need.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from bezoar.data.streams import RecordStream
from bezoar.errors import UserError
from bezoar.runs.estimates import pairs_per_second
from bezoar.runs.run import Run

MAX_PAIRS = 150_000  # drawn by the training, all epochs together, unless one pass takes more
MAX_EPOCHS = 40
MAX_RECORDS = 50_000  # that it is trained on
MIN_RECORDS = 32  # with fewer nothing is learnt
BATCH = 128
SIDE = 64  # pixels of the images, at most
MIN_SIDE = 32  # to which smaller ones are enlarged


@dataclass(frozen=True)
class SuspectTraining:
    """What is trained, as specs; on how many records; and how long that takes about, in minutes."""

    network: str
    objective: str
    records: int
    epochs: int
    minutes: float

    def describe(self) -> str:
        """Return what will be done, in a sentence."""
        return (
            f"no encoder is given: {self.network} is trained on {self.records:,} of these records "
            f"first, in {self.epochs} epoch{'s' * (self.epochs != 1)}, about "
            f"{max(1, round(self.minutes))} min here unless that was done before"
        )


def limit_data(method: Any) -> Any:
    """The data method with no more records, and no larger images, than are trained on.

    Images are not enlarged for the training either: that would cost time alone.
    """
    names = {field.name for field in dataclasses.fields(method)}
    changes: dict[str, Any] = {}
    if "limit" in names and (method.limit is None or method.limit > MAX_RECORDS):
        changes["limit"] = MAX_RECORDS
    if "size" in names and method.size is not None:
        source = method()
        usual = source.usual_side() if isinstance(source, RecordStream) else None
        changes["size"] = min(method.size, SIDE, max(MIN_SIDE, usual or SIDE))
    return dataclasses.replace(method, **changes)


def match_size(data: Any, suspects: Any) -> Any:
    """The scanned data at the size of the images that the model was trained on.

    Pixels that were enlarged and made smaller again are not those that it learnt.
    """
    size = getattr(suspects, "size", None)
    if isinstance(data, Run) or size is None or not isinstance(data(), RecordStream):
        return data
    return dataclasses.replace(data, size=size)


def plan_training(records: int, size: int, has_captions: bool) -> SuspectTraining:
    """Plan the training for so many records of `size` pixels. Raises UserError for too few."""
    if records < MIN_RECORDS:
        raise UserError(
            f"{records} records are too few to train a model on, which takes {MIN_RECORDS}; give "
            "--encoder"
        )
    epochs = max(1, min(MAX_EPOCHS, MAX_PAIRS // records))
    batch = min(BATCH, records // 4)
    network, objective = ("clip_small", "clip") if has_captions else ("tower", "simclr")
    seconds = epochs * records / pairs_per_second(size)
    spec = f"{objective}:epochs={epochs},batch={batch}"
    return SuspectTraining(network, spec, records, epochs, seconds / 60)
