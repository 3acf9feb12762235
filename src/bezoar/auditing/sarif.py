"""SARIF 2.1.0 (OASIS 2020): an audit's findings in the format of code-scanning tools.

One rule an audit, one result a rule.

Evidence has the level `error`, some evidence `warning`; everything else has `note`, never `none` or
a kind `pass`: no audit shows an encoder clean.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bezoar.evaluation import sarif_log

LEVELS = {"strong evidence": "error", "some evidence": "warning"}  # without a bank
HELP = (
    "Evidence is a class that stands apart from the encoder's others, or a value above a quantile "
    "of encoders known to be clean; see the run's report.html."
)


def build_log(
    encoder: str,
    artefact: str,
    audits: Sequence[Mapping[str, Any]],
    refused: Mapping[str, str],
    overall: str,
) -> dict[str, Any]:
    """The log of one run, as JSON.

    Args:
        artefact: where its weights are, relative, or a name.
        audits: as they stand in verdict.json.
        refused: audit -> why it did not run.
        overall: the verdict of all audits together, a sentence.
    """
    location = sarif_log.locate(artefact)
    return sarif_log.build_log(
        [build_rule(audit) for audit in audits],
        [build_result(i, audit, encoder, location) for i, audit in enumerate(audits)],
        [f"{name} did not run: {reason}" for name, reason in refused.items()],
        overall,
    )


def build_rule(audit: Mapping[str, Any]) -> dict[str, Any]:
    """The rule of an audit."""
    name = rule_id(audit["audit"])
    return {
        "id": name,
        "name": name.rpartition("/")[2].title().replace("_", ""),
        "shortDescription": {"text": audit["summary"] or name},
        "help": {"text": HELP},
        "defaultConfiguration": {"level": "error"},
        "properties": {"audit": audit["audit"], "tags": ["security", "backdoor"]},
    }


def build_result(
    index: int, audit: Mapping[str, Any], encoder: str, location: Mapping[str, Any]
) -> dict[str, Any]:
    """What an audit says of an encoder. index: of the audit's rule."""
    unaided = audit.get("unaided") or {}
    sentence = f"{audit['sentence']} {unaided.get('sentence', '')}".strip()
    if audit["words"] == "no calibration":
        level = LEVELS.get(unaided.get("grade", ""), "note")
    else:
        level = "error" if audit["words"] == "evidence" else "note"
    return {
        "ruleId": rule_id(audit["audit"]),
        "ruleIndex": index,
        "level": level,
        "message": {"text": f"{encoder}: {sentence}"},
        "locations": [location],
        "partialFingerprints": {"bezoar/encoder/v1": f"{encoder}:{audit['audit']}"},
        "properties": {k: audit[k] for k in ("words", "value", "p", "threshold", "rate")},
    }


def rule_id(audit: str) -> str:
    """`decree:steps=3` -> `audit/decree`; of a user's own file its stem."""
    return "audit/" + audit.partition(":")[0].rpartition("/")[2].removesuffix(".py")
