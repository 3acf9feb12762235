"""The text of a verdict: of several audits together, and of what was not tested."""

from collections.abc import Mapping, Sequence
from typing import Any

from bezoar import registry
from bezoar.auditing.bank import CalibratedVerdict, Outcome, adjust_p_values
from bezoar.auditing.unaided_verdict import Grade

ENOUGH_IMAGES = 128  # clean images; a verdict on fewer is weak
Words = Outcome | Grade
GRADES: tuple[Grade, ...] = ("strong evidence", "some evidence", "could not tell", "none found")
# Words that --fail-on evidence fails on.
EVIDENCE = ("evidence", "strong evidence", "some evidence")
UNKNOWN = ("no calibration", "could not tell")
# What an audit that gives a verdict without a bank does not see.
NOT_SEEN = {
    "cleanse": "triggers that are spread over the image, and backdoors of many classes at once",
    "decree": "triggers that are spread over the image, and backdoors of many classes at once",
    "image_change": "patches, pictures and noise, and backdoors of many classes at once",
    "token_sweep": "backdoors of an image tower",
}


def verdict_json(verdict: CalibratedVerdict) -> dict[str, Any]:
    """A verdict as it stands in verdict.json, with the bank's values for the chart."""
    false_positives, calibration = verdict.false_positive_rate, verdict.calibration
    return {
        "words": verdict.outcome,
        "sentence": verdict.sentence(),
        "p": verdict.p_value,
        "rate": verdict.rate,
        "threshold": verdict.threshold,
        "false_positives": false_positives.json() if false_positives else None,
        "sensitivity": {attack: m.json() for attack, m in verdict.sensitivities.items()},
        "assumed": list(verdict.assumptions),
        "bank": {
            "clean": [e.value for e in calibration.clean] if calibration else [],
            "attacked": [[e.attack, e.value] for e in calibration.attacked] if calibration else [],
        },
    }


def small_sample_warning(images: int, bank_images: int) -> str:
    """What a small number of clean images means; "" where there are enough.

    bank_images: those of a bank that was made with more, or 0.
    """
    if images >= ENOUGH_IMAGES:
        return ""
    warning = (
        f"{images} clean images are few: sensitivity is only what a bank made with {images} images "
        "states"
    )
    if bank_images:
        warning += (
            f"; a bank for {bank_images} says nothing of what {images} can find: "
            f"calibrate with --images {images}"
        )
    return warning


def overall_verdict(audits: Sequence[Mapping[str, Any]], rate: float) -> tuple[Words, str]:
    """The outcome of all audits together, and the sentence that says so.

    A bank's verdict stands before those that an audit gives without one, but for evidence. Some
    evidence of a direction alone counts where the search for classes could not tell.

    Args:
        audits: as they stand in verdict.json.
        rate: the false-positive rate of each audit; Holm's p-value is of all together.
    """
    by_bank, sentence = _bank_verdict(audits, rate)
    judged = [a for a in audits if a.get("unaided") and a["words"] == "no calibration"]
    unaided = [a["unaided"] for a in judged if not is_weak_alone(a, judged)]
    if by_bank == "evidence" or not unaided:
        return by_bank, sentence
    most = min(unaided, key=lambda u: (GRADES.index(u["grade"]), -u["statistic"]))
    if by_bank == "no calibration":
        return most["grade"], most["sentence"]
    if most["grade"] in EVIDENCE:
        return most["grade"], f"{most['sentence']} By banks: {sentence}"
    return by_bank, f"{sentence} Without a bank: {most['sentence']}"


def is_weak_alone(audit: Mapping[str, Any], audits: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an audit has some evidence of a direction alone, where classes could be compared.

    A clean encoder gets as much now and then, and a comparison of classes tells more.
    """
    if audit["unaided"]["grade"] != "some evidence" or audit["notes"]["unaided"] != "direction":
        return False
    of_classes = [a["unaided"]["grade"] for a in audits if a["notes"]["unaided"] is True]
    return any(grade != "could not tell" for grade in of_classes)


def _bank_verdict(audits: Sequence[Mapping[str, Any]], rate: float) -> tuple[Outcome, str]:
    """What banks say of all audits together; arguments as of `overall_verdict`."""
    calibrated = [a for a in audits if a["words"] != "no calibration"]
    flagging = [a["name"] for a in calibrated if a["words"] == "evidence"]
    outcome: Outcome = "evidence" if flagging else "no evidence" if calibrated else "no calibration"
    if len(audits) == 1:
        return outcome, audits[0]["sentence"]
    uncalibrated = [a["name"] for a in audits if a not in calibrated]
    if not calibrated:
        sentences = {a["sentence"] for a in audits}
        if len(sentences) == 1:
            return outcome, sentences.pop()
        return outcome, f"No calibration for any of {join_names(uncalibrated)}."
    rest = f" No calibration for {join_names(uncalibrated)}." if uncalibrated else ""
    if len(calibrated) == 1:
        return outcome, f"By {calibrated[0]['name']}: {calibrated[0]['sentence']}{rest}"
    sentence = (
        _evidence_sentence(calibrated, flagging, rate)
        if flagging
        else _no_evidence_sentence(calibrated, rate)
    )
    return outcome, sentence + rest


def _no_evidence_sentence(calibrated: Sequence[Mapping[str, Any]], rate: float) -> str:
    """Of two audits or more, none of which has evidence."""
    p = min(adjust_p_values([a["p"] for a in calibrated]))
    sensitivities = ", ".join(
        f"{a['name']} {a['sensitivity']['']['value']:.2f}" for a in calibrated if a["sensitivity"]
    )
    sensitivity = (
        f"sensitivity {sensitivities}" if sensitivities else "a sensitivity that is not known"
    )
    return (
        f"No evidence at {sensitivity} and false-positive rate {rate:g} of each of "
        f"{len(calibrated)} audits; over all together p = {p:.2g} (Holm-Bonferroni)."
    )


def _evidence_sentence(
    calibrated: Sequence[Mapping[str, Any]], flagging: Sequence[str], rate: float
) -> str:
    """Of two audits or more, some of which have evidence. flagging: their names."""
    n = len(calibrated)
    p = min(adjust_p_values([a["p"] for a in calibrated]))
    if p <= rate:
        return (
            f"Evidence of a backdoor at false-positive rate {rate:g} over all {n} audits together "
            f"(Holm-Bonferroni, p = {p:.2g}), by {join_names(flagging)}."
        )
    return (
        f"Evidence of a backdoor by {join_names(flagging)} at false-positive rate {rate:g} of each "
        f"audit by itself; not over all together (Holm-Bonferroni, p = {p:.2g}): a clean encoder "
        f"is flagged by one of {n} audits at a rate of at most {min(1.0, n * rate):g}."
    )


def list_untested(facts: Mapping[str, Any], refused: Mapping[str, str]) -> list[str]:
    """What a reader must not take a verdict to cover, a sentence each.

    Args:
        facts: as verdict.json holds them.
        refused: audit -> why it did not run.
    """
    audits = facts["audits"]
    lines = [f"Audit {name} did not run: {reason}." for name, reason in refused.items()]
    run = {a["audit"].partition(":")[0] for a in audits}
    if others := [n for n in registry.method_names("audit") if n not in run | set(refused)]:
        lines.append(f"Audits that were not asked for: {', '.join(others)}.")
    lines += [_uncovered_attacks(a) for a in audits]
    for a in audits:
        lines += [f"{a['name']}: {limit}" for limit in a["notes"].get("limits", [])]
        if a["assumed"]:
            lines.append(
                f"{a['name']}: taken to be as in the bank, not known of this encoder: "
                f"{', '.join(a['assumed'])}."
            )
    if facts["few"]:
        lines.append(facts["few"] + ".")
    if facts["text_tower"] and "token_sweep" not in run:
        lines.append("The text tower: audits read the image tower alone.")
    return lines


def _uncovered_attacks(audit: Mapping[str, Any]) -> str:
    """Which attacks an audit's bank has no encoder of."""
    if audit["words"] == "no calibration":
        if audit.get("unaided"):
            method = audit["audit"].partition(":")[0]
            return f"{audit['name']}: {NOT_SEEN.get(method, NOT_SEEN['cleanse'])}."
        return f"The value of {audit['name']} is no verdict: nothing like it was calibrated."
    names = {name for name, _ in audit["bank"]["attacked"]}
    missing = [attack for attack in known_attacks() if not any(attack in name for name in names)]
    return (
        f"{audit['name']}: attacks of which the bank has no encoder ({', '.join(missing)}), and "
        "any that it cannot name."
    )


def known_attacks() -> list[str]:
    """The attacks that bezoar itself can make, as a bank names them."""
    triggers = [name for name in registry.method_names("trigger") if name != "file"]
    backdoors = [f"backdoor {trigger}" for trigger in triggers]
    return [*backdoors, "clean_label", "targeted", *registry.method_names("attack")]


def join_names(names: Sequence[str]) -> str:
    """`a, b and c`."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
