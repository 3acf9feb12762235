"""Look for a backdoor in an encoder, and say what the finding is worth."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from bezoar import registry
from bezoar.auditing import audits, bank, forecast, sarif, unaided_verdict, verdict_text
from bezoar.auditing.bank import Bank, Calibration, Family, Sample
from bezoar.auditing.findings import (
    MAX_INVERSIONS,
    VERDICT_FILE,
    AuditFindings,
    audit_json,
    audit_measures,
    audit_name,
    inversion_tensors,
    list_inversions,
    read_facts_of,
)
from bezoar.data import randomness
from bezoar.data.files.artefacts import Facts
from bezoar.data.files.writing import write_json
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UnwritableError, UserError
from bezoar.evaluation.classifiers import (
    CLUSTERS,
    Classifier,
    ClassifierKind,
    make_classifier,
    measure_own_head,
)
from bezoar.evaluation.scores import Measure
from bezoar.evaluation.verdict import Verdict
from bezoar.runs import inputs
from bezoar.runs.execute import Job
from bezoar.runs.run import Run
from bezoar.runs.verb import Input, Takes, input_name, input_spec
from bezoar.terminal import warn

DEFAULT_AUDITS = ("whitening", "whole_image", "decree", "cleanse", "image_change")
TEXT_AUDITS = ("token_sweep",)  # where the clean records are texts
SARIF_FILE = "audit.sarif"
MIN_IMAGES = 16  # clean images; with fewer an audit is sensitive to nothing
MAX_LABELLED = 2000  # clean records that a head is fitted on


@dataclass(frozen=True)
class Audit:
    """Look for a backdoor in an encoder: strong evidence, some evidence, or none found at a stated
    sensitivity.

    By itself, an encoder is judged by whether one of its classes stands apart from the others; a
    bank of clean encoders like it sets thresholds at a false-positive rate. It never says that an
    encoder is clean. What was audited once is not audited again: each audit without a bank is a run
    of its own.
    """

    fail_on: ClassVar[dict[str, str]] = {
        "evidence": "there is strong or some evidence of a backdoor"
    }
    main_files: ClassVar[tuple[str, ...]] = ("verdict.json", "audit.sarif")

    encoder: Annotated[
        Input,
        Takes("encoder", positional=True),
        "what is suspected: a file or folder of weights, a name of the Hugging Face hub "
        "(hf-hub:...), or a run",
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
    reference: Annotated[
        Input,
        Takes("encoder"),
        "another encoder of the same classes: is it moved by what is found in this one?",
    ] = None

    def __post_init__(self) -> None:
        if self.parent is not None:
            object.__setattr__(self, "audit", with_parent_audit(self.audit))

    @property
    def title(self) -> str:
        """What stands before its progress, with the audit's name where there are several."""
        return (
            f"audit {input_spec(self.audit[0]).partition(':')[0]}"
            if len(self.audit) == 1
            else "audit"
        )

    def work(self, job: Job) -> dict[str, Measure]:
        """Run the audits and judge their values by the banks.

        Writes verdict.json, inversions.safetensors, examples.safetensors (clean images) and
        audit.sarif.
        """
        if not 0 < self.rate < 1 or self.images < MIN_IMAGES:
            raise UserError(
                f"rate must be inside 0..1 and images at least {MIN_IMAGES}; got {self.rate:g} and "
                f"{self.images}"
            )
        refused: dict[str, str] = {}
        banks = load_banks(job.inputs["bank"])
        job.inputs["audit"] = self._fitting_audits(job)
        reference = job.inputs["reference"]
        if len(job.inputs["audit"]) == 1 and not job.inputs["bank"] and reference is None:
            findings = self._run_single(job)
        else:
            self._announce(job, banks)
            findings, refused = self._run_each(job)
        judge_findings(findings, banks, self.rate)
        if reference is not None:
            self._try_on_reference(job, findings)
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
            metrics |= audit_measures(audit, images, findings.seconds.get(audit["name"]))
        return metrics

    @staticmethod
    def fails(case: str, manifest: Mapping[str, Any]) -> bool:
        """Whether a run is to end with status 3 in a case of `fail_on`."""
        return manifest["notes"].get("words") in verdict_text.EVIDENCE

    @staticmethod
    def undecided(manifest: Mapping[str, Any]) -> list[str]:
        """Why it could not be told whether there is a backdoor; empty where it could."""
        notes = manifest["notes"]
        unknown = notes.get("words") in verdict_text.UNKNOWN
        why = notes.get("verdict", "").removeprefix("Could not tell: ")
        return [why] * unknown + list(notes.get("incomplete") or [])

    def _fitting_audits(self, job: Job) -> tuple[Any, ...]:
        """The audits of the command; for texts, theirs in the place of the default ones."""
        data = job.inputs["data"]
        if self.audit != DEFAULT_AUDITS or data is None or inputs.open_dataset(data).clean.size:
            audits: tuple[Any, ...] = job.inputs["audit"]
            return audits
        return tuple(registry.make("audit", name) for name in TEXT_AUDITS)

    def _announce(self, job: Job, banks: Sequence[Bank]) -> None:
        """Say on stderr what the verdict can be, and how long it will take; not where `--quiet`."""
        if job.settings.quiet:
            return
        suspect, audits = job.inputs["encoder"], job.inputs["audit"]
        method = clean_images(job.inputs["data"], suspect)
        sample, labelled = sample_clean_records(method, self.images)
        encoder = check_auditable(inputs.load_encoder(suspect, job.device, sample))
        classes = len(encoder.about.get("classes") or labelled.classes) or CLUSTERS
        family = bank.encoder_family(encoder, suspect)
        clean = Sample(data_text(method), len(sample))
        seconds, cost = forecast.estimate_seconds(audits, encoder, sample, classes)
        for line in forecast.forecast_audits(
            audits, banks, family, clean, self.rate, seconds, classes, cost
        ):
            warn(f"audit: {line}")

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
                run, name = job.run(verb), audit_name(audit)
                findings, seconds = AuditFindings.read(run.path), audit_seconds(run, name)
                parts.append(dataclasses.replace(findings, seconds=seconds))
            except UnwritableError:
                raise
            except UserError as error:
                refused[audit_name(audit)] = str(error)
        if not parts:
            raise UserError("; ".join(dict.fromkeys(refused.values())) or "give an --audit")
        return AuditFindings.join(parts), refused

    def _try_on_reference(self, job: Job, findings: AuditFindings) -> None:
        """Note what the inverted triggers do to the reference encoder."""
        method = clean_images(job.inputs["data"], job.inputs["encoder"])
        sample, labelled = sample_clean_records(method, self.images)
        reference = inputs.load_encoder(job.inputs["reference"], job.device, sample)
        check_auditable(reference, "the reference")
        classifier = make_audit_classifier(reference, labelled.to(job.device), self.classifier)
        name = input_name(job.inputs["reference"])
        for line in findings.try_on_reference(classifier, sample.images.to(job.device), name):
            warn(f"audit: {line}")

    def _run_single(self, job: Job) -> AuditFindings:
        """Run the one audit there is."""
        audit: audits.Audit = job.inputs["audit"][0]
        suspect = job.inputs["encoder"]
        method = clean_images(job.inputs["data"], suspect)
        sample, labelled = sample_clean_records(method, self.images)
        encoder = check_auditable(inputs.load_encoder(suspect, job.device, sample))
        sample = sample.to(job.device)
        labelled = labelled.to(job.device)
        offered = self._offer(job, audit, encoder, labelled)
        start = time.monotonic()
        verdict: Verdict = registry.call(audit, encoder, sample, job.seed, **offered)
        seconds = {audit_name(audit): round(time.monotonic() - start, 2)}
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
            "audits": [audit_json(audit, verdict, classifier)],
            "inversions": [
                {"audit": audit_name(audit), **facts}
                for facts in list_inversions(
                    verdict.inversions[:MAX_INVERSIONS], sample.images, reader
                )
            ],
        }
        images = sample.images[:MAX_INVERSIONS].cpu().clone().contiguous()
        return AuditFindings(facts, inversion_tensors(verdict), {"images": images}, seconds)

    def _offer(
        self, job: Job, audit: audits.Audit, encoder: Encoder, labelled: Pairs
    ) -> dict[str, Any]:
        """What the audit needs beside the encoder and clean images."""
        needs = registry.needs(audit)
        offered: dict[str, Any] = {"report": job.reporter("")}
        if "classifier" in needs:
            offered["classifier"] = make_audit_classifier(encoder, labelled, self.classifier)
        if "parent" in needs:
            parent = job.inputs["parent"]
            if parent is None:
                raise UserError(
                    f"audit {audit_name(audit)} needs --parent: the encoder that this one was "
                    "tuned from"
                )
            offered["parent"] = check_auditable(
                inputs.load_encoder(parent, job.device), "the parent"
            )
        return offered


def audit_seconds(run: Run, name: str) -> dict[str, float]:
    """How long the audit of a name took in an audit run; empty where the run does not say it."""
    seconds = run.metrics.get(f"{name}.seconds")
    return {} if seconds is None else {name: seconds.value}


def read_findings(run: Run) -> Facts:
    """What an audit run says in verdict.json. Raises UserError."""
    return read_facts_of(run.file(VERDICT_FILE))


def single_audit(
    audit: Any, encoder: Any, data: Any, classifier: Any, parent: Any, images: int
) -> Audit:
    """One audit without a bank.

    It is given what the audit needs and nothing else, so that it is the same question however it is
    asked.
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
    names = [input_spec(audit).partition(":")[0] for audit in audits]
    return tuple(audits) if "parent" in names else (*audits, "parent")


def sample_clean_records(method: Any, images: int) -> tuple[Pairs, Pairs]:
    """Draw clean records from data.

    They are the same whatever the seed, so that a bank's values and a suspect's differ by the
    encoder alone.

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
            f"{len(records)} clean images; an audit takes {MIN_IMAGES} and more, with fewer it is "
            "sensitive to nothing"
        )
    rows = randomness.sample_rows(list(records.ids), max(images, MAX_LABELLED), 0)
    labelled = inputs.in_memory(records.take(rows))
    return labelled.take(range(min(images, len(labelled)))), labelled


def clean_images(data: Any, encoder: Any) -> Any:
    """The clean images for an encoder: those given, or the test split of its training data.

    Raises UserError if these are not known.
    """
    if data is not None:
        return data
    if not isinstance(encoder, Run):
        raise UserError("name clean images (--data): what this encoder was trained on is not known")
    return inputs.test_split(inputs.root_method(encoder.ancestor("train") or encoder))


def check_auditable(encoder: Encoder, what: str = "the encoder") -> Encoder:
    """Return the encoder. Raises UserError for one with weights that are not finite."""
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
    """A classifier that reads what inverted triggers turn images into; None without one."""
    try:
        return make_audit_classifier(encoder, labelled, kind)
    except UserError:
        return None


def make_audit_classifier(encoder: Encoder, labelled: Pairs, kind: ClassifierKind) -> Classifier:
    """The classifier of an audit, of clusters where `auto` finds none. Raises UserError."""
    has_labels = labelled.labels is not None and len(set(labelled.labels.tolist()) - {-1}) > 1
    reads_texts = encoder.text is not None and bool(labelled.classes)
    if kind == "auto" and encoder.head is None and not reads_texts and not has_labels:
        kind = "clusters"
    return make_classifier(encoder, labelled, kind)


def measure_own_accuracy(job: Job, images: int) -> dict[str, Measure]:
    """Accuracy of the suspect's own head on the clean images, where it has a head and they have
    labels.

    A warning that belongs to it is printed and noted.
    """
    suspect = job.inputs["encoder"]
    sample, _ = sample_clean_records(clean_images(job.inputs["data"], suspect), images)
    encoder = inputs.load_encoder(suspect, job.device, sample)
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
        unaided = unaided_verdict.judge_outlier(audit["evidence"], audit["notes"])
        audit["unaided"] = unaided.json() if unaided else None
    larger = [b.sample.images for b in banks if sample.images < b.sample.images]
    facts["few"] = verdict_text.small_sample_warning(sample.images, min(larger, default=0))


def data_text(method: Any) -> str:
    """The spec of clean images in the form that banks compare."""
    return bank.comparable_data_spec(registry.spec(inputs.open_dataset(method).method))
