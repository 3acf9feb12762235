"""The records of a corpus in the order of suspicion, and which of them a keep-list leaves out."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bezoar.detection import merging
from bezoar.detection.corpus import keep_lists
from bezoar.evaluation.scores import Scores

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Ranking:
    """A finished ranking of N records."""

    merged: Scores  # one score a record, of all detectors together
    by_detector: Mapping[str, Scores]  # the scores of each detector, by name
    order: Rows  # int64 (N,), all rows, the most suspicious first
    removed: Rows  # rows that leave by their rank: the first of `order`
    surplus: Rows  # rows of further copies of one picture that leave too, ascending

    @property
    def kept(self) -> Rows:
        """The rows that stay, ascending."""
        return np.setdiff1d(self.order[len(self.removed) :], self.surplus)

    @property
    def leaving(self) -> Rows:
        """The rows that leave, those that leave by their rank first."""
        return np.concatenate([self.removed, self.surplus])

    def windows(self, rows: Rows) -> tuple[list[str], Tensor]:
        """The windows in which detectors place a trigger; of several detectors, the first that
        names one.

        Returns:
            The ids of those of the rows that have a window, and the windows, int64 (M, 4).
        """
        boxes = torch.full((len(rows), 4), -1)
        for scores in self.by_detector.values():
            if scores.boxes is not None:
                is_set = boxes[:, 2:3] > 0
                boxes = torch.where(is_set, boxes, scores.boxes.cpu()[torch.from_numpy(rows)])
        with_window = (boxes[:, 2] > 0).nonzero()[:, 0].tolist()
        return [self.merged.ids[rows[i]] for i in with_window], boxes[with_window]


def rank_records(
    merged: Scores, by_detector: Mapping[str, Scores], share: float, copies: int
) -> Ranking:
    """Order the records and choose those that leave.

    Args:
        merged: the merged scores of N records.
        by_detector: the scores of each detector for the same records.
        share: of the records that leave, the worst first; all that are raised leave anyway.
        copies: records that stay of one picture with diverging captions, the least suspicious; 0
            for any number.
    """
    raising = raising_detectors(by_detector, copies)
    raised = merging.raised_rows([by_detector[name] for name in raising], len(merged))
    order = merging.order_records(merged, raised)
    count = max(round(share * len(order)), int(raised.sum()))
    surplus = order[:0]
    if copies:
        least_suspicious_first = order[count:][::-1]
        surplus = keep_lists.find_surplus(by_detector.values(), least_suspicious_first, copies)
    return Ranking(merged, by_detector, order, order[:count], surplus)


def raising_detectors(by_detector: Mapping[str, Scores], copies: int) -> list[str]:
    """The detectors whose raised records leave: all but those of copies, some of which stay."""
    return [name for name, s in by_detector.items() if s.groups is None or not copies]
