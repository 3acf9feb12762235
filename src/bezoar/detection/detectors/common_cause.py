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
4. Test. Those of the group that the discriminant gives away, mismatched or not, must be mismatched
   far more often than in the other groups (`shared_causes.believed_causes`).

Not seen: clean-label poisons, whose content supports their captions; fewer than about ten poisons of
a caption group; data whose contents a small model cannot read, such as few photographs.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bezoar import registry
from bezoar.data.pairs import load_pairs
from bezoar.data.randomness import draws, sample_rows
from bezoar.detection import shared_causes, tower_features, training_traces
from bezoar.detection.caption_groups import group_captions
from bezoar.detection.detectors import RecordEncoder, Records, require_texts
from bezoar.detection.shared_causes import Cause, Discriminants
from bezoar.errors import UserError
from bezoar.evaluation.heads import ProgressReport, no_report
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

MIN_RECORDS = 200  # of the data
RECORDS_OF_A_GROUP = 200  # at least, on average
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

    needs: ClassVar[tuple[str, ...]] = ("report",)

    def __post_init__(self) -> None:
        if not 2 <= self.groups <= 4096 or not 0 < self.suspects < 0.5:
            raise ValueError(
                f"needs groups in 2..4096 and suspects in (0, .5); got {self.groups}, {self.suspects}"
            )
        registry.make("network", self.network)
        if self.objective:
            registry.make("objective", self.objective)

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
        mismatch = self.measure_mismatch(source, encoder.device, report)[torch.as_tensor(order)]
        features = tower_features.read_features(encoder, source, order, report)
        count = max(2, min(self.groups, n // RECORDS_OF_A_GROUP))
        groups = group_captions(texts, order, count, self.seed, encoder.device)
        uniform = draws(self.seed, [embedded.ids[row] for row in order], 1, "half")[:, 0]
        discriminants = Discriminants.fit(
            features,
            groups.of_record[torch.as_tensor(order)],
            torch.from_numpy((uniform < 0.5).astype(np.int64)),
        )
        mismatched = mismatch > mismatch.quantile(1 - self.suspects)
        causes = shared_causes.find_causes(discriminants, mismatched)
        return self.combine(embedded.ids, order, mismatch, causes)

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

    def combine(self, ids: Any, order: np.ndarray, mismatch: Tensor, causes: list[Cause]) -> Scores:
        """The ranking. mismatch: (N,), in the given order, as are the rows of the causes."""
        n = len(order)
        values = mismatch.argsort(stable=True).argsort().float() / n
        raised = torch.zeros(n, dtype=torch.bool)
        believed = shared_causes.believed_causes(causes)
        for cause in believed:
            values[cause.rows] += 1 + cause.scores.clamp(0, 100)
            raised[cause.shown] = True
        back = torch.empty(n, dtype=torch.long)
        back[torch.as_tensor(order)] = torch.arange(n)
        notes = {
            "raised": int(raised.sum()),
            "causes": [describe_cause(cause) for cause in believed],
            "groups": len(causes),
        }
        return Scores(ids, values[back], None, notes, raised[back])


def short_training(records: int) -> str:
    """Spec of a training that sees EXPOSURES pairs, or all of them twice."""
    epochs = max(2, min(20, math.ceil(EXPOSURES / records)))
    return f"clip:epochs={epochs},batch={max(16, min(256, records // 10))}"


def describe_cause(cause: Cause) -> dict[str, Any]:
    """As it stands in a run's manifest."""
    return {
        "group": cause.group,
        "records": len(cause.rows),
        "shown": len(cause.shown),
        "recognised": round(cause.recognised, 3),
        "mismatched": round(cause.purity, 3),
    }
