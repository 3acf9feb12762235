"""Detectors: which records of a data set are poisoned?

A detector scores every record; higher is more suspicious. It is called with the encoder under
suspicion and the records:

    detector = KDistance(k=8)                      # or registry.make("detector", "k_distance:k=8")
    scores = detector(encoder, records)            # scores.values float32 (N,)

No label, batch size or order of the records may change a score. `needs = ("report",)` asks for the
keyword argument `report`, which is called with (steps done, steps in all, what is being done). A
detector without it may say by `passes(n)` how many images it puts through the encoder for n
records, for the progress bar. `Scores.raised` marks the records of a trigger that a detector has
found and tested; in a scan by several detectors they come first. Such a detector sets the class
variable `decides`, so that a gate can know it before any work; and `reads_training` if it sees a
trigger only in an encoder that was trained on the scanned data. Its notes may hold `causes` or
`triggers`, a list; the ids that an entry has as `clearest` stand first on a scan's page.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import EmbeddedRecords
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.progress import ProgressReport, no_report

ROWS = 1 << 16  # vectors in memory at a time
CLEAREST = 20  # records that are named of each trigger, at most


class RecordEncoder(Protocol):
    """What detectors use of an `Encoder`, or of its stand-in where the data come as vectors."""

    @property
    def device(self) -> torch.device: ...
    @property
    def text(self) -> Any: ...
    def embed(self, source: Any) -> EmbeddedRecords: ...
    def encode_images(self, x: Tensor) -> Tensor: ...
    def encode_texts(self, captions: Sequence[str]) -> Tensor: ...


class Records(Protocol):
    """What detectors use of a data set: `Pairs`, `StoredPairs` or a `Corpus`."""

    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def captions(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def batches(self, size: int) -> Iterator[Pairs]: ...
    def take(self, rows: Sequence[int] | Tensor | np.ndarray) -> Pairs: ...


class Detector(Protocol):
    """Scores records by their vectors, images and captions."""

    def __call__(self, encoder: RecordEncoder, source: Records) -> Scores: ...


class ReportingDetector(Protocol):
    """A detector with `needs = ("report",)`, which reports its own progress."""

    def __call__(
        self, encoder: RecordEncoder, source: Records, report: ProgressReport = no_report
    ) -> Scores: ...


def require_texts(embedded: EmbeddedRecords, detector: str) -> Tensor:
    """The captions' vectors, (N, D). Raises UserError, which names the detector, without any."""
    if embedded.texts is None:
        raise UserError(
            f"detector {detector} needs captions; the scanned data or the encoder has none"
        )
    return embedded.texts


def caption_cosines(embedded: EmbeddedRecords, detector: str) -> Tensor:
    """The cosine of each image and its caption, float32 (N,) on the CPU; see `require_texts`."""
    texts = require_texts(embedded, detector)
    parts = zip(embedded.images.split(ROWS), texts.split(ROWS), strict=True)
    return torch.cat([(z * w.to(z.device)).sum(1).float().cpu() for z, w in parts])


def read_captions(source: Records) -> Sequence[str]:
    """All captions in the order of the records; those of a stream are read from its batches."""
    if hasattr(source, "captions"):
        return source.captions
    return [caption for batch in source.batches(1024) for caption in batch.captions]


def name_clearest(ids: Sequence[str], rows: Tensor, values: Tensor) -> list[str]:
    """The ids of the CLEAREST of some rows, int64 (M,), that have the largest values, (M,)."""
    largest = values.argsort(descending=True, stable=True)[:CLEAREST]
    return [ids[row] for row in rows[largest].tolist()]
