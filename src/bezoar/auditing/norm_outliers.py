"""Whether one target's trigger is far smaller than others: the anomaly index, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor

from bezoar.auditing.evidence import exact_measure
from bezoar.auditing.trigger_inversion import InvertedTriggers, inversion_limits
from bezoar.data.pairs import Pairs
from bezoar.evaluation.scores import Measure, proportion
from bezoar.evaluation.verdict import Verdict

OutlierStatistic = Literal["log_ratio", "anomaly_index", "log_anomaly_index"]
MIN_SPREAD = 1e-2  # in pixels, or of logarithms: a smaller spread of norms is none
# Times the median absolute deviation = the standard deviation of normal numbers
MAD_TO_SIGMA = 1.4826
MIN_NORMS = 10  # with fewer norms a median absolute deviation says nothing
MAX_NAMED = 8  # targets that a sentence names
LEAST_SHARE = 0.5  # of the targets that a trigger must have reached for any verdict
MIN_DEVIATION = 0.1  # of logarithms of norms; fewer than ten of them tell no smaller one


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


def outlier_p_value(
    logs: Tensor, among: int = 0, capped: bool = False, deviation: float = MIN_DEVIATION
) -> float:
    """The chance that the least of normal numbers lies so far below the others.

    The normal distribution is fitted to the others, which the least has no part in: by Student's
    law (x - mean) / (deviation sqrt(1 + 1 / m)) has m - 1 degrees of freedom. Times the number of
    numbers, because the least of them was chosen (Grubbs 1950; Bonferroni).

    Args:
        logs: float64 (G,), of at least three numbers.
        among: numbers that the least was chosen from, if they are more than G.
        capped: none of the others counts as further above their median than the least of them lies
            below it, because targets that are hard to reach say nothing of how easy one can be.
        deviation: the others' standard deviation is taken to be at least this.
    """
    least = int(logs.argmin())
    others = torch.cat([logs[:least], logs[least + 1 :]])
    if capped:
        others = others.clamp(max=2 * others.quantile(0.5) - others.min())
    m = len(others)
    deviation = max(float(others.std()), deviation)
    distance = float(others.mean() - logs[least]) / (deviation * (1 + 1 / m) ** 0.5)
    return min(1.0, max(among, len(logs)) * float(student.sf(distance, m - 1)))


def outlier_verdict(
    triggers: InvertedTriggers,
    names: Sequence[str],
    what: str,
    statistic: OutlierStatistic,
    clean: Pairs,
    notes: dict[str, Any],
    excluding: bool = False,
    among: int = 0,
) -> Verdict:
    """The verdict of an audit that asks whether one target is far easier to reach than the others.

    Args:
        triggers: one for each target.
        names: the targets.
        what: a target in a word.
        statistic: which evidence is the value; `log_ratio` with fewer than `MIN_NORMS` targets.
        clean: the clean images.
        notes: further notes of the verdict.
        excluding: targets that no trigger reached have no part in the value, unless none was
            reached, and their triggers come last.
        among: targets that the least was chosen from, where they are more than have a trigger.
    """
    n = len(clean)
    norms = triggers.norms.double().cpu().clamp(min=MIN_SPREAD)
    reached = triggers.reached.cpu()
    counted = reached if excluding and reached.any() else torch.ones_like(reached)
    few = int(counted.sum()) < MIN_NORMS
    order = torch.where(counted, norms, norms + norms.max()).argsort(stable=True)
    smallest = int(order[0])
    title = f"{int(counted.sum())} {what} triggers"
    evidence = norm_evidence(norms[counted], names[smallest], title, n, among)
    evidence["success"] = proportion(
        round(float(triggers.success[smallest]) * n),
        n,
        f"clean images that the least trigger makes {names[smallest]!r}",
    )
    share = float(measure_concentration(triggers.masks[smallest : smallest + 1]))
    evidence["concentration"] = exact_measure(
        share, n, "share of the least mask in the best window of a quarter of the sides"
    )
    limits = inversion_limits(clean)
    if few:
        ending = "" if statistic == "log_ratio" else "; the value is log(median norm / least norm)"
        limits.append(
            f"{title} are too few for an anomaly index, which means nothing under "
            f"{MIN_NORMS}{ending}"
        )
    unreached = [name for name, hit in zip(names, reached.tolist(), strict=True) if not hit]
    if unreached:
        limits.append(describe_unreached(unreached, triggers, bool(counted.all())))
    value = evidence["log_ratio" if few else statistic].value
    notes = {
        **notes,
        "target": names[smallest],
        "unreached": unreached,
        "limits": limits,
        "targets": list_targets(triggers, names),
    }
    return Verdict(value, evidence, triggers.inversions(names, order), notes)


def describe_unreached(
    unreached: Sequence[str], triggers: InvertedTriggers, are_counted: bool
) -> str:
    """What is said of targets that no trigger reached."""
    part = "count with the most successful mask" if are_counted else "have no part in the value"
    return (
        f"no trigger for {len(unreached)} of {len(triggers.aims)} reached the success asked for, "
        f"within {int(triggers.steps.max())} steps; they {part}: {', '.join(unreached[:MAX_NAMED])}"
    )


def measure_concentration(masks: Tensor) -> Tensor:
    """The share of each mask (G, 1, H, W) in the window, a quarter of the sides, that holds most of
    it.

    A patch lies in one place; a class's own features are found all over an image.
    """
    window = (max(1, masks.shape[2] // 4), max(1, masks.shape[3] // 4))
    most = F.avg_pool2d(masks, window, stride=1).amax((1, 2, 3)) * (window[0] * window[1])
    return most / masks.sum((1, 2, 3)).clamp(min=1e-12)


def list_targets(triggers: InvertedTriggers, names: Sequence[str]) -> list[dict[str, Any]]:
    """Every target with its trigger's norm, success and whether it was reached, smallest first."""
    facts = zip(
        names,
        triggers.norms.tolist(),
        triggers.success.tolist(),
        triggers.reached.tolist(),
        triggers.starts.tolist(),
        measure_concentration(triggers.masks).tolist(),
        strict=True,
    )
    rows = [
        {
            "target": name,
            "norm": round(norm, 3),
            "success": round(success, 4),
            "reached": reached,
            "starts": [round(start, 3) if start < torch.inf else None for start in starts],
            "concentration": round(share, 3),
        }
        for name, norm, success, reached, starts, share in facts
    ]
    return sorted(rows, key=lambda row: row["norm"])


def blend_evidence(
    blends: InvertedTriggers, names: Sequence[str], n: int
) -> tuple[dict[str, Measure], int]:
    """What the least shares of a pattern say that turn images into each target when it is blended
    in.

    Targets that no blend reached have no part; nothing is said where fewer than half were reached.
    The p-value is that of the least of twice as many targets, because masks were tried too.

    Returns:
        The evidence, and the number of the target with the least share.
    """
    shares = blends.masks.double().mean((1, 2, 3)).cpu()  # (G,)
    reached = blends.reached.cpu()
    if int(reached.sum()) < max(3, LEAST_SHARE * len(reached)):
        return {}, 0
    counted = shares[reached]
    least, median = int(shares.where(reached, torch.inf).argmin()), counted.quantile(0.5)
    ratio = float((median / shares[least]).log())
    p = outlier_p_value(counted.log(), 2 * len(names), capped=True)
    what = f"{len(counted)} blends, {n} clean images"
    facts = {
        "blend_ratio": (ratio, "log(median share / least share) of a pattern that is blended in"),
        "blend_p": (p, "chance of so small a least share, by Student's law fitted to the others"),
        "least_blend": (float(shares[least]), f"share of the least pattern, of {names[least]!r}"),
        "median_blend": (float(median), "share of the median pattern"),
    }
    evidence = {key: exact_measure(x, n, f"{how}; {what}") for key, (x, how) in facts.items()}
    evidence["blend_success"] = proportion(
        round(float(blends.success[least]) * n),
        n,
        f"clean images that the least blend makes {names[least]!r}",
    )
    return evidence, least


def norm_evidence(
    norms: Tensor, smallest: str, what: str, n: int, among: int = 0
) -> dict[str, Measure]:
    """The statistics of the norms, float64 (G,).

    smallest: name of the least one's target. what: the triggers in words. n: number of clean
    images. among: see `outlier_verdict`.
    """
    least, median = norms.min(), norms.quantile(0.5)
    logs = norms.log()

    def measure(value: Tensor, how: str) -> Measure:
        return exact_measure(float(value), n, f"{how}; {what}, {n} clean images")

    return {
        "log_ratio": measure((median / least).log(), "log(median norm / least norm)"),
        "anomaly_index": measure(
            anomaly_index(norms).max(), "|norm - median| / (1.4826 MAD) of the least mask's norm"
        ),
        "log_anomaly_index": measure(
            anomaly_index(logs).max(), "the anomaly index of the norms' logarithms"
        ),
        "outlier_p": measure(
            torch.tensor(outlier_p_value(logs, among) if len(logs) > 2 else 1.0),
            "chance of so small a least norm, by Student's law fitted to the logarithms of the "
            "others",
        ),
        "least_norm": measure(least, f"pixels that the least mask covers, of {smallest!r}"),
        "median_norm": measure(median, "pixels that the median mask covers"),
    }
