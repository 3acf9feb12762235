"""Look for a backdoor in an encoder, and say what the finding is worth."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from bezoar import registry
from bezoar.auditing import audits, bank, sarif, verdict_text
from bezoar.auditing.bank import Bank, Calibration, Family, Sample
from bezoar.data import randomness
from bezoar.data.files.artefacts import Facts, read_facts
from bezoar.data.files.tensors import read_tensors, write_tensors
from bezoar.data.files.writing import write_json
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UnwritableError, UserError
from bezoar.evaluation.classifiers import Classifier, make_classifier, measure_own_head
from bezoar.evaluation.scores import Measure
from bezoar.evaluation.verdict import Inversion, Verdict
from bezoar.runs import inputs
from bezoar.runs.execute import Job
from bezoar.runs.run import Run
from bezoar.runs.verb import Input, Takes, input_name
from bezoar.terminal import warn

ClassifierKind = Literal["auto", "own", "zero_shot", "linear", "mlp"]
DEFAULT_AUDITS = ("whitening", "whole_image", "decree", "cleanse")
VERDICT_FILE = "verdict.json"
INVERSIONS_FILE = "inversions.safetensors"
EXAMPLES_FILE = "examples.safetensors"
SARIF_FILE = "audit.sarif"
MIN_IMAGES = 16  # clean images; with fewer an audit is sensitive to nothing
MAX_LABELLED = 2000  # clean records that a head is fitted on
MAX_INVERSIONS = 8  # inversions that are kept, and clean images that they are shown on


@dataclass(frozen=True)
class Audit:
    """Look for a backdoor in an encoder: evidence at a stated false-positive rate, or none at a stated sensitivity.

    Thresholds come from a bank of clean encoders like it. It never says that an encoder is clean. What was audited once is
    not audited again: each audit without a bank is a run of its own.
    """

    fail_on: ClassVar[dict[str, str]] = {
        "evidence": "an audit has found evidence of a backdoor",
        "unknown": "the same, or an audit has no calibration or could not be run",
    }

    encoder: Annotated[
        Input,
        Takes("encoder", positional=True),
        "what is suspected: a run, or a network with published weights",
    ]
    data: Annotated[
        Input, Takes("data"), "clean images; without them, the test split of its training data"
    ] = None
    audit: Annotated[
        tuple[Input, ...],
        Takes("audit"),
        "see `bezoar list audit`; a parent adds the audit `parent`",
    ] = DEFAULT_AUDITS
    classifier: Annotated[ClassifierKind, "head that audits of classes use"] = "auto"
    parent: Annotated[Input, Takes("encoder"), "the encoder that it was tuned from"] = None
    bank: Annotated[
        tuple[Input, ...], Takes("bank"), "banks of clean encoders: bank.json files, calibrate runs"
    ] = ("shipped",)
    rate: Annotated[float, "false-positive rate of each audit"] = 0.05
    images: Annotated[int, "clean images that the audits use"] = 512

    def __post_init__(self) -> None:
        if self.parent is not None:
            object.__setattr__(self, "audit", with_parent_audit(self.audit))

    def work(self, job: Job) -> dict[str, Measure]:
        """Run the audits and judge their values by the banks.

        Writes verdict.json, inversions.safetensors, examples.safetensors (clean images) and audit.sarif.
        """
        if not 0 < self.rate < 1 or self.images < MIN_IMAGES:
            raise UserError(
                f"rate must be inside 0..1 and images at least {MIN_IMAGES}; got {self.rate:g} and {self.images}"
            )
        refused: dict[str, str] = {}
        if len(job.inputs["audit"]) == 1 and not job.inputs["bank"]:
            findings = self._run_single(job)
        else:
            findings, refused = self._run_each(job)
        judge_findings(findings, load_banks(job.inputs["bank"]), self.rate)
        words, sentence = verdict_text.overall_verdict(findings.audits, self.rate)
        findings.facts |= {
            "words": words,
            "sentence": sentence,
            "rate": self.rate,
            "refused": refused,
        }
        findings.facts["not_tested"] = verdict_text.list_untested(findings.facts, refused)
        findings.write(job.folder)
        name = findings.facts["encoder"]
        is_run = isinstance(job.inputs["encoder"], Run)
        artefact = f"{name}/encoder.safetensors" if is_run else name
        log = sarif.build_log(name, artefact, findings.audits, refused, sentence)
        write_json(job.folder / SARIF_FILE, log)
        job.goals = [vars(g) for g in inputs.known_goals(job.inputs["encoder"])]
        uncalibrated = [a["name"] for a in findings.audits if a["words"] == "no calibration"]
        job.notes = {
            "words": words,
            "verdict": sentence,
            "uncalibrated": uncalibrated,
            "not_tested": findings.facts["not_tested"],
            "incomplete": [f"audit {name}: {reason}" for name, reason in refused.items()],
        }
        for line in job.notes["incomplete"]:
            warn(f"audit: {line}")
        images = findings.facts["sample"]["images"]
        metrics = measure_own_accuracy(job, self.images) if job.inputs["bank"] else {}
        for audit in findings.audits:
            metrics |= audit_measures(audit, images)
        return metrics

    @staticmethod
    def fails(case: str, manifest: Mapping[str, Any]) -> bool:
        """Whether a run is to end with status 3 in a case of `fail_on`."""
        notes = manifest["notes"]
        if notes.get("words") == "evidence":
            return True
        return case == "unknown" and bool(notes.get("uncalibrated") or notes.get("incomplete"))

    def _run_each(self, job: Job) -> tuple[AuditFindings, dict[str, str]]:
        """Run every audit as a run of its own.

        Returns:
            What the audits found; and for those that refused, by name, the reason.

        Raises:
            UserError: if all refused.
        """
        parts: list[AuditFindings] = []
        refused: dict[str, str] = {}
        for audit in job.inputs["audit"]:
            verb = single_audit(
                audit,
                job.inputs["encoder"],
                job.inputs["data"],
                self.classifier,
                job.inputs["parent"],
                self.images,
            )
            try:
                parts.append(AuditFindings.read(job.run(verb)))
            except UnwritableError:
                raise
            except UserError as error:
                refused[audit_name(audit)] = str(error)
        if not parts:
            raise UserError("; ".join(dict.fromkeys(refused.values())) or "give an --audit")
        return AuditFindings.join(parts), refused

    def _run_single(self, job: Job) -> AuditFindings:
        """Run the one audit there is."""
        audit: audits.Audit = job.inputs["audit"][0]
        suspect = job.inputs["encoder"]
        data = job.inputs["data"]
        method = data if data is not None else default_clean_images(suspect)
        sample, labelled = sample_clean_records(method, self.images)
        encoder = check_auditable(inputs.load_encoder(suspect, job.device, sample.images))
        sample = sample.to(job.device)
        labelled = labelled.to(job.device)
        offered = self._offer(job, audit, encoder, labelled)
        start = time.monotonic()
        verdict: Verdict = registry.call(audit, encoder, sample, job.seed, **offered)
        seconds = time.monotonic() - start
        classifier = offered.get("classifier")
        reader = classifier
        if reader is None and verdict.inversions:
            reader = classifier_or_none(encoder, labelled, self.classifier)
        facts = {
            "schema": 1,
            "encoder": input_name(suspect),
            "family": vars(bank.encoder_family(encoder, suspect)),
            "sample": {"data": data_text(method), "images": len(sample)},
            "text_tower": encoder.text is not None,
            "audits": [audit_json(audit, verdict, classifier, seconds)],
            "inversions": [
                {"audit": audit_name(audit), **inversion_json(i, sample.images, reader)}
                for i in verdict.inversions[:MAX_INVERSIONS]
            ],
        }
        images = sample.images[:MAX_INVERSIONS].cpu().clone().contiguous()
        return AuditFindings(facts, inversion_tensors(verdict), {"images": images})

    def _offer(
        self, job: Job, audit: audits.Audit, encoder: Encoder, labelled: Pairs
    ) -> dict[str, Any]:
        """What the audit needs beside the encoder and clean images."""
        needs = registry.needs(audit)
        offered: dict[str, Any] = {"report": job.reporter(audit_name(audit))}
        if "classifier" in needs:
            offered["classifier"] = make_classifier(encoder, labelled, self.classifier)
        if "parent" in needs:
            parent = job.inputs["parent"]
            if parent is None:
                raise UserError(
                    f"audit {audit_name(audit)} needs --parent: the encoder that this one was tuned from"
                )
            offered["parent"] = check_auditable(
                inputs.load_encoder(parent, job.device), "the parent"
            )
        return offered


@dataclass
class AuditFindings:
    """What audits found in one encoder.

    Attributes:
        facts: as verdict.json holds them.
        tensors: `mask@i` (1, H, W) and `pattern@i` (3, H, W) of the i-th of the facts' `inversions`.
        examples: `images`, the first clean images.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    examples: dict[str, Tensor]

    @property
    def audits(self) -> list[dict[str, Any]]:
        """The facts of each audit."""
        audits: list[dict[str, Any]] = self.facts["audits"]
        return audits

    @staticmethod
    def read(run: Run) -> AuditFindings:
        """Read what `write` wrote into a run."""
        facts = read_findings(run)
        tensors = read_tensors(run.file(INVERSIONS_FILE))
        return AuditFindings(facts, tensors, read_tensors(run.file(EXAMPLES_FILE)))

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
        return AuditFindings(parts[0].facts | lists, tensors, parts[0].examples)

    def write(self, folder: Path) -> None:
        """Write verdict.json, inversions.safetensors and examples.safetensors."""
        write_json(folder / VERDICT_FILE, self.facts)
        write_tensors(folder / INVERSIONS_FILE, self.tensors)
        write_tensors(folder / EXAMPLES_FILE, self.examples)


def read_findings(run: Run) -> Facts:
    """What an audit run says in verdict.json, its lists of the types that they are written as. Raises UserError."""
    facts = read_facts(run.file(VERDICT_FILE))
    facts.text("encoder")
    for key in ("audits", "inversions"):
        facts.objects(key)
    return facts


def single_audit(
    audit: Any, encoder: Any, data: Any, classifier: Any, parent: Any, images: int
) -> Audit:
    """One audit without a bank.

    It is given what the audit needs and nothing else, so that it is the same question however it is asked.
    """
    needs = registry.needs(audit)
    return Audit(
        encoder,
        data,
        (audit,),
        classifier if "classifier" in needs else "auto",
        parent if "parent" in needs else None,
        (),
        0.05,
        images,
    )


def with_parent_audit(audits: Sequence[Any]) -> tuple[Any, ...]:
    """The audits, with `parent` among them."""
    names = [audit_spec(audit).partition(":")[0] for audit in audits]
    return tuple(audits) if "parent" in names else (*audits, "parent")


def sample_clean_records(method: Any, images: int) -> tuple[Pairs, Pairs]:
    """Draw clean records from data.

    They are the same whatever the seed, so that a bank's values and a suspect's differ by the encoder alone.

    Args:
        method: a configured data method, or a run.
        images: how many are audited.

    Returns:
        The records that are audited, and more records (these among them) that heads are fitted on.

    Raises:
        UserError: if there are fewer than `MIN_IMAGES`.
    """
    records = inputs.open_dataset(method).clean
    if len(records) < MIN_IMAGES:
        raise UserError(
            f"{len(records)} clean images; an audit takes {MIN_IMAGES} and more, with fewer it is sensitive to nothing"
        )
    rows = randomness.sample_rows(list(records.ids), max(images, MAX_LABELLED), 0)
    labelled = inputs.in_memory(records.take(rows))
    return labelled.take(range(min(images, len(labelled)))), labelled


def default_clean_images(encoder: Any) -> Any:
    """The test split of what a run's encoder was trained on, as a configured data method."""
    if not isinstance(encoder, Run):
        raise UserError("name clean images (--data): what this encoder was trained on is not known")
    return inputs.test_split(inputs.root_method(encoder.ancestor("train") or encoder))


def check_auditable(encoder: Encoder, what: str = "the encoder") -> Encoder:
    """Return the encoder. Raises UserError for one without an image tower, or with weights that are not finite."""
    if getattr(encoder, "image", None) is None:
        raise UserError(f"{what} reads no images; audits look at image towers")
    bad_weights = [
        name
        for name, weights in encoder.state_dict().items()
        if weights.is_floating_point() and not torch.isfinite(weights).all()
    ]
    if bad_weights:
        raise UserError(
            f"{what} has NaN or infinite weights ({bad_weights[0]}, {len(bad_weights)} tensors); "
            "nothing can be said of it"
        )
    return encoder


def classifier_or_none(encoder: Encoder, labelled: Pairs, kind: Any) -> Classifier | None:
    """A classifier that says what an inverted trigger turns images into; None where it cannot be had."""
    try:
        return make_classifier(encoder, labelled, kind)
    except UserError:
        return None


def measure_own_accuracy(job: Job, images: int) -> dict[str, Measure]:
    """Accuracy of the suspect's own head on the clean images, where it has a head and they have labels.

    A warning that belongs to it is printed and noted.
    """
    suspect, data = job.inputs["encoder"], job.inputs["data"]
    method = data if data is not None else default_clean_images(suspect)
    sample, _ = sample_clean_records(method, images)
    encoder = inputs.load_encoder(suspect, job.device, sample.images)
    accuracy, warning = measure_own_head(encoder, sample)
    job.notes["weights"] = inputs.describe_weights(encoder)
    job.notes["own_head"] = warning
    if warning:
        warn(f"audit: {warning}")
    return {} if accuracy is None else {"own.clean_accuracy": accuracy}


def load_banks(sources: Sequence[Any]) -> list[Bank]:
    """Load the banks of calibrate runs and of configured bank methods."""
    banks: list[Bank] = []
    for source in sources:
        banks += [Bank.read(source.file(bank.FILE))] if isinstance(source, Run) else source()
    return banks


def judge_findings(findings: AuditFindings, banks: Sequence[Bank], rate: float) -> None:
    """Judge each audit's value by the banks, and add what they say to the facts."""
    facts = findings.facts
    family = Family(**facts["family"])
    sample = Sample(**facts["sample"])
    for audit in findings.audits:
        calibration = Calibration(audit["audit"], audit["code"], audit["classifier"])
        verdict = bank.judge_value(
            banks, family, sample, calibration, audit["value"], rate, facts["encoder"]
        )
        audit |= verdict_text.verdict_json(verdict)
    larger = [b.sample.images for b in banks if sample.images < b.sample.images]
    facts["few"] = verdict_text.small_sample_warning(sample.images, min(larger, default=0))


def audit_json(
    audit: audits.Audit, verdict: Verdict, classifier: Classifier | None, seconds: float
) -> dict[str, Any]:
    """An audit and its value as they stand in verdict.json."""
    module_doc = sys.modules[type(audit).__module__].__doc__ or ""
    return {
        "audit": registry.spec(audit),
        "name": audit_name(audit),
        "summary": module_doc.partition("\n")[0],
        "code": bank.code_hash(type(audit)),
        "classifier": classifier.how if classifier is not None else "",
        "value": verdict.value,
        "seconds": round(seconds, 2),
        "evidence": {name: measure.json() for name, measure in verdict.evidence.items()},
        "notes": verdict.notes,
    }


def inversion_json(
    inversion: Inversion, images: Tensor, classifier: Classifier | None
) -> dict[str, Any]:
    """An inverted trigger as it stands in verdict.json: what it does to clean images, as a classifier reads them.

    Args:
        inversion: the trigger.
        images: uint8 (N, 3, H, W), clean; the first few are listed one by one.
        classifier: None where none can be had.
    """
    facts: dict[str, Any] = {
        "target": inversion.target,
        "norm": inversion.norm,
        "success": inversion.success,
    }
    if classifier is None:
        return facts
    before = classifier.predict(images).tolist()
    after = classifier.predict(inversion(images)).tolist()
    names = classifier.classes
    n = len(images)
    return facts | {
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


def audit_measures(audit: Mapping[str, Any], images: int) -> dict[str, Measure]:
    """The metrics of an audit, under its name. images: how many clean images it looked at."""
    how = f"{audit['audit']} on clean images; higher = more suspicious, counted"
    measures = {"value": Measure.exact(audit["value"], images, how)}
    measures["seconds"] = Measure.exact(
        audit["seconds"], 1, "wall-clock seconds of the audit, counted"
    )
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
    for name, raw in audit["evidence"].items():
        measures.setdefault(name, Measure(**raw))
    return {f"{audit['name']}.{name}": measure for name, measure in measures.items()}


def audit_spec(audit: Any) -> str:
    """The spec of an audit, which may be a spec already."""
    return audit if isinstance(audit, str) else registry.spec(audit)


def audit_name(audit: audits.Audit) -> str:
    """The name of an audit; for a user's own file its stem."""
    return Path(registry.method_name(type(audit))).stem


def data_text(method: Any) -> str:
    """The spec of clean images in the form that banks compare."""
    return bank.comparable_data_spec(registry.spec(inputs.open_dataset(method).method))
