"""Scores (one per record), Measure (a number with its n, its interval and its definition), and the way between them."""

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
from bezoar.errors import UserError
from bezoar.evaluation import stats

FEW = 5  # values that are all equal do not show how far they vary
DRAWN = 1 << 16  # records that are drawn for at a time


@dataclass(frozen=True)
class Scores:
    """How suspicious each record is: higher = more suspicious. No threshold, no NaN.

    ids: N keys, a tuple or a column (`indexed.Strings`). values: float32 (N,), finite. boxes: of a detector that says where,
    int64 (N, 4): top, left, height and width of a window in the image's pixels, -1 where there is none. notes: what the
    detector says of all of them, in words and numbers that JSON holds. raised: of a detector that decides, bool (N,): the
    records that show an attack which it found and tested.
    """

    ids: Sequence[str]
    values: Tensor
    boxes: Tensor | None = None
    notes: dict[str, Any] | None = None
    raised: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.ids),):
            raise ValueError(f"{len(self.ids)} ids but scores of shape {tuple(self.values.shape)}")
        if self.raised is not None and (
            self.raised.shape != self.values.shape or self.raised.dtype != torch.bool
        ):
            raise ValueError(f"raised must be bool {tuple(self.values.shape)}")
        if self.boxes is not None and self.boxes.shape != (len(self.ids), 4):
            raise ValueError(f"{len(self.ids)} ids but boxes of shape {tuple(self.boxes.shape)}")
        if not torch.isfinite(self.values).all():
            raise ValueError("scores must be finite")

    def __len__(self) -> int:
        return len(self.ids)

    def ranking(self) -> np.ndarray:
        """Rows int64 (N,), from the most suspicious to the least; ties in an order that is drawn and belongs to the records.

        Not in the order of their ids: added poisons are named after test images or clean ones, and a detector that says
        nothing would then find them by their names.
        """
        values = self.values.cpu().numpy()
        order = np.argsort(-values, kind="stable")
        level = values[order]
        same = np.concatenate([[False], level[1:] == level[:-1], [False]])
        tied = np.flatnonzero(same[1:] | same[:-1])
        rows = order[tied]
        if len(rows):
            parts = np.array_split(rows, len(rows) // DRAWN + 1)
            drawn = [
                draws(0, [self.ids[i] for i in part.tolist()], 1, "ties")[:, 0] for part in parts
            ]
            order[tied] = rows[np.lexsort((np.concatenate(drawn), -values[rows]))]
        return order.astype(np.int64)

    def values_of(self, ids: Sequence[str]) -> Tensor:
        """The values of the given records, in that order."""
        return self.select(ids).values

    def select(self, ids: Sequence[str]) -> Scores:
        """The scores of the given records, in that order. Raises KeyError for one that has none."""
        if ids is self.ids:
            return self
        rows = pc.index_in(_column(ids), _column(self.ids))
        if rows.null_count:
            raise KeyError(next(i for i in ids if i not in self.ids))
        at = torch.from_numpy(rows.to_numpy().astype(np.int64))
        boxes, raised = (None if x is None else x[at] for x in (self.boxes, self.raised))
        return Scores(ids, self.values[at], boxes, self.notes, raised)


@dataclass(frozen=True)
class Measure:
    """A reported number: its value, the number of trials n, a 95 % interval, and how it was computed.

    Of what is read from JSON (`Measure(**raw)`) the texts that `strict` wrote become numbers again.
    """

    value: float
    n: int
    low: float
    high: float
    how: str

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, float(getattr(self, name)))

    @classmethod
    def exact(cls, value: float, n: int, how: str) -> Measure:
        """A number that was counted or read off, without a sampling error: its interval is the number itself."""
        return cls(value, n, value, value, how)

    def json(self) -> dict:
        """As it stands in a manifest."""
        return encode_nonfinite(asdict(self))


def encode_nonfinite(raw: dict[str, Any]) -> dict[str, Any]:
    """The same, every number that is not finite as text: JSON has none, and `float` reads `Infinity`, `-Infinity`, `NaN`."""
    names = {math.inf: "Infinity", -math.inf: "-Infinity"}
    odd = {
        k: names.get(v, "NaN")
        for k, v in raw.items()
        if isinstance(v, float) and not math.isfinite(v)
    }
    return raw | odd


def proportion(successes: float, n: int, how: str) -> Measure:
    """A share of n trials, with Wilson's interval."""
    if n < 1:
        raise UserError(f"{how}: a share needs at least one trial")
    return _measure(float(successes) / n, n, stats.wilson_interval(float(successes), n), how)


def average(values: Sequence[float] | Tensor, how: str) -> Measure:
    """A mean of values, with Student's t interval; open where fewer than `FEW` values are all equal."""
    v = torch.as_tensor(values).double().cpu().numpy()
    if len(v) < 1:
        raise UserError(f"{how}: a mean needs at least one value")
    if len(v) < FEW and v.min() == v.max():
        return Measure(float(v[0]), len(v), -math.inf, math.inf, how)
    return _measure(float(v.mean()), len(v), stats.mean_interval(v), how)


def detection_measures(
    scores: Scores, truth: Sequence[bool] | Tensor | np.ndarray
) -> dict[str, Measure]:
    """How well scores (N) find the poisons, truth bool (N,) in the same order.

    Raises UserError unless there are both poisons and clean records.
    """
    s, t = scores.values.double().cpu().numpy(), torch.as_tensor(truth).cpu().numpy()
    poisons, clean = int(t.sum()), int((~t).sum())
    if not poisons or not clean:
        raise UserError(
            f"detection needs poisons and clean records; there are {poisons} of {len(t)}"
        )
    measures = {
        "auroc": _measure(
            stats.auroc(s, t),
            len(s),
            stats.auroc_interval(s, t),
            f"chance that one of {poisons} poisons outranks one of {clean} clean records; {stats.AUROC_INTERVAL}",
        ),
        "average_precision": _measure(
            stats.average_precision(s, t),
            len(s),
            stats.average_precision_interval(s, t),
            f"area under the precision-recall steps at a poison rate of {poisons / len(s):.2g}; "
            "stratified bootstrap, at least Wilson over the poisons",
        ),
        "fpr_at_95_tpr": _measure(
            stats.fpr_at_tpr(s, t),
            clean,
            stats.fpr_interval(s, t),
            "share of clean records flagged where 95 % of the poisons are; stratified bootstrap, at least Wilson",
        ),
    }
    for share in (0.001, 0.01, 0.1):
        budget = stats.budget(share, len(s))
        measures[f"recall_at_{share}"] = proportion(
            stats.expected_hits(s, t, budget),
            poisons,
            f"share of the poisons among the worst {budget} of {len(s)} records",
        )
    budget = min(len(s), math.ceil(1.5 * poisons))
    measures["recall_at_1.5n"] = proportion(
        stats.expected_hits(s, t, budget),
        poisons,
        f"share of the poisons among the worst {budget} records, 1.5 times their number",
    )
    measures["precision_at_n"] = proportion(
        stats.expected_hits(s, t, poisons),
        poisons,
        f"share of poisons among the worst {poisons} records, as many as poisons",
    )
    return measures


def _measure(value: float, n: int, interval: tuple[float, float], how: str) -> Measure:
    return Measure(value, n, interval[0], interval[1], how)


def _column(ids: Sequence[str]) -> pa.Array:
    """Ids as one Arrow column, which is sorted and searched without a Python object a record."""
    return ids.column if hasattr(ids, "column") else pa.array(list(ids), pa.large_string())


def separation(values: Sequence[float], others: Sequence[float]) -> Measure:
    """AUROC of values against others: 0.5 is a coin's."""
    s, truth = [*values, *others], [True] * len(values) + [False] * len(others)
    how = f"chance that one of {len(values)} attacked encoders outranks one of {len(others)} clean ones; {stats.AUROC_INTERVAL}"
    low, high = stats.auroc_interval(s, truth)
    return Measure(stats.auroc(s, truth), len(s), low, high, how)
