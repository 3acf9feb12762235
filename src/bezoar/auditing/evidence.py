"""Measures that audits report beside their value."""

from collections.abc import Sequence

from bezoar.evaluation.scores import Measure, average


def exact_measure(value: float, n: int, how: str) -> Measure:
    """A number without sampling error: its interval is the number itself."""
    return Measure(float(value), n, float(value), float(value), how)


def mean_over_probes(values: Sequence[float], how: str) -> Measure:
    """The mean over probes with its interval; a single probe has no interval."""
    return average(values, how) if len(values) > 1 else exact_measure(values[0], 1, how)
