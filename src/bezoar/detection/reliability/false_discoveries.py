"""False discoveries: how many of the worst n records of a ranking are expected to be clean, by a
sample of clean records.

The sample holds records that are known to be clean, drawn at random from the same source. The share
of it that scores as high as the worst n, with its Clopper-Pearson interval, needs no model of the
scores. All other records are taken for clean, so the number is an upper bound, as a false-discovery
rate by conformal p-values is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from bezoar.data.files.paths import existing_file, read_regular_text
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, Scores

SHARES = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05)  # of the records, that are reported
MIN_SAMPLE = 20  # clean records
LIST_BYTES = 256 << 20  # of a file of ids
LEVEL = 0.95
ASSUMPTION = "Assumes that the reference is a random sample of records like the clean ones here."


@dataclass(frozen=True)
class CleanEstimate:
    """Of the worst n[i] records, counts[i] are expected to be clean."""

    n: tuple[int, ...] = ()
    counts: tuple[Measure, ...] = ()
    why: str = ""  # if none, the reason


def reported_counts(total: int, more: Sequence[int] = ()) -> tuple[int, ...]:
    """The n that are reported for so many records, ascending. more: others, if small enough."""
    largest = 0.05 * total
    counts = {max(1, round(share * total)) for share in SHARES}
    return tuple(sorted(counts | {n for n in more if 0 < n <= largest}))


def estimate_from_file(merged: Scores, trusted: str, more: Sequence[int] = ()) -> CleanEstimate:
    """Estimate by the records whose ids a file holds, one a line.

    Raises:
        UserError: When the file cannot be read or names none of the scanned records.
    """
    content = read_regular_text(existing_file(trusted, "list of clean records"), LIST_BYTES)
    clean_ids = {line.strip() for line in content.split("\n")}
    clean = np.fromiter((key in clean_ids for key in merged.ids), bool, len(merged))
    if not clean.any():
        raise UserError(f"{trusted} names none of the {len(merged)} records that were scanned")
    values = merged.values.double().cpu().numpy()
    return estimate_clean(values, clean, reported_counts(int((~clean).sum()), more))


def estimate_clean(
    values: NDArray[np.float64], clean: NDArray[np.bool_], ns: Sequence[int]
) -> CleanEstimate:
    """How many of the worst n of the other records are clean, at most.

    Args:
        values: (N,), higher is worse.
        clean: bool (N,), a random sample of the clean records.
        ns: Each at most the number of the other records.
    """
    sample, others = np.sort(values[clean]), values[~clean]
    m, total = len(sample), len(others)
    if m < MIN_SAMPLE:
        why = (
            f"{m} records of the reference are among those scanned; at least {MIN_SAMPLE} are "
            "needed"
        )
        return CleanEstimate(why=why)
    thresholds = np.sort(others)[::-1][np.asarray(ns, np.int64) - 1]
    above = m - np.searchsorted(sample, thresholds, "left")  # clean records as bad
    low = np.where(above > 0, beta.ppf((1 - LEVEL) / 2, np.maximum(above, 1), m - above + 1), 0.0)
    high = np.where(above < m, beta.ppf((1 + LEVEL) / 2, above + 1, np.maximum(m - above, 1)), 1.0)
    point = (above + 1) / (m + 1)
    values, lows, highs = (np.minimum(share * total, ns).tolist() for share in (point, low, high))
    measures = map(_measure, values, lows, highs, ns)
    return CleanEstimate(tuple(ns), tuple(measures))


def _measure(value: float, low: float, high: float, n: int) -> Measure:
    how = f"of the worst {n} records, how many are expected to be clean"
    return Measure(min(max(value, low), high), n, low, high, how)
