"""Whether one target's trigger is far smaller than others: the anomaly index, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bezoar.auditing.evidence import exact_measure
from bezoar.auditing.trigger_inversion import InvertedTriggers, inversion_limits
from bezoar.data.pairs import Pairs
from bezoar.evaluation.scores import Measure, proportion
from bezoar.evaluation.verdict import Verdict

OutlierStatistic = Literal["log_ratio", "anomaly_index", "log_anomaly_index"]
MIN_SPREAD = 1e-2  # in pixels, or of logarithms: a smaller spread of norms is none
MAD_TO_SIGMA = (
    1.4826  # times the median absolute deviation = the standard deviation of normal numbers
)
MIN_NORMS = 10  # with fewer norms a median absolute deviation says nothing
MAX_NAMED = 8  # targets that a sentence names


def anomaly_index(norms: Tensor) -> Tensor:
    """Neural Cleanse's anomaly index of each norm (G,), float64 (G,) on the CPU.

    It is |norm - median| / (1.4826 MAD) below the median, and 0 above. The median of an even number
    of norms is the mean of the two middle ones.
    """
    x = norms.detach().double().cpu()
    median = x.quantile(0.5)
    deviations = (x - median).abs()
    mad = deviations.quantile(0.5).clamp(min=MIN_SPREAD)
    return torch.where(x < median, deviations / (MAD_TO_SIGMA * mad), 0.0)


def outlier_verdict(
    triggers: InvertedTriggers,
    names: Sequence[str],
    what: str,
    statistic: OutlierStatistic,
    clean: Pairs,
    notes: dict[str, Any],
) -> Verdict:
    """The verdict of an audit that asks whether one target is far easier to reach than the others.

    Args:
        triggers: one for each target.
        names: the targets.
        what: a target in a word.
        statistic: which evidence is the value. With fewer than `MIN_NORMS` targets it is always
            `log_ratio`.
        clean: the clean images.
        notes: further notes of the verdict.
    """
    n = len(clean)
    few = len(names) < MIN_NORMS
    norms = triggers.norms.double().cpu().clamp(min=MIN_SPREAD)
    smallest = int(norms.argmin())
    evidence = norm_evidence(norms, names[smallest], f"{len(norms)} {what} triggers", n)
    evidence["success"] = proportion(
        round(float(triggers.success[smallest]) * n),
        n,
        f"clean images that the least trigger makes {names[smallest]!r}",
    )
    limits = inversion_limits(clean)
    if few:
        ending = "" if statistic == "log_ratio" else "; the value is log(median norm / least norm)"
        limits.append(
            f"{len(norms)} {what} triggers are too few for an anomaly index, which means nothing under {MIN_NORMS}{ending}"
        )
    reached = triggers.reached.tolist()
    unreached = [name for name, hit in zip(names, reached, strict=True) if not hit]
    if unreached:
        limits.append(
            f"no trigger for {len(unreached)} of {len(norms)} reached the success asked for, within "
            f"{int(triggers.steps.max())} steps; they count with the most successful mask: "
            f"{', '.join(unreached[:MAX_NAMED])}"
        )
    value = evidence["log_ratio" if few else statistic].value
    notes = {**notes, "target": names[smallest], "unreached": unreached, "limits": limits}
    return Verdict(value, evidence, triggers.inversions(names), notes)


def norm_evidence(norms: Tensor, smallest: str, what: str, n: int) -> dict[str, Measure]:
    """The statistics of the norms, float64 (G,).

    smallest: name of the least one's target. what: the triggers in words. n: number of clean
    images.
    """
    least, median = norms.min(), norms.quantile(0.5)

    def measure(value: Tensor, how: str) -> Measure:
        return exact_measure(float(value), n, f"{how}; {what}, {n} clean images")

    return {
        "log_ratio": measure((median / least).log(), "log(median norm / least norm)"),
        "anomaly_index": measure(
            anomaly_index(norms).max(), "|norm - median| / (1.4826 MAD) of the least mask's norm"
        ),
        "log_anomaly_index": measure(
            anomaly_index(norms.log()).max(), "the anomaly index of the norms' logarithms"
        ),
        "least_norm": measure(least, f"pixels that the least mask covers, of {smallest!r}"),
        "median_norm": measure(median, "pixels that the median mask covers"),
    }
