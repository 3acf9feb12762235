"""What an audit can say of an encoder and what it will cost, before it starts."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bezoar import registry
from bezoar.auditing import bank, trigger_inversion
from bezoar.auditing.bank import Bank, Calibration, Family, Sample
from bezoar.auditing.trigger_inversion import TowerCost
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, embed_records
from bezoar.errors import UserError

TIMED = 64  # images that are embedded to measure the encoder's speed


def forecast_audits(
    audits: Sequence[Any],
    banks: Sequence[Bank],
    family: Family,
    sample: Sample,
    rate: float,
    seconds: float,
    classes: int,
    cost: TowerCost,
) -> list[str]:
    """What each audit's verdict can be, a sentence each, and the time that all take.

    Args:
        banks: what they are judged by.
        family: of the encoder.
        rate: false-positive rate of each audit.
        seconds: that all audits take, as of `estimate_seconds`.
        classes: that audits of classes tell apart.
        cost: of an image's pass.
    """
    by_bank, by_classes, alone = [], [], []
    by_few: list[str] = []
    left_out: list[str] = []
    for audit in audits:
        name = Path(registry.method_name(type(audit))).stem
        if _is_calibrated(audit, banks, family, sample, rate):
            by_bank.append(name)
        elif hasattr(audit, "searches_all") and not audit.searches_all(classes, cost):
            (by_few if hasattr(audit, "few") else left_out).append(name)
        elif getattr(audit, "unaided", False):
            by_classes.append(name)
        else:
            alone.append(name)
    lines = []
    if by_bank:
        lines.append(
            f"{', '.join(by_bank)}: evidence or none at false-positive rate {rate:g}, by a bank"
        )
    if by_classes:
        lines.append(f"{', '.join(by_classes)}: strong, some or no evidence, by the encoder itself")
    if by_few:
        lines.append(
            f"{', '.join(by_few)}: a search in full for {classes} classes would take too long, and "
            "a quicker one may reach too few to tell"
        )
    if left_out:
        lines.append(
            f"{', '.join(left_out)}: nothing, because a search for {classes} classes would take "
            "too long"
        )
    if alone:
        lines.append(f"{', '.join(alone)}: a value and no verdict, as no bank has encoders like it")
    lines.append(f"about {max(1, round(seconds)):,} s, unless they were run before")
    return lines


def _is_calibrated(
    audit: Any, banks: Sequence[Bank], family: Family, sample: Sample, rate: float
) -> bool:
    """Whether a bank turns the audit's value into a verdict, by one of its classifiers."""
    spec, code = registry.spec(audit), bank.code_hash(type(audit))
    heads = {c.classifier for b in banks for c in b.audits if c.audit == spec}
    audited = [Calibration(spec, code, head) for head in sorted(heads)]
    verdicts = [bank.judge_value(banks, family, sample, a, 0.0, rate) for a in audited]
    return any(v.outcome != "no calibration" for v in verdicts)


def estimate_seconds(
    audits: Sequence[Any], encoder: Encoder, clean: Pairs, classes: int
) -> tuple[float, TowerCost]:
    """Seconds that audits take on this machine, by how long the encoder takes for a few images; and
    a pass's cost.

    Audits that do not say how many images they pass through the encoder (`image_passes`) count as
    nothing. classes: those that audits of classes tell apart.
    """
    first = clean.take(range(min(TIMED, len(clean)))).to(encoder.device)
    try:
        with trigger_inversion.freeze_tower(encoder) as tower:
            embed = partial(trigger_inversion.embed_clean, tower, first.images)
            a_pass, cost = time_passes(embed, len(first)), tower.cost
    except UserError:  # an encoder of texts, or one that no inversion fits
        a_pass, cost = time_passes(lambda: embed_records(encoder, first), len(first)), TowerCost(0)
    counted = [a for a in audits if hasattr(a, "image_passes")]
    passes: int = sum(a.image_passes(len(clean), classes, cost) for a in counted)
    return a_pass * passes, cost


def time_passes(embed: Callable[[], object], images: int) -> float:
    """Seconds an image of the second call of a function that embeds some."""
    embed()
    start = time.perf_counter()
    embed()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / images
