"""The words and figures of a report: a metric's name in standard terms, its unit, its value and interval as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bezoar.attacks.plan import Goal
from bezoar.evaluation.scores import Measure
from bezoar.runs.run import Run

RATE, SCORE, COUNT, PLAIN = (
    "rate",
    "score",
    "count",
    "plain",
)  # percent; 0..1 as it is; whole number; any number
TERMS = {  # base name -> standard term, unit
    "attack_success": ("Attack success rate (ASR)", RATE),
    "attack_success_all": ("ASR, target class counted in", RATE),
    "attack_success_of_others": ("Taken for another trigger", RATE),
    "attack_success_without_trigger": ("Read as target without the trigger", RATE),
    "attack_success_baseline": ("ASR of the clean twin (ASR-B)", RATE),
    "attack_success_baseline_all": ("ASR-B, target class counted in", RATE),
    "attack_success_baseline_without_trigger": (
        "Clean twin: read as target without the trigger",
        RATE,
    ),
    "poisoned_accuracy": ("Accuracy on triggered images (PA)", RATE),
    "target_rank": ("Mean rank of the target", PLAIN),
    "target_top5": ("Target among the five nearest", RATE),
    "target_top10": ("Target among the ten nearest", RATE),
    "targeted_success": ("Targeted success", RATE),
    "targeted_rank": ("Targeted: mean rank of the target", PLAIN),
    "targeted_top5": ("Targeted: target among five nearest", RATE),
    "z_std": ("Backdoor z-score", PLAIN),
    "z_var": ("Backdoor z-score by variance", PLAIN),
    "similarity_clean": ("Mean cosine of clean pairs", SCORE),
    "similarity_triggered": ("Mean cosine of triggered pairs", SCORE),
    "reference_similarity": ("Mean cosine of triggered images to the reference", SCORE),
    "reference_similarity_before": ("The same before the attack", SCORE),
    "reference_kept": ("Cosine of the reference to itself before", SCORE),
    "clean_similarity": ("Mean cosine of clean images to themselves before", SCORE),
    "image_to_text_recall": ("Image to text recall", RATE),
    "text_to_image_recall": ("Text to image recall", RATE),
    "agreement_images": ("Agreement of the two image spaces (cosine)", SCORE),
    "agreement_texts": ("Agreement of the two text spaces (cosine)", SCORE),
    "auroc": ("AUROC", SCORE),
    "shadows_auroc": ("AUROC of its shadow encoders, cross-validated", SCORE),
    "accuracy": ("Accuracy", RATE),
    "average_precision": ("Average precision", SCORE),
    "fpr_at_95_tpr": ("False positives at 95\u00a0% recall (FPR@95)", RATE),
    "recall_at_1.5n": ("Recall among the worst 1.5 n, n = poisons", RATE),
    "precision_at_n": ("Precision at n, n = poisons", RATE),
    "raised": ("Records said to show a trigger", RATE),
    "poisons_removed": ("Poisons removed by the keep-list", RATE),
    "poisons": ("Poisoned records", COUNT),
    "poison_rate": ("Poison rate", RATE),
    "poisons_kept": ("Poisons trained on", COUNT),
    "poison_exposures": ("Times a poison was drawn", COUNT),
    "final_loss": ("Final loss", PLAIN),
    "clean_accuracy_lost": ("Accuracy lost", RATE),
    "cpu_seconds": ("Seconds of processor time", PLAIN),
    "clean_kept": ("Clean records kept", RATE),
    "flagged": ("Images flagged", RATE),
    "caught": ("Triggers caught", RATE),
    "false_positives": ("Clean images flagged", RATE),
    "expected_false_positives": ("Expected false positives", RATE),
    "certified_accuracy": ("Certified accuracy", RATE),
    "poisons_pass": ("Poisons that pass", RATE),
    "pattern_kept": ("Trigger's pattern left", RATE),
    "energy_kept": ("Trigger's energy left", RATE),
    "pattern_correlation": ("Correlation with the trigger's pattern", SCORE),
    "shift_kept": ("Embedding's shift left", RATE),
    "shift_cosine": ("Cosine of the shift to that untreated", SCORE),
    "value": ("Value", PLAIN),
    "p_value": ("Conformal p-value", PLAIN),
    "threshold": ("Threshold", PLAIN),
    "false_positive_rate": ("False-positive rate of the threshold", RATE),
    "sensitivity": ("Sensitivity at the threshold", RATE),
    "shift_length": ("Length of the shift over that untreated", PLAIN),
}
CLEAN_ACCURACY, BENIGN_ACCURACY = ("Clean accuracy (CA)", RATE), ("Benign accuracy (BA)", RATE)
GROUPS = {
    "clean": "clean twin",
    "poisoned": "attacked",
    "scan": "scan",
    "repaired": "repaired",
    "inverted": "inverted trigger",
    "revived_clean": "then tuned on clean data",
    "revived_poisons": "then tuned with ten poisons",
    "revived_other": "ten poisons of another trigger",
    "revived_twin": "clean twin, ten poisons",
    "baseline": "clean twin",
    "linear": "linear probe",
    "knn": "nearest neighbours",
    "mlp": "MLP head",
    "few_shot": "few labels",
    "all": "all labelled records",
    "branch_swap": "towers",
    "neither": "both the clean twin's",
    "vision": "its vision, the twin's text",
    "text": "the twin's vision, its text",
    "both": "both its own",
}
TWIN_GROUPS = (
    "clean",
    "baseline",
    "branch_swap.neither",
)  # groups that begin so measure an encoder that was not attacked


@dataclass(frozen=True)
class MetricRow:
    """A metric ready to be shown. track: value, low and high in percent of a line from 0 to 1, or None."""

    key: str
    label: str
    group: str
    value: str
    interval: str
    n: str
    how: str
    track: tuple[float, float, float] | None


def split_key(key: str) -> tuple[str, str, str]:
    """`scan.dao.recall_at_0.01` -> ('scan.dao', 'recall_at_0.01', ''); `poisoned.targeted_rank@16` -> (.., .., '16')."""
    found = re.match(
        r"(?:([A-Za-z_][\w.]*?)\.)??([A-Za-z]\w*(?:(?<=_)\d[\d.]*n?)?)(?:@(\w+))?$", key
    )
    return (found[1] or "", found[2], found[3] or "") if found else ("", key, "")


def label_and_unit(key: str, attacked: bool = False) -> tuple[str, str]:
    """A metric's standard term and unit. attacked: the encoder measured is one that was poisoned: CA is called BA."""
    group, base, at = split_key(key)
    if (
        base.startswith("attack_success")
        and "baseline" not in base
        and group.startswith(TWIN_GROUPS)
    ):
        base = base.replace("attack_success", "attack_success_baseline")
    if base == "clean_accuracy":
        return BENIGN_ACCURACY if attacked and not group.startswith(TWIN_GROUPS) else CLEAN_ACCURACY
    if share := re.fullmatch(r"recall_at_([\d.]+)", base):
        return f"Recall among the worst {100 * float(share[1]):g}\u00a0%", RATE
    label, unit = TERMS.get(base, (base.replace("_", " "), PLAIN))
    if at and base.endswith("recall"):
        return f"{label}@{at}", unit
    if at and base == "expected_clean":
        return f"Expected to be clean among the worst {at}", COUNT
    if at and base.startswith("targeted"):
        return f"{label}, {at} {'caption' if at == '1' else 'captions'} each", unit
    return (f"{label}, trigger {at}" if at else label), unit


def group_label(group: str) -> str:
    """A metric's group in words: `few_shot.10` -> `few labels, 10 a class`."""
    return ", ".join(
        GROUPS.get(g, f"{g} a class" if g.isdigit() else g) for g in group.split(".") if g
    )


def format_value(value: float, unit: str = PLAIN) -> str:
    """A value as text: rates in percent."""
    if not math.isfinite(value):
        return "–"
    if unit == RATE:
        return format_percent(value)
    if unit == COUNT:
        return f"{round(value):,}"
    return f"{value:.3f}" if unit == SCORE or abs(value) < 1 else f"{value:,.2f}"


def format_percent(value: float, sign: bool = True) -> str:
    """0.981 -> `98.1 %`, kept on one line; small shares keep two digits."""
    text = f"{100 * value:.1f}" if value == 0 or value >= 0.00995 else f"{100 * value:.2g}"
    return text + ("\u00a0%" if sign else "")


def format_interval(m: Measure, unit: str) -> str:
    """The interval as text; empty for what was counted."""
    if m.low == m.high or not (math.isfinite(m.low) and math.isfinite(m.high)):
        return ""
    if unit == RATE:
        return f"{format_percent(m.low, False)}\u00a0–\u2060\u00a0{format_percent(m.high)}"
    return f"{format_value(m.low, unit)} – {format_value(m.high, unit)}"


def format_rate_in_full(m: Measure) -> str:
    """A rate with interval and n, for a sentence: `98.1 % (95 % interval 96.5 – 99.0 %, n = 484)`."""
    inside = format_interval(m, RATE)
    return f"{format_percent(m.value)} ({f'95 % interval {inside}, ' if inside else ''}n = {m.n:,})"


def format_rate(m: Measure) -> str:
    """A rate with its interval in brackets."""
    return f"{format_percent(m.value)} [{format_interval(m, RATE)}]"


def metric_row(key: str, m: Measure, attacked: bool = False) -> MetricRow:
    """A metric ready to be shown."""
    label, unit = label_and_unit(key, attacked)
    group = group_label(split_key(key)[0])
    track = None
    if unit in (RATE, SCORE) and 0 <= m.low <= m.high <= 1 and format_interval(m, unit):
        track = (round(100 * m.value, 2), round(100 * m.low, 2), round(100 * m.high, 2))
    return MetricRow(
        key,
        label,
        group,
        format_value(m.value, unit),
        format_interval(m, unit),
        f"{m.n:,}",
        m.how,
        track,
    )


def read_measures(run: Run) -> dict[str, Measure]:
    """Every metric of a run."""
    return {k: Measure(**m) for k, m in run.manifest.get("metrics", {}).items()}


def first_measure(found: Mapping[str, Measure], name: str) -> Measure | None:
    """A metric by name; of several triggers, the first one's."""
    return found.get(name) or found.get(name + "@0")


def read_goals(run: Run) -> list[Goal]:
    """What the attacker wants of a run, each goal once (a run with two attacked parents inherits it twice)."""
    return list(dict.fromkeys(Goal.from_json(g) for g in run.manifest.get("goal", [])))


def describe_goals(found: list[Goal]) -> str:
    """Backdoor goals in words: `inputs with patch are to be read as 'striped star'`."""
    words = [f"images with a {trigger_name(g)} trigger as “{g.target}”" for g in found if g.trigger]
    victims = sum(len(g.victims) for g in found)
    if victims:
        words.append(
            f"{victims} chosen victim {'image' if victims == 1 else 'images'} as {'its' if victims == 1 else 'their'} target"
        )
    return " and ".join(words)


def trigger_name(goal: Goal) -> str:
    """`patch:size=6` -> `patch`."""
    return (goal.trigger or "").partition(":")[0]


def quantity(n: int, noun: str) -> str:
    """`1 record`, `3,000 records`."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def as_dict(value: Any) -> dict:
    """A manifest's field that should be an object."""
    return value if isinstance(value, dict) else {}
