"""SARIF 2.1.0 (OASIS 2020): what an audit found, as tools for code scanning read it. One rule an audit, one result a rule.

Evidence has the level `error`; everything else has `note`, never `none` or a kind `pass`: an audit passes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
VERSION = "2.1.0"


def build_log(
    encoder: str,
    artefact: str,
    audits: Sequence[Mapping[str, Any]],
    refused: Mapping[str, str],
    overall: str,
) -> dict:
    """A log of one run, as JSON holds it.

    encoder: its name. artefact: where its weights are, relative, or a name. audits: as they stand in verdict.json. refused:
    audit -> why it did not run. overall: the verdict of all together.
    """
    names = [rule_id(a["audit"]) for a in audits]
    rules = [
        {
            "id": name,
            "name": name.rpartition("/")[2].title().replace("_", ""),
            "shortDescription": {"text": a["summary"] or name},
            "help": {
                "text": "Evidence is a value above a quantile of encoders known to be clean; see the run's report.html."
            },
            "defaultConfiguration": {"level": "error"},
            "properties": {"audit": a["audit"], "tags": ["security", "backdoor"]},
        }
        for name, a in zip(names, audits, strict=True)
    ]
    location = {"physicalLocation": {"artifactLocation": {"uri": quote(artefact)}}}
    results = [
        {
            "ruleId": name,
            "ruleIndex": i,
            "level": "error" if a["words"] == "evidence" else "note",
            "message": {"text": f"{encoder}: {a['sentence']}"},
            "locations": [location],
            "partialFingerprints": {"bezoar/encoder/v1": f"{encoder}:{a['audit']}"},
            "properties": {k: a[k] for k in ("words", "value", "p", "threshold", "rate")},
        }
        for i, (name, a) in enumerate(zip(names, audits, strict=True))
    ]
    troubles = [
        {"level": "warning", "message": {"text": f"{name} did not run: {why}"}}
        for name, why in refused.items()
    ]
    invocation = {"executionSuccessful": not refused, "toolExecutionNotifications": troubles}
    driver = {"name": "bezoar", "semanticVersion": version("bezoar"), "rules": rules}
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "results": results,
        "properties": {"verdict": overall},
    }
    return {"$schema": SCHEMA, "version": VERSION, "runs": [run]}


def rule_id(audit: str) -> str:
    """`decree:steps=3` -> `audit/decree`; of a user's own file its stem."""
    return "audit/" + audit.partition(":")[0].rpartition("/")[2].removesuffix(".py")
