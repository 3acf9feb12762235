"""Common cause: what do the records whose content does not support their captions have in common? (ours)

Poisons of a backdoor are images of anything whose captions name one thing. Their content does not
support their captions, and yet they share something that foreign images lack: the trigger, whatever
its shape. The search for one:

1. Mismatch. A small model is trained on the data for so short a time that it learns contents rather
   than triggers. The `suspects` share of the records whose captions it reads worst is mismatched:
   poisons, but also odd images and wrong captions.
2. Groups. Captions fall into groups by k-means.
3. Cause. In every group a linear discriminant tells the mismatched records from the records of all
   other groups, by what the layers of the suspect encoder say of them; it is fitted on one half and
   read on the other. Odd images and wrong captions have nothing in common, so that it reads nothing.
4. Support. The small model is trained again without all records that show some cause. Without them
   other records of the same content still support a natural cause, and nothing supports a trigger:
   what shows it is misread far more often than in the other groups
   (`shared_causes.believe_causes`).

With a reference, an encoder that never saw the data, a linear map of its vectors to the captions'
stands for the small model, which reads photographs too. It is fitted in seconds, so that a record is
mismatched if a map misreads it that saw none of its piece of the caption group, and every cause is
first narrowed to its misread records. The map says what contents are: a cause is believed only if
they are not those of its caption group (`reference_reading.bound_content`).

Not seen: clean-label poisons, whose content supports their captions; fewer than about ten poisons of
a caption group; data whose contents the small model or the reference cannot read, such as
photographs without a reference; triggers that look to the reference like the target itself, such as
a blur like water.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bezoar import registry
from bezoar.data.pairs import load_pairs
from bezoar.data.randomness import draws, sample_rows
from bezoar.detection import reference_reading, shared_causes, tower_features, training_traces
from bezoar.detection.caption_groups import group_captions
from bezoar.detection.detectors import RecordEncoder, Records, read_captions, require_texts
from bezoar.detection.reference_reading import ReferenceReader
from bezoar.detection.shared_causes import Cause, Discriminants, Support
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

LOOKED_FOR = "in what many poisons of one target would share, whatever its shape"
MIN_RECORDS = 200  # of the data
RECORDS_OF_A_GROUP = 200  # at least, on average
EXPOSURES = 40000  # pairs that the small model sees, at least two passes over the data


@dataclass(frozen=True)
class Judgement:
    """What became of causes. supports: of those tested. believed: of these. misread: bool (N,), by a
    judge that saw none of the records that show a cause. loss: float32 (N,), by which all are ranked.
    """

    supports: list[Support]
    believed: list[Support]
    misread: Tensor
    loss: Tensor


@method
class CommonCause:
    """Score = how badly a small model reads the caption; above that, how clearly a record shows a
    cause that was believed.
    """

    groups: Annotated[int, "groups of like captions at most; one for 200 records"] = 64
    suspects: Annotated[float, "share of the records that count as mismatched"] = 0.15
    network: Annotated[str, "spec of the small model"] = "clip_small:width=8"
    objective: Annotated[str, "spec of its training; empty: as long as the data need"] = ""
    seed: Annotated[int, "seed of the groups, the halves and the training"] = 0
    reference: Annotated[
        str,
        "an encoder that never saw the data and reads their images in place of the small model: a "
        "file of weights, a run's directory or a network's spec",
    ] = ""

    needs: ClassVar[tuple[str, ...]] = ("report",)
    decides: ClassVar[bool] = True
    reads_training: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 2 <= self.groups <= 4096 or not 0 < self.suspects < 0.5:
            raise ValueError(
                f"needs groups in 2..4096 and suspects in (0, .5); got {self.groups}, {self.suspects}"
            )
        registry.make("network", self.network)
        if self.objective:
            registry.make("objective", self.objective)

    def files(self) -> list[Path]:
        """Return what the scores depend on besides the fields: the weights of the reference."""
        return reference_reading.reference_files(self.reference)

    @torch.inference_mode()
    def __call__(
        self, encoder: RecordEncoder, source: Records, report: ProgressReport = no_report
    ) -> Scores:
        """Score every record.

        Returns:
            Scores. values: 0..1, the record's place among all by its mismatch; a record of a group
            with a believed cause lies above, the more clearly it shows it. raised: the records that
            show one. notes: `raised`, and the `causes`.

        Raises:
            UserError: Without captions, or with too few records.
        """
        source = source if hasattr(source, "take") else load_pairs(source)
        embedded = encoder.embed(source)
        texts = require_texts(embedded, "'common_cause'")
        n = len(embedded.ids)
        if n < MIN_RECORDS:
            raise UserError(f"detector 'common_cause' needs {MIN_RECORDS} pairs; there are {n}")
        # Everything is computed in an order that belongs to the records.
        order = sample_rows(embedded.ids, n, self.seed)
        rows = torch.as_tensor(order)
        uniform = draws(self.seed, [embedded.ids[row] for row in order], 1, "half")[:, 0]
        half = torch.from_numpy((uniform < 0.5).astype(np.int64))
        reader: ReferenceReader | None = None
        if self.reference:
            reader = self.open_reader(source, texts, rows, half, encoder.device, report)
        else:
            mismatch = self.measure_mismatch(source, encoder.device, report)[rows]
        features = tower_features.read_features(encoder, source, order, report)
        count = max(2, min(self.groups, n // RECORDS_OF_A_GROUP))
        groups = group_captions(texts, order, count, self.seed, encoder.device)
        discriminants = Discriminants.fit(features, groups.of_record[rows], half)
        if reader is not None:
            pieces = reference_reading.split_groups(features, discriminants.groups, self.seed)
            mismatch = reader.read_pieces(pieces)
        mismatched = mismatch > float(np.quantile(mismatch.numpy(), 1 - self.suspects))
        causes = shared_causes.find_causes(discriminants, mismatched)
        chosen = shared_causes.choose_left_out(causes, n)
        if reader is None:
            misread = self.read_without(source, order, chosen, encoder.device, report)
            supports = shared_causes.measure_support(chosen, misread)
            believed = shared_causes.believe_causes(supports)
            judged = Judgement(supports, believed, misread, mismatch)
        else:
            judged = self.judge_by_reference(reader, discriminants, chosen)
        sharpened = shared_causes.sharpen_causes(discriminants, judged.believed, judged.misread)
        notes = {
            "looked_for": LOOKED_FOR,
            "causes": [describe_support(support) for support in judged.believed],
            "tested": len(judged.supports),
        }
        return self.combine(embedded.ids, order, judged.loss, sharpened, notes)

    def measure_mismatch(
        self, source: Records, device: torch.device, report: ProgressReport
    ) -> Tensor:
        """float32 (N,): the loss of each record under the small model, in the source's order."""
        objective = self.objective or short_training(len(source))
        with torch.inference_mode(False), torch.enable_grad():
            trace = training_traces.trace(
                source, self.network, objective, self.seed, device, report=report
            )
        return trace.loss[-1]

    def open_reader(
        self,
        source: Records,
        texts: Tensor,
        rows: Tensor,
        half: Tensor,
        device: torch.device,
        report: ProgressReport,
    ) -> ReferenceReader:
        """Return what the reference sees of the records, in the order of `rows`, int64 (N,).

        texts: (N, E), the captions' vectors, in the source's order. half: int64 (N,), in the other.
        """
        reference = reference_reading.open_reference(self.reference, device)
        images = reference_reading.embed_distinct(reference, source, report)
        captions = read_captions(source)
        captions = [captions[row] for row in rows.tolist()]
        return ReferenceReader.build(images[rows], texts[rows].cpu(), captions, half)

    def judge_by_reference(
        self, reader: ReferenceReader, discriminants: Discriminants, causes: Sequence[Cause]
    ) -> Judgement:
        """Narrow the causes to their misread records, and judge them by a map without these."""
        n = len(reader.half)
        left_out = shared_causes.mark_shown(causes, n)
        misread = self.find_misread(reader.read(left_out).loss, left_out)
        narrowed = shared_causes.narrow_causes(discriminants, causes, misread)
        left_out = shared_causes.mark_shown(narrowed, n)
        reading = reader.read(left_out)
        misread = self.find_misread(reading.loss, left_out)
        supports = shared_causes.measure_support(narrowed, misread)
        believed = reference_reading.believe_foreign(
            supports, reading, reader, discriminants.groups, left_out
        )
        return Judgement(supports, believed, misread, reading.loss)

    def find_misread(self, loss: Tensor, left_out: Tensor) -> Tensor:
        """bool (N,), the records whose loss is above most of those that are not left out."""
        return loss > float(np.quantile(loss[~left_out].numpy(), 1 - self.suspects))

    def read_without(
        self,
        source: Records,
        order: np.ndarray,
        causes: Sequence[Cause],
        device: torch.device,
        report: ProgressReport,
    ) -> Tensor:
        """bool (N,): which records are misread by a small model that saw none of those that show one
        of the causes; in the given order.
        """
        left_out = shared_causes.mark_shown(causes, len(order))
        if not left_out.any():
            return left_out
        rows = torch.as_tensor(order)
        of_source = torch.zeros_like(left_out).index_put((rows,), left_out)
        objective = self.objective or short_training(len(order))
        with torch.inference_mode(False), torch.enable_grad():
            loss = training_traces.read_without(
                source, of_source, self.network, objective, self.seed, device, report
            )[rows]
        return self.find_misread(loss, left_out)

    def combine(
        self,
        ids: Any,
        order: np.ndarray,
        mismatch: Tensor,
        believed: Sequence[Cause],
        notes: dict[str, Any],
    ) -> Scores:
        """The ranking. mismatch: (N,), in the given order, as are the rows of the causes."""
        n = len(order)
        rank = mismatch.argsort(stable=True).argsort().float() / n
        values = rank.clone()
        raised = torch.zeros(n, dtype=torch.bool)
        for cause in believed:
            evidence = 1 + rank[cause.rows] + cause.scores.clamp(0, 100)
            values[cause.rows] = torch.maximum(values[cause.rows], evidence)
            raised[cause.shown] = True
        back = torch.empty(n, dtype=torch.long)
        back[torch.as_tensor(order)] = torch.arange(n)
        notes = {"raised": int(raised.sum())} | notes
        return Scores(ids, values[back], None, notes, raised[back])


def short_training(records: int) -> str:
    """Spec of a training that sees EXPOSURES pairs, or all of them twice."""
    epochs = max(2, min(20, math.ceil(EXPOSURES / records)))
    return f"clip:epochs={epochs},batch={max(16, min(256, records // 10))}"


def describe_support(support: Support) -> dict[str, Any]:
    """As it stands in a run's manifest."""
    return {
        "group": support.cause.group,
        "records": len(support.cause.rows),
        "shown": len(support.cause.shown),
        "recognised": round(support.cause.recognised, 3),
        "unsupported": round(support.unsupported, 3),
    }
