"""What audits found in one encoder: facts, inverted triggers, and the files that hold them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bezoar import registry
from bezoar.auditing import bank
from bezoar.data.files.artefacts import Facts, read_facts
from bezoar.data.files.tensors import read_tensors, write_tensors
from bezoar.data.files.writing import write_json
from bezoar.evaluation.classifiers import Classifier
from bezoar.evaluation.scores import Measure, proportion
from bezoar.evaluation.verdict import Inversion, Verdict
from bezoar.method_source import first_paragraph

VERDICT_FILE = "verdict.json"
INVERSIONS_FILE = "inversions.safetensors"
EXAMPLES_FILE = "examples.safetensors"
GRADE_NUMBERS = {"could not tell": -1, "none found": 0, "some evidence": 1, "strong evidence": 2}
MAX_INVERSIONS = 8  # inversions that are kept, and clean images that they are shown on
LARGE = 64  # pixels; an encoder that reads more has its triggers tried on fewer images
LARGE_IMAGES = 64


@dataclass
class AuditFindings:
    """What audits found in one encoder."""

    facts: dict[str, Any]  # as verdict.json holds them
    # `mask@i` (1, H, W) and `pattern@i` (3, H, W) of the i-th of the facts' `inversions`
    tensors: dict[str, Tensor]
    examples: dict[str, Tensor]  # `images`, the first clean images
    # that each audit took, by its name. They stand in the manifest alone: equal audits write equal
    # files.
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def audits(self) -> list[dict[str, Any]]:
        """The facts of each audit."""
        audits: list[dict[str, Any]] = self.facts["audits"]
        return audits

    @staticmethod
    def read(folder: Path) -> AuditFindings:
        """Read what `write` wrote. Raises UserError for anything else."""
        facts = read_facts_of(folder / VERDICT_FILE)
        tensors = read_tensors(folder / INVERSIONS_FILE)
        return AuditFindings(facts, tensors, read_tensors(folder / EXAMPLES_FILE))

    @staticmethod
    def join(parts: Sequence[AuditFindings]) -> AuditFindings:
        """Put audits of one encoder side by side."""
        tensors: dict[str, Tensor] = {}
        for part in parts:
            first = len(tensors) // 2  # each inversion has a mask and a pattern
            for key, tensor in part.tensors.items():
                kind, _, number = key.partition("@")
                tensors[f"{kind}@{first + int(number)}"] = tensor
        lists = {
            key: [item for part in parts for item in part.facts[key]]
            for key in ("audits", "inversions")
        }
        seconds = {name: took for part in parts for name, took in part.seconds.items()}
        return AuditFindings(parts[0].facts | lists, tensors, parts[0].examples, seconds)

    def try_on_reference(self, reference: Classifier, images: Tensor, name: str) -> list[str]:
        """Add what the inverted triggers do to another encoder, and say it where a verdict stands.

        A trigger that leads to a class by nature often leads other encoders there too; a backdoor's
        moves the one encoder that learnt it.

        Args:
            reference: the other encoder, with a head of the same classes.
            images: uint8 (N, 3, H, W), clean.

        Returns:
            For each audit whose target the reference does not know, a remark.
        """
        images = images_to_read(images, reference)
        before = reference.predict(images).tolist()
        unknown = []
        for i, facts in enumerate(self.facts["inversions"]):
            if facts["target"] not in reference.classes:
                continue
            mask, pattern = (
                self.tensors[f"{part}@{i}"].to(images.device) for part in ("mask", "pattern")
            )
            trigger = Inversion(mask, pattern, facts["target"], facts["norm"], facts["success"])
            number = reference.classes.index(facts["target"])
            after = reference.predict(trigger(images)).tolist()
            facts["reference"] = [rows.count(number) / len(images) for rows in (after, before)]
        for audit in self.audits:
            if not (target := audit["notes"].get("target")):
                continue
            shares = [
                f.get("reference")
                for f in self.facts["inversions"]
                if (f["audit"], f["target"]) == (audit["name"], target)
            ]
            if not shares:
                continue  # the audit inverts no trigger
            if shares[0]:
                describe_reference(audit, shares[0], len(images), name)
            else:
                unknown.append(f"{audit['name']}: the reference {name} knows no class {target!r}")
        return unknown

    def write(self, folder: Path) -> None:
        """Write verdict.json, inversions.safetensors and examples.safetensors."""
        write_json(folder / VERDICT_FILE, self.facts)
        write_tensors(folder / INVERSIONS_FILE, self.tensors)
        write_tensors(folder / EXAMPLES_FILE, self.examples)


def read_facts_of(path: Path) -> Facts:
    """Read a verdict.json, its lists of the types that they are written as. Raises UserError."""
    facts = read_facts(path)
    facts.text("encoder")
    for key in ("audits", "inversions"):
        facts.objects(key)
    return facts


def audit_json(audit: Any, verdict: Verdict, classifier: Classifier | None) -> dict[str, Any]:
    """An audit and its value as they stand in verdict.json."""
    return {
        "audit": registry.spec(audit),
        "name": audit_name(audit),
        "summary": first_paragraph(sys.modules[type(audit).__module__].__doc__),
        "code": bank.code_hash(type(audit)),
        "classifier": classifier.how if classifier is not None else "",
        "value": verdict.value,
        "evidence": {name: measure.json() for name, measure in verdict.evidence.items()},
        "notes": verdict.notes,
    }


def list_inversions(
    inversions: Sequence[Inversion], images: Tensor, classifier: Classifier | None
) -> list[dict[str, Any]]:
    """Inverted triggers as they stand in verdict.json: what they do to clean images, as a
    classifier reads them.

    Args:
        images: uint8 (N, 3, H, W), clean; the first few are listed one by one. Of a large encoder
            only `LARGE_IMAGES` are read.
        classifier: None where none can be had.
    """
    if classifier is None:
        return [_describe_trigger(inversion) for inversion in inversions]
    images = images_to_read(images, classifier)
    before = classifier.predict(images).tolist() if inversions else []
    return [_describe_effect(inversion, images, before, classifier) for inversion in inversions]


def images_to_read(images: Tensor, classifier: Classifier) -> Tensor:
    """The clean images that triggers are tried on: of an encoder of large images, the first few."""
    return images[:LARGE_IMAGES] if classifier.encoder.preprocess.size > LARGE else images


def describe_reference(
    audit: dict[str, Any], shares: Sequence[float], images: int, name: str
) -> None:
    """Add to an audit's facts what its least trigger does to the reference, with it and without."""
    target, (after, before) = audit["notes"]["target"], shares
    audit["evidence"]["reference_success"] = proportion(
        round(after * images), images, f"triggered images that {name} reads as {target!r}"
    ).json()
    sentence = (
        f"The reference {name} reads {after:.0%} of the images with this trigger as {target!r}, "
        f"{before:.0%} without it: a natural feature often moves both encoders, a backdoor only "
        "one."
    )
    audit["reference"] = sentence


def _describe_trigger(inversion: Inversion) -> dict[str, Any]:
    return {"target": inversion.target, "norm": inversion.norm, "success": inversion.success}


def _describe_effect(
    inversion: Inversion, images: Tensor, before: Sequence[int], classifier: Classifier
) -> dict[str, Any]:
    after = classifier.predict(inversion(images)).tolist()
    names = classifier.classes
    n = len(images)
    return _describe_trigger(inversion) | {
        "before": [names[c] for c in before[:MAX_INVERSIONS]],
        "after": [names[c] for c in after[:MAX_INVERSIONS]],
        "turns_into": [
            [names[c], count / n, before.count(c) / n] for c, count in Counter(after).most_common(3)
        ],
        "reader": classifier.how,
    }


def inversion_tensors(verdict: Verdict) -> dict[str, Tensor]:
    """Masks and patterns of the first inversions."""
    tensors: dict[str, Tensor] = {}
    for name in ("mask", "pattern"):
        for i, inversion in enumerate(verdict.inversions[:MAX_INVERSIONS]):
            tensor: Tensor = getattr(inversion, name)
            tensors[f"{name}@{i}"] = tensor.float().cpu().clone().contiguous()
    return tensors


def audit_measures(
    audit: Mapping[str, Any], images: int, seconds: float | None
) -> dict[str, Measure]:
    """The metrics of an audit, under its name.

    Args:
        audit: its facts.
        images: how many clean images it looked at.
        seconds: that it took; None where that is not known.
    """
    how = f"{audit['audit']} on clean images; higher = more suspicious, counted"
    measures = {"value": Measure.exact(audit["value"], images, how)}
    if seconds is not None:
        measures["seconds"] = Measure.exact(seconds, 1, "wall-clock seconds of the audit, counted")
    if audit["p"] is not None:
        measures["p_value"] = Measure.exact(
            audit["p"],
            len(audit["bank"]["clean"]),
            "(1 + clean encoders at or above the value) / (clean encoders + 1), counted",
        )
    if audit["false_positives"]:
        measures["false_positive_rate"] = Measure(**audit["false_positives"])
    if audit["sensitivity"]:
        measures["sensitivity"] = Measure(**audit["sensitivity"][""])
    if unaided := audit.get("unaided"):
        how = f"of {audit['audit']} without a bank; {unaided['sentence']}"
        measures["statistic"] = Measure.exact(unaided["statistic"], images, how)
        measures["grade"] = Measure.exact(GRADE_NUMBERS[unaided["grade"]], images, how)
    for name, raw in audit["evidence"].items():
        measures.setdefault(name, Measure(**raw))
    return {f"{audit['name']}.{name}": measure for name, measure in measures.items()}


def audit_name(audit: Any) -> str:
    """The name of an audit; for a user's own file its stem."""
    return Path(registry.method_name(type(audit))).stem
