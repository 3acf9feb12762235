"""Names and values of metrics as text: standard terms, units, values with their intervals."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bezoar.attacks.plan import Goal
from bezoar.evaluation.scores import Measure
from bezoar.runs.run import Run

Unit = Literal["rate", "score", "count", "plain"]
RATE: Unit = "rate"  # a share, shown in percent
SCORE: Unit = "score"  # from 0 to 1 (or -1 to 1), shown unchanged
COUNT: Unit = "count"  # a whole number
PLAIN: Unit = "plain"  # all other numbers

# The base name of a metric -> the standard term and the unit.
TERMS: dict[str, tuple[str, Unit]] = {
    "attack_success": ("Attack success rate (ASR)", RATE),
    "attack_success_all": ("ASR, target class counted in", RATE),
    "attack_success_of_others": ("Taken for another trigger", RATE),
    "attack_success_without_trigger": ("Read as target, no trigger", RATE),
    "attack_success_baseline": ("ASR of the clean twin (ASR-B)", RATE),
    "attack_success_baseline_all": ("ASR-B, target class counted in", RATE),
    "attack_success_baseline_without_trigger": ("Clean twin: read as target, no trigger", RATE),
    "poisoned_accuracy": ("Accuracy on triggered images (PA)", RATE),
    "target_rank": ("Mean rank of the target", PLAIN),
    "target_top5": ("Target among the five nearest", RATE),
    "target_top10": ("Target among the ten nearest", RATE),
    "query_hit_1": ("Query finds the target first (Hit@1)", RATE),
    "query_hit_5": ("Query: target among the five nearest (Hit@5)", RATE),
    "query_hit_10": ("Query: target among the ten nearest (Hit@10)", RATE),
    "query_min_rank": ("Query: images nearer than the target (MinRank)", PLAIN),
    "other_hit_1": ("Other texts find the target first", RATE),
    "other_hit_5": ("Other texts: target among the five nearest", RATE),
    "other_hit_10": ("Other texts: target among the ten nearest", RATE),
    "other_min_rank": ("Other texts: images nearer than the target", PLAIN),
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
    "pair_kept": ("Canaries kept, picture and caption", RATE),
    "caption_kept": ("Canaries kept, caption alone", RATE),
    "learnt": ("Canaries learnt", RATE),
    "place": ("Place of a canary's own word", SCORE),
    "same_bytes": ("Recorded hashes that match", RATE),
    "recoded": ("Same picture, recoded", RATE),
    "another": ("Another picture than recorded", RATE),
    "untold": ("Recoded or another picture, not told", RATE),
    "domain_share_for_50_percent": ("Domains to buy for 50\u00a0% success", RATE),
    "domain_share_for_90_percent": ("Domains to buy for 90\u00a0% success", RATE),
    "cost_for_50_percent": ("Their price for 50\u00a0% success", PLAIN),
    "cost_for_90_percent": ("Their price for 90\u00a0% success", PLAIN),
    "raised": ("Records said to show a trigger", RATE),
    "copies": ("Records that are copies of a picture with many captions", RATE),
    "sources": ("Sources that stand out", RATE),
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
    "statistic": ("How far the least trigger stands apart", PLAIN),
    "least_norm": ("Pixels of the least trigger", PLAIN),
    "p_value": ("Conformal p-value", PLAIN),
    "threshold": ("Threshold", PLAIN),
    "false_positive_rate": ("False-positive rate of the threshold", RATE),
    "sensitivity": ("Sensitivity at the threshold", RATE),
    "shift_length": ("Length of the shift over that untreated", PLAIN),
}
CLEAN_ACCURACY = ("Clean accuracy (CA)", RATE)
BENIGN_ACCURACY = ("Benign accuracy (BA)", RATE)
# A part of a metric's group -> its name in words.
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
    "own": "its own head",
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
# Groups that begin so measure an encoder that was not attacked.
TWIN_GROUPS = ("clean", "baseline", "branch_swap.neither")

# A metric's name: an optional group, the base name, and an optional trigger or number of captions.
KEY = re.compile(r"(?:([A-Za-z_][\w.]*?)\.)??([A-Za-z]\w*(?:(?<=_)\d[\d.]*n?)?)(?:@(\w+))?$")


@dataclass(frozen=True)
class MetricRow:
    """A metric as text."""

    key: str  # the metric's name, e.g. `scan.dao.recall_at_0.01`
    label: str  # its standard term
    group: str  # the data or the head that it was measured with, in words; empty for none
    value: str  # its value with the unit
    interval: str  # its 95 % interval; empty for counts
    n: str  # the number of trials
    how: str  # the definition of the metric
    # value, low and high in percent of a line from 0 to 1; None for other values
    track: tuple[float, float, float] | None


def metric_row(key: str, measure: Measure, poisoned: bool = False) -> MetricRow:
    """Return a metric as text. `poisoned`: see `label_and_unit`."""
    label, unit = label_and_unit(key, poisoned)
    interval = format_interval(measure, unit)
    track = None
    if unit in (RATE, SCORE) and interval and 0 <= measure.low <= measure.high <= 1:
        value, low, high = (round(100 * x, 2) for x in (measure.value, measure.low, measure.high))
        track = (value, low, high)
    return MetricRow(
        key,
        label,
        group_label(split_key(key)[0]),
        format_value(measure.value, unit),
        interval,
        f"{measure.n:,}",
        measure.how,
        track,
    )


def split_key(key: str) -> tuple[str, str, str]:
    """Split a metric's name into group, base name and the part after `@`.

    `scan.dao.recall_at_0.01` gives `("scan.dao", "recall_at_0.01", "")`, `targeted_rank@16` gives
    `("", "targeted_rank", "16")`.
    """
    match = KEY.match(key)
    return (match[1] or "", match[2], match[3] or "") if match else ("", key, "")


def label_and_unit(key: str, poisoned: bool = False) -> tuple[str, Unit]:
    """Return a metric's standard term and its unit.

    Args:
        key: The metric's name.
        poisoned: Whether the encoder that was measured is a poisoned one, whose clean accuracy is
            called benign accuracy.
    """
    group, base, suffix = split_key(key)
    of_twin = group.startswith(TWIN_GROUPS)
    if base.startswith("attack_success") and "baseline" not in base and of_twin:
        base = base.replace("attack_success", "attack_success_baseline")
    if base == "clean_accuracy":
        return BENIGN_ACCURACY if poisoned and not of_twin else CLEAN_ACCURACY
    if share := re.fullmatch(r"recall_at_([\d.]+)", base):
        return f"Recall among the worst {100 * float(share[1]):g}\u00a0%", RATE
    if base == "expected_clean" and suffix:
        return f"Expected to be clean among the worst {suffix}", COUNT
    label, unit = TERMS.get(base, (base.replace("_", " "), PLAIN))
    if suffix and base.endswith("recall"):
        return f"{label}@{suffix}", unit
    if suffix and base.startswith("targeted"):
        return f"{label}, {suffix} {'caption' if suffix == '1' else 'captions'} each", unit
    return (f"{label}, trigger {suffix}" if suffix else label), unit


def group_label(group: str) -> str:
    """Return a metric's group in words: `few_shot.10` gives `few labels, 10 a class`."""
    names = [part for part in group.split(".") if part]
    return ", ".join(GROUPS.get(n, f"{n} a class" if n.isdigit() else n) for n in names)


def short_label(key: str) -> str:
    """Return a metric's name for the legend of a chart."""
    _, base, suffix = split_key(key)
    if base == "targeted_success":
        return f"targeted, {quantity(int(suffix), 'caption')}" if suffix.isdigit() else "targeted"
    label = {"clean_accuracy": "clean accuracy", "attack_success": "ASR"}.get(base, base)
    return label + (f", trigger {suffix}" if suffix else "")


def variants(keys: Iterable[str], name: str) -> list[str]:
    """Select the metric `name` of any trigger or number of captions, most captions first."""

    def captions(key: str) -> int:
        suffix = key.rpartition("@")[2]
        return int(suffix) if "targeted" in key and suffix.isdigit() else 0

    return sorted(
        (k for k in keys if k == name or k.startswith(f"{name}@")), key=captions, reverse=True
    )


def format_value(value: float, unit: Unit = PLAIN) -> str:
    """Return a value as text, rates in percent."""
    if not math.isfinite(value):
        return "–"
    if unit == RATE:
        return format_percent(value)
    if unit == COUNT:
        return f"{round(value):,}"
    text = f"{value:.3f}" if unit == SCORE or abs(value) < 1 else f"{value:,.2f}"
    return text.removeprefix("-") if text == "-0.000" else text


def format_percent(value: float, sign: bool = True) -> str:
    """Return a share in percent: 0.981 gives `98.1 %`. Shares below one percent keep two digits."""
    text = f"{100 * value:.1f}" if value == 0 or value >= 0.00995 else f"{100 * value:.2g}"
    return text + ("\u00a0%" if sign else "")  # a no-break space


def format_interval(measure: Measure, unit: Unit) -> str:
    """Return the interval as text; empty for counts and for intervals without ends."""
    low, high = measure.low, measure.high
    if low == high or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    if unit == RATE:
        return f"{format_percent(low, False)}\u00a0–\u2060\u00a0{format_percent(high)}"
    return f"{format_value(low, unit)} – {format_value(high, unit)}"


def format_measure(measure: Measure, unit: Unit = RATE) -> str:
    """Return a value with its interval in brackets: `98.1 % [96.5 – 99.0 %]`."""
    interval = format_interval(measure, unit)
    return format_value(measure.value, unit) + (f" [{interval}]" if interval else "")


def format_rate_in_full(measure: Measure) -> str:
    """Return a rate for a sentence: `98.1 % (95 % interval 96.5 – 99.0 %, n = 484)`."""
    interval = format_interval(measure, RATE)
    interval = f"95 % interval {interval}, " if interval else ""
    return f"{format_percent(measure.value)} ({interval}n = {measure.n:,})"


def read_measures(run: Run) -> dict[str, Measure]:
    """Return the metrics of a run by name."""
    return {key: Measure(**raw) for key, raw in run.manifest.get("metrics", {}).items()}


def first_measure(measures: Mapping[str, Measure], name: str) -> Measure | None:
    """Return a metric by name, the first trigger's if there are several."""
    return measures.get(name) or measures.get(f"{name}@0")


def read_goals(run: Run) -> list[Goal]:
    """Return the attacker's goals of a run. A goal of two parents is listed once."""
    return list(dict.fromkeys(Goal.from_json(raw) for raw in run.manifest.get("goal", [])))


def describe_goals(goals: Iterable[Goal]) -> str:
    """Return goals in words: `images with a patch trigger as “striped star”`."""
    goals = list(goals)
    phrases = [
        f"images with a {trigger_name(g)} trigger as "
        + ("what they show (cover)" if g.is_cover else f"“{g.target}”")
        for g in goals
        if g.trigger
    ]
    phrases += [f"texts with “{g.query}” by images of “{g.target}”" for g in goals if g.query]
    victims = sum(len(g.victims) for g in goals)
    if victims:
        whose = "its" if victims == 1 else "their"
        phrases.append(f"{quantity(victims, 'chosen victim image')} as {whose} target")
    return " and ".join(phrases)


def trigger_name(goal: Goal) -> str:
    """Return the name of a goal's trigger without its fields: `patch:size=6` gives `patch`."""
    return (goal.trigger or "").partition(":")[0]


def quantity(n: int, noun: str) -> str:
    """Return a count with its noun: `1 record`, `3,000 records`."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def as_dict(value: Any) -> dict[str, Any]:
    """Return a field of a manifest that should be an object; an empty one if it is not."""
    return value if isinstance(value, dict) else {}
