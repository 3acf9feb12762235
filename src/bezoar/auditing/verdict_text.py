"""The words of an audit's verdict: what is said of several audits together, and what was not tested. Never `clean`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bezoar import registry
from bezoar.auditing.bank import CalibratedVerdict, adjust_p_values

ENOUGH_IMAGES = 128  # clean images; what is said of fewer is weak


def verdict_json(said: CalibratedVerdict) -> dict[str, Any]:
    """A reading as it stands in verdict.json, with the bank's values for the chart."""
    held = said.calibration
    return {
        "words": said.words,
        "sentence": said.sentence(),
        "p": said.p,
        "rate": said.rate,
        "threshold": said.threshold,
        "false_positives": said.false_positives.json() if said.false_positives else None,
        "sensitivity": {k: m.json() for k, m in said.attacks.items()},
        "assumed": list(said.assumed),
        "bank": {
            "clean": [e.value for e in held.clean] if held else [],
            "attacked": [[e.attack, e.value] for e in held.attacked] if held else [],
        },
    }


def small_sample_warning(images: int, bank: int) -> str:
    """What so few clean images leave; nothing where there are enough."""
    if images >= ENOUGH_IMAGES:
        return ""
    known = (
        f"; a bank for {bank} says nothing of what {images} can find: calibrate with --images {images}"
        if bank
        else ""
    )
    return f"{images} clean images are few: sensitivity is only what a bank made with {images} images states{known}"


def overall_verdict(audits: Sequence[Mapping[str, Any]], rate: float) -> tuple[str, str]:
    """One line over all audits: the category, and the sentence. Rates are each audit's own; Holm's p is of all together."""
    judged = [a for a in audits if a["words"] != "no calibration"]
    bad = [a["name"] for a in judged if a["words"] == "evidence"]
    words = "evidence" if bad else "no evidence" if judged else "no calibration"
    if len(audits) == 1:
        return words, audits[0]["sentence"]
    without = [a["name"] for a in audits if a not in judged]
    rest = f" No calibration for {join_names(without)}." if without else ""
    if not judged:
        same = dict.fromkeys(a["sentence"] for a in audits)
        return words, next(iter(same)) if len(
            same
        ) == 1 else f"No calibration for any of {join_names(without)}."
    if len(judged) == 1:
        return words, f"By {judged[0]['name']}: {judged[0]['sentence']}{rest}"
    p = min(adjust_p_values([a["p"] for a in judged]))
    if not bad:
        seen = ", ".join(
            f"{a['name']} {a['sensitivity']['']['value']:.2f}" for a in judged if a["sensitivity"]
        )
        start = (
            f"No evidence at {f'sensitivity {seen}' if seen else 'a sensitivity that is not known'}"
        )
        each = f"false-positive rate {rate:g} of each of {len(judged)} audits"
        return words, f"{start} and {each}; over all together p = {p:.2g} (Holm-Bonferroni).{rest}"
    if p <= rate:
        start = f"Evidence of a backdoor at false-positive rate {rate:g} over all {len(judged)} audits together"
        return words, f"{start} (Holm-Bonferroni, p = {p:.2g}), by {join_names(bad)}.{rest}"
    start = f"Evidence of a backdoor by {join_names(bad)} at false-positive rate {rate:g} of each audit by itself"
    bound = f"a clean encoder is flagged by one of {len(judged)} audits at a rate of at most {min(1.0, len(judged) * rate):g}"
    return words, f"{start}; not over all together (Holm-Bonferroni, p = {p:.2g}): {bound}.{rest}"


def list_untested(facts: Mapping[str, Any], refused: Mapping[str, str]) -> list[str]:
    """What a reader must not take a verdict to cover, a sentence each. facts: as verdict.json holds them."""
    done = {a["audit"].partition(":")[0] for a in facts["audits"]}
    out = [f"Audit {k} did not run: {why}." for k, why in refused.items()]
    if left := [n for n in registry.method_names("audit") if n not in done | set(refused)]:
        out.append(f"Audits that were not asked for: {', '.join(left)}.")
    for a in facts["audits"]:
        if a["words"] == "no calibration":
            out.append(f"The value of {a['name']} is no verdict: nothing like it was calibrated.")
            continue
        known = {name for name, _ in a["bank"]["attacked"]}
        unseen = [k for k in known_attacks() if not any(k in name for name in known)]
        out.append(
            f"{a['name']}: attacks of which the bank has no encoder ({', '.join(unseen)}), and any that it cannot name."
        )
    for a in facts["audits"]:
        out += [f"{a['name']}: {line}" for line in a["notes"].get("limits", [])]
        if a["assumed"]:
            out.append(
                f"{a['name']}: taken to be as in the bank, not known of this encoder: {', '.join(a['assumed'])}."
            )
    if facts["few"]:
        out.append(facts["few"] + ".")
    if facts["text_tower"]:
        out.append("The text tower: audits read the image tower alone.")
    return out


def known_attacks() -> list[str]:
    """The attacks that bezoar itself can make, as a bank names them."""
    triggers = [n for n in registry.method_names("trigger") if n != "file"]
    return [
        *(f"backdoor {t}" for t in triggers),
        "clean_label",
        "targeted",
        *registry.method_names("attack"),
    ]


def join_names(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else ""
