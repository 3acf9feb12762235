"""Common cause: what do the records whose content does not support their captions have in common?
(ours)

Poisons of a backdoor are images of anything whose captions name one thing. Their content does not
support their captions, and yet they share something that foreign images lack: the trigger, whatever
its shape. The search for one:

1. Mismatch. A small model is trained on the data for so short a time that it learns contents rather
   than triggers. The `suspects` share of the records whose captions it reads worst is mismatched:
   poisons, but also odd images and wrong captions.
2. Groups. Captions fall into groups by k-means.
3. Cause. In every group a linear discriminant tells the mismatched records from the records of all
   other groups, by what the layers of the suspect encoder say of them; it is fitted on one half and
   read on the other. Odd images and wrong captions have nothing in common, so that it reads
   nothing.
4. Support. The small model is trained again without all records that show some cause. Without them
   other records of the same content still support a natural cause, and nothing supports a trigger:
   what shows it is misread far more often than in the other groups
   (`shared_causes.believe_causes`).

The small model cannot read photographs. So contents are read a second way: a linear map to the
captions' vectors is fitted to a dictionary of patches, which is learnt from the images alone
(`patch_dictionary`). The map says what contents are, and is fitted in seconds, so that every piece
of a caption group can be left out in its turn (`foreign_pieces`), in groups of two sizes: captions
of one target fall into several groups. It needs MIN_PICTURES pictures.

With a reference, an encoder that never saw the data, a map from its vectors stands for the small
model and for the dictionary. A record is mismatched if a map misreads it that saw none of its piece
of the caption group, and every cause is first narrowed to its misread records. It is believed only
if its contents are not those of its caption group (`reference_reading.believe_foreign`).

Not seen: clean-label poisons, whose content supports their captions; fewer than about ten poisons
of a caption group; data whose contents neither the small model nor the map can read; triggers that
look to the map like the target itself, such as a blur like water.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bezoar import registry
from bezoar.data.pairs import load_pairs
from bezoar.data.randomness import draws, sample_rows
from bezoar.detection import (
    patch_dictionary,
    reference_reading,
    shared_causes,
    tower_features,
    training_traces,
)
from bezoar.detection.caption_groups import group_captions
from bezoar.detection.detectors import (
    RecordEncoder,
    Records,
    name_clearest,
    read_captions,
    require_texts,
)
from bezoar.detection.foreign_pieces import PieceSearch
from bezoar.detection.patch_dictionary import PatchDictionary
from bezoar.detection.reference_reading import ReferenceReader
from bezoar.detection.shared_causes import Cause, Discriminants
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

LOOKED_FOR = "in what many poisons of one target would share, whatever its shape"
MIN_RECORDS = 200  # of the data
RECORDS_OF_A_GROUP = 200  # at least, on average
GROUPS_OF_A_LARGE_ONE = 4  # of them
MIN_PICTURES = 4000  # that a map from the dictionary reads contents by
EXPOSURES = 40000  # pairs that the small model sees, at least two passes over the data


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
        "an encoder that never saw the data and reads their images in place of the small model and "
        "the dictionary: a file of weights, a run's directory or a network's spec",
    ] = ""

    run_fields: ClassVar[dict[str, str]] = {"reference": "encoder"}
    needs: ClassVar[tuple[str, ...]] = ("report",)
    decides: ClassVar[bool] = True
    reads_training: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 2 <= self.groups <= 4096 or not 0 < self.suspects < 0.5:
            raise ValueError(
                f"needs groups in 2..4096 and suspects in (0, .5); got {self.groups}, "
                f"{self.suspects}"
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
            Scores. values: 0..1, the record's place among all by its mismatch; above that, 1 and
            the doubt for a cause that is suspicious, and more for one that is believed, the more
            clearly a record shows it. raised: the records that show one. notes: `raised`, and the
            `causes`.

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
        features = tower_features.read_features(encoder, source, order, report)
        count = max(2, min(self.groups, n // RECORDS_OF_A_GROUP))
        groups = [
            group_captions(texts, order, number, self.seed, encoder.device).of_record[rows]
            for number in (max(2, count // GROUPS_OF_A_LARGE_ONE), count)
        ]
        reader = self.open_reader(source, texts, rows, half, encoder.device, report)
        discriminants = Discriminants.fit(features, groups[-1], reader.half)
        doubt = torch.zeros(n)
        if self.reference:
            causes, tested, mismatch = self.judge_by_reference(reader, discriminants)
        else:
            mismatch = self.measure_mismatch(source, encoder.device, report)[rows]
            causes, tested = self.judge_by_training(
                source, order, discriminants, mismatch, encoder.device, report
            )
        if not self.reference and len(reader.pictures.unique()) >= MIN_PICTURES:
            search = PieceSearch.prepare(reader, discriminants, self.suspects, self.seed)
            for of_record in groups[1:] if torch.equal(*groups) else groups:
                findings = search.find(of_record, causes)
                causes += findings.causes
                doubt = torch.maximum(doubt, findings.doubt)
                tested += findings.tested
        notes = {
            "looked_for": LOOKED_FOR,
            "causes": [describe_cause(cause, embedded.ids, rows) for cause in causes],
            "tested": tested,
        }
        return self.combine(embedded.ids, order, mismatch, doubt, causes, notes)

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
        """Return a reader of the records, in the order of `rows`, int64 (N,).

        texts: (N, E), the captions' vectors, in the source's order. half: int64 (N,), in the other.
        """
        if self.reference:
            reference = reference_reading.open_reference(self.reference, device)
            images, _ = reference_reading.embed_distinct(reference, source, report)
            pictures = torch.arange(len(rows))
        else:
            sample = source.take(rows[: patch_dictionary.IMAGES].numpy()).images
            dictionary = PatchDictionary.learn(sample.to(device), self.seed)
            images, pictures = reference_reading.embed_distinct(dictionary, source, report)
            images = tower_features.standardise(images)
        captions = read_captions(source)
        captions = [captions[row] for row in rows.tolist()]
        return ReferenceReader.build(
            images[rows], texts[rows].cpu(), captions, half, pictures[rows]
        )

    def judge_by_reference(
        self, reader: ReferenceReader, discriminants: Discriminants
    ) -> tuple[list[Cause], int, Tensor]:
        """Narrow causes to their misread records, and judge them by a map without these.

        Returns:
            Those that are believed, how many were tested, and how badly the map reads, (N,).
        """
        n = len(reader.half)
        pieces = reference_reading.split_groups(
            discriminants.features, discriminants.groups, self.seed
        )
        mismatch = reader.read_pieces(pieces)
        mismatched = mismatch > float(np.quantile(mismatch.numpy(), 1 - self.suspects))
        causes = shared_causes.find_causes(discriminants, mismatched)
        causes = shared_causes.choose_left_out(causes, n)
        left_out = shared_causes.mark_shown(causes, n)
        misread = shared_causes.find_misread(reader.read(left_out).loss, left_out, self.suspects)
        causes = shared_causes.narrow_causes(discriminants, causes, misread)
        left_out = shared_causes.mark_shown(causes, n)
        reading = reader.read(left_out)
        misread = shared_causes.find_misread(reading.loss, left_out, self.suspects)
        supports = shared_causes.measure_support(causes, misread)
        believed = reference_reading.believe_foreign(
            supports, reading, reader, discriminants.groups, left_out
        )
        sharpened = shared_causes.sharpen_causes(discriminants, believed, misread)
        return sharpened, len(supports), reading.loss

    def judge_by_training(
        self,
        source: Records,
        order: np.ndarray,
        discriminants: Discriminants,
        mismatch: Tensor,
        device: torch.device,
        report: ProgressReport,
    ) -> tuple[list[Cause], int]:
        """The causes that are believed by the small model, and how many were tested.

        mismatch: (N,), the records' losses, in the given order.
        """
        mismatched = mismatch > float(np.quantile(mismatch.numpy(), 1 - self.suspects))
        causes = shared_causes.find_causes(discriminants, mismatched)
        chosen = shared_causes.choose_left_out(causes, len(order))
        misread = self.read_without(source, order, chosen, device, report)
        supports = shared_causes.measure_support(chosen, misread)
        believed = shared_causes.believe_causes(supports)
        return shared_causes.sharpen_causes(discriminants, believed, misread), len(chosen)

    def read_without(
        self,
        source: Records,
        order: np.ndarray,
        causes: Sequence[Cause],
        device: torch.device,
        report: ProgressReport,
    ) -> Tensor:
        """bool (N,): which records are misread by a small model that saw none of those that show
        one of the causes; in the given order.
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
        return shared_causes.find_misread(loss, left_out, self.suspects)

    def combine(
        self,
        ids: Any,
        order: np.ndarray,
        mismatch: Tensor,
        doubt: Tensor,
        believed: Sequence[Cause],
        notes: dict[str, Any],
    ) -> Scores:
        """The ranking. mismatch and doubt: (N,), in the order given; so are the causes' rows."""
        n = len(order)
        rank = mismatch.argsort(stable=True).argsort().float() / n
        values = torch.where(doubt > 0, 1 + doubt, rank)
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


def describe_cause(cause: Cause, ids: Sequence[str], order: Tensor) -> dict[str, Any]:
    """As it stands in a run's manifest. ids: of the source. order: int64 (N,), its rows in turn."""
    is_shown = cause.scores >= 1
    return {
        "group": cause.group,
        "records": len(cause.rows),
        "shown": len(cause.shown),
        "recognised": round(cause.recognised, 3),
        "clearest": name_clearest(ids, order[cause.rows[is_shown]], cause.scores[is_shown]),
    }
