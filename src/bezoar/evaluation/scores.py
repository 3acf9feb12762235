"""Scores, one per record, and Measure, a number with its n, interval and definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from bezoar.data.randomness import draws
from bezoar.data.strings import Strings
from bezoar.errors import UserError
from bezoar.evaluation import stats

FEW = 5  # fewer values than this, all equal, do not show how far they vary
DRAWN = 1 << 16  # records whose ties are drawn at a time
BUDGETS = (0.001, 0.01, 0.1)  # shares of the records at which recall is reported


@dataclass(frozen=True)
class Scores:
    """How suspicious each record is: higher is more suspicious. There is no threshold."""

    ids: Sequence[str]  # N record ids, a tuple or a column (`data.strings.Strings`)
    values: Tensor  # float32 (N,), finite
    # by a detector that locates a trigger, int64 (N, 4): top, left, height and width of a window in
    # the image's pixels, -1 without one
    boxes: Tensor | None = None
    notes: dict[str, Any] | None = None  # the detector's facts about all records, as JSON
    # by a detector that decides, bool (N,): the records of an attack that it detected and tested
    raised: Tensor | None = None
    # by a detector of copies, int64 (N,): records with the same number are copies of one picture
    # with diverging captions; -1 for all others
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.ids)
        if self.values.shape != (n,):
            raise ValueError(f"{n} ids but scores of shape {tuple(self.values.shape)}")
        if self.raised is not None and (
            self.raised.shape != self.values.shape or self.raised.dtype != torch.bool
        ):
            raise ValueError(f"raised must be bool {tuple(self.values.shape)}")
        if self.groups is not None and self.groups.shape != (n,):
            raise ValueError(f"{n} ids but groups of shape {tuple(self.groups.shape)}")
        if self.boxes is not None and self.boxes.shape != (n, 4):
            raise ValueError(f"{n} ids but boxes of shape {tuple(self.boxes.shape)}")
        if not torch.isfinite(self.values).all():
            raise ValueError("scores must be finite")

    def __len__(self) -> int:
        return len(self.ids)

    def ranking(self) -> np.ndarray:
        """Return all rows, int64 (N,), the most suspicious first.

        Ties are broken by a draw that depends on the record, not by its id: added poisons are named
        after other images, so a detector without any information would find them by their names.
        """
        values = self.values.cpu().numpy()
        order = np.argsort(-values, kind="stable")
        ordered = values[order]
        equals_previous = np.concatenate([[False], ordered[1:] == ordered[:-1], [False]])
        tied = np.flatnonzero(equals_previous[1:] | equals_previous[:-1])
        rows = order[tied]
        if len(rows):
            parts = np.array_split(rows, len(rows) // DRAWN + 1)
            uniform = [
                draws(0, [self.ids[row] for row in part.tolist()], 1, "ties")[:, 0]
                for part in parts
            ]
            order[tied] = rows[np.lexsort((np.concatenate(uniform), -values[rows]))]
        return order.astype(np.int64)

    def select(self, ids: Sequence[str]) -> Scores:
        """The scores of these records, in that order. Raises KeyError if a record has none."""
        if ids is self.ids:
            return self
        index = pc.index_in(_id_column(ids), _id_column(self.ids))
        if index.null_count:
            raise KeyError(next(i for i in ids if i not in self.ids))
        rows = torch.from_numpy(index.to_numpy().astype(np.int64))
        boxes = None if self.boxes is None else self.boxes[rows]
        raised = None if self.raised is None else self.raised[rows]
        groups = None if self.groups is None else self.groups[rows]
        return Scores(ids, self.values[rows], boxes, self.notes, raised, groups)


@dataclass(frozen=True)
class Measure:
    """A reported number."""

    value: float  # the number. Texts that `encode_nonfinite` wrote become numbers again
    n: int  # number of trials or values behind it
    low: float  # lower end of its 95 % interval
    high: float  # upper end
    how: str  # its definition, in words

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, float(getattr(self, name)))

    @classmethod
    def exact(cls, value: float, n: int, how: str) -> Measure:
        """Return a number that was counted or read off: its interval is the number itself."""
        return cls(value, n, value, value, how)

    def json(self) -> dict[str, Any]:
        """Return the measure for a manifest; `Measure(**raw)` reads it again."""
        return encode_nonfinite(asdict(self))


def encode_nonfinite(raw: dict[str, Any]) -> dict[str, Any]:
    """Write infinities and NaN as texts that JSON can hold and `float` reads."""
    names = {math.inf: "Infinity", -math.inf: "-Infinity"}
    texts = {
        key: names.get(value, "NaN")
        for key, value in raw.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    return raw | texts


def proportion(successes: float, n: int, how: str) -> Measure:
    """Return a share of n trials with Wilson's interval. Raises UserError if n is 0."""
    if n < 1:
        raise UserError(f"{how}: a share needs at least one trial")
    low, high = stats.wilson_interval(float(successes), n)
    return Measure(float(successes) / n, n, low, high, how)


def average(values: Sequence[float] | Tensor, how: str) -> Measure:
    """Return a mean with Student's t interval; it is open if fewer than `FEW` values are all equal.

    Raises UserError if there is no value.
    """
    v = torch.as_tensor(values).double().cpu().numpy()
    if len(v) < 1:
        raise UserError(f"{how}: a mean needs at least one value")
    if len(v) < FEW and v.min() == v.max():
        return Measure(float(v[0]), len(v), -math.inf, math.inf, how)
    low, high = stats.mean_interval(v)
    return Measure(float(v.mean()), len(v), low, high, how)


def detection_measures(
    scores: Scores, truth: Sequence[bool] | Tensor | np.ndarray
) -> dict[str, Measure]:
    """Measure how well scores detect the poisons.

    Args:
        scores: of N records.
        truth: bool (N,), which of them are poisons.

    Returns:
        AUROC, average precision, FPR at 95 % TPR, recall at several budgets, and precision at as
        many records as there are poisons.

    Raises:
        UserError: unless there are both poisons and clean records.
    """
    s = scores.values.double().cpu().numpy()
    is_poison = torch.as_tensor(truth).cpu().numpy()
    n, poisons, clean = len(s), int(is_poison.sum()), int((~is_poison).sum())
    if not poisons or not clean:
        raise UserError(f"detection needs poisons and clean records; there are {poisons} of {n}")
    measures = {
        "auroc": Measure(
            stats.auroc(s, is_poison),
            n,
            *stats.auroc_interval(s, is_poison),
            f"chance that one of {poisons} poisons outranks one of {clean} clean records; "
            f"{stats.AUROC_INTERVAL}",
        ),
        "average_precision": Measure(
            stats.average_precision(s, is_poison),
            n,
            *stats.average_precision_interval(s, is_poison),
            f"area under the precision-recall steps at a poison rate of {poisons / n:.2g}; "
            "stratified bootstrap, at least Wilson over the poisons",
        ),
        "fpr_at_95_tpr": Measure(
            stats.fpr_at_tpr(s, is_poison),
            clean,
            *stats.fpr_interval(s, is_poison),
            "share of clean records flagged where 95 % of the poisons are; stratified bootstrap, "
            "at least Wilson",
        ),
    }
    return measures | _measure_cuts(s, is_poison)


def _measure_cuts(scores: np.ndarray, is_poison: np.ndarray) -> dict[str, Measure]:
    """Measure recall at several budgets, and precision at as many records as there are poisons."""
    n, poisons = len(scores), int(is_poison.sum())
    measures = {}
    for share in BUDGETS:
        budget = stats.budget(share, n)
        hits = stats.expected_hits(scores, is_poison, budget)
        how = f"share of the poisons among the worst {budget} of {n} records"
        measures[f"recall_at_{share}"] = proportion(hits, poisons, how)
    budget = min(n, math.ceil(1.5 * poisons))
    hits = stats.expected_hits(scores, is_poison, budget)
    how = f"share of the poisons among the worst {budget} records, 1.5 times their number"
    measures["recall_at_1.5n"] = proportion(hits, poisons, how)
    hits = stats.expected_hits(scores, is_poison, poisons)
    how = f"share of poisons among the worst {poisons} records, as many as poisons"
    measures["precision_at_n"] = proportion(hits, poisons, how)
    return measures


def separation(values: Sequence[float], others: Sequence[float]) -> Measure:
    """Return the AUROC of attacked encoders' values against those of clean ones; chance is 0.5."""
    s = [*values, *others]
    truth = [True] * len(values) + [False] * len(others)
    how = (
        f"chance that one of {len(values)} attacked encoders outranks one of {len(others)} clean "
        f"ones; {stats.AUROC_INTERVAL}"
    )
    low, high = stats.auroc_interval(s, truth)
    return Measure(stats.auroc(s, truth), len(s), low, high, how)


def _id_column(ids: Sequence[str]) -> pa.Array:
    """Return ids as an Arrow column, which is searched without a Python object a record."""
    return Strings.from_texts(ids).column
