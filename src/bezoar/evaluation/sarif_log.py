"""SARIF 2.1.0 (OASIS 2020), the log format of code-scanning tools, for the results of a run."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
VERSION = "2.1.0"


def build_log(
    rules: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    warnings: Sequence[str],
    verdict: str,
) -> dict[str, Any]:
    """The log of one run, as JSON. warnings: parts of the question that could not be answered."""
    driver = {"name": "bezoar", "semanticVersion": version("bezoar"), "rules": list(rules)}
    notes = [{"level": "warning", "message": {"text": text}} for text in warnings]
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": not warnings, "toolExecutionNotifications": notes}],
        "results": list(results),
        "properties": {"verdict": verdict},
    }
    return {"$schema": SCHEMA, "version": VERSION, "runs": [run]}


def locate(artefact: str) -> dict[str, Any]:
    """The location of a result: a file, relative or whole, or a name."""
    return {"physicalLocation": {"artifactLocation": {"uri": quote(artefact)}}}
