"""Look for a backdoor in an encoder, and say what the finding is worth."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from bezoar import registry
from bezoar.errors import UserError
from bezoar.runs.execute import Job
from bezoar.runs.run import Run
from bezoar.runs.verb import Input, Takes

if TYPE_CHECKING:
    from bezoar.auditing.bank import Bank
    from bezoar.data.pairs import Pairs
    from bezoar.encoders.encoder import Encoder
    from bezoar.evaluation.classifiers import Classifier
    from bezoar.evaluation.scores import Measure
    from bezoar.evaluation.verdict import Inversion, Verdict

VERDICT_FILE, INVERSIONS, EXAMPLES, SARIF = (
    "verdict.json",
    "inversions.safetensors",
    "examples.safetensors",
    "audit.sarif",
)
MIN_IMAGES = 16  # clean images; of fewer nothing is said
MAX_LABELLED = 2000  # clean records that a head is fitted on
MAX_INVERSIONS = 8  # inversions that are kept, and clean images that they are shown on


@dataclass(frozen=True)
class Audit:
    """Look for a backdoor in an encoder: evidence at a stated false-positive rate, or none at a stated sensitivity.

    Thresholds come from a bank of clean encoders like it. It never says that an encoder is clean. What was audited once is
    not audited again: each audit without a bank is a run of its own.
    """

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
    ] = (
        "whitening",
        "whole_image",
        "decree",
        "cleanse",
    )
    classifier: Annotated[
        Literal["auto", "own", "zero_shot", "linear", "mlp"], "head that audits of classes invert"
    ] = "auto"
    parent: Annotated[Input, Takes("encoder"), "the encoder that it was tuned from"] = None
    bank: Annotated[
        tuple[Input, ...], Takes("bank"), "banks of clean encoders: bank.json files, calibrate runs"
    ] = ("shipped",)
    rate: Annotated[float, "false-positive rate of each audit"] = 0.05
    images: Annotated[int, "clean images that are looked at"] = 512

    def __post_init__(self) -> None:
        if self.parent is not None and not any(
            str(a).partition(":")[0] == "parent" for a in map(audit_spec, self.audit)
        ):
            object.__setattr__(self, "audit", (*self.audit, "parent"))

    def work(self, job: Job) -> dict[str, Any]:
        """-> verdict.json, inversions.safetensors, examples.safetensors (clean images), audit.sarif, and figures."""
        from safetensors.torch import save_file

        from bezoar.auditing import sarif, verdict_text
        from bezoar.runs import inputs

        if not 0 < self.rate < 1 or self.images < MIN_IMAGES:
            raise UserError(
                f"rate must be inside 0..1 and images at least {MIN_IMAGES}; got {self.rate:g} and {self.images}"
            )
        single = len(job.inputs["audit"]) == 1 and not job.inputs["bank"]
        found, refused = (self._alone(job), {}) if single else self._each(job)
        judge(found, banks(job.inputs["bank"]), self.rate)
        words, sentence = verdict_text.overall_verdict(found.audits, self.rate)
        found.facts |= {"words": words, "sentence": sentence, "rate": self.rate, "refused": refused}
        found.facts["not_tested"] = verdict_text.list_untested(found.facts, refused)
        inputs.write_json(job.folder / VERDICT_FILE, found.facts)
        save_file(found.tensors, job.folder / INVERSIONS)
        save_file(found.examples, job.folder / EXAMPLES)
        name, given = found.facts["encoder"], job.inputs["encoder"]
        artefact = f"{name}/encoder.safetensors" if isinstance(given, Run) else name
        inputs.write_json(
            job.folder / SARIF, sarif.build_log(name, artefact, found.audits, refused, sentence)
        )
        job.goals = [vars(g) for g in inputs.known_goals(given)]
        job.notes = {
            "words": words,
            "verdict": sentence,
            "uncalibrated": [a["name"] for a in found.audits if a["words"] == "no calibration"],
            "not_tested": found.facts["not_tested"],
            "incomplete": [f"audit {k}: {why}" for k, why in refused.items()],
        }
        for line in job.notes["incomplete"]:
            print(f"audit: {line}", file=sys.stderr)
        return {
            k: m
            for a in found.audits
            for k, m in measures(a, found.facts["sample"]["images"]).items()
        }

    def _each(self, job: Job) -> tuple[AuditFindings, dict[str, str]]:
        """Every audit as a run of its own; and why one refused. Raises UserError when none is left."""
        given, parts, refused = job.inputs, [], {}
        for audit in given["audit"]:
            leaf = single_audit(
                audit,
                given["encoder"],
                given["data"],
                self.classifier,
                given["parent"],
                self.images,
            )
            try:
                parts.append(AuditFindings.read(job.run(leaf)))
            except UserError as error:
                refused[audit_name(audit)] = str(error)
        if not parts:
            raise UserError("; ".join(dict.fromkeys(refused.values())) or "give an --audit")
        return AuditFindings.joined(parts), refused

    def _alone(self, job: Job) -> AuditFindings:
        """One audit, as it is called."""
        from bezoar.auditing import bank
        from bezoar.runs import inputs

        given, audit = job.inputs, job.inputs["audit"][0]
        needs = getattr(audit, "needs", ())
        method = (
            given["data"] if given["data"] is not None else default_clean_images(given["encoder"])
        )
        sample, labelled = sample_clean_records(method, self.images)
        encoder = check_auditable(inputs.load_encoder(given["encoder"], job.device))
        sample, labelled = sample.to(job.device), labelled.to(job.device)
        more: dict[str, Any] = {}
        if "classifier" in needs:
            from bezoar.evaluation.classifiers import make_classifier

            more["classifier"] = make_classifier(encoder, labelled, self.classifier)
        if "parent" in needs:
            if given["parent"] is None:
                raise UserError(
                    f"audit {audit_name(audit)} needs --parent: the encoder that this one was tuned from"
                )
            more["parent"] = check_auditable(
                inputs.load_encoder(given["parent"], job.device), "the parent"
            )
        if "report" in needs:
            more["report"] = lambda done, total, told="": job.progress.step(
                done, total, f"{audit_name(audit)}: {told}"
            )
        start = time.monotonic()
        verdict = audit(encoder, sample, job.seed, **more)
        seconds = time.monotonic() - start
        reader = more.get("classifier") or reading(
            encoder, labelled, self.classifier if verdict.inversions else None
        )
        facts = {
            "schema": 1,
            "encoder": encoder_name(given["encoder"]),
            "family": vars(bank.encoder_family(encoder, given["encoder"])),
            "sample": {"data": data_text(method), "images": len(sample)},
            "text_tower": encoder.text is not None,
            "audits": [
                {
                    "audit": registry.spec(audit),
                    "name": audit_name(audit),
                    "summary": (sys.modules[type(audit).__module__].__doc__ or "").partition("\n")[
                        0
                    ],
                    "code": bank.code_hash(type(audit)),
                    "classifier": more["classifier"].how if "classifier" in more else "",
                    "value": verdict.value,
                    "seconds": round(seconds, 2),
                    "evidence": {k: m.json() for k, m in verdict.evidence.items()},
                    "notes": verdict.notes,
                }
            ],
            "inversions": [
                {"audit": audit_name(audit), **shown(i, sample.images, reader)}
                for i in verdict.inversions[:MAX_INVERSIONS]
            ],
        }
        return AuditFindings(
            facts,
            tensors(verdict),
            {"images": sample.images[:MAX_INVERSIONS].cpu().clone().contiguous()},
        )


def single_audit(
    audit: Any, encoder: Any, data: Any, classifier: Any, parent: Any, images: int
) -> Audit:
    """One audit without a bank, given what it needs and nothing else, so that it is one question however it is asked."""
    needs = getattr(audit, "needs", ())
    kind: Any = classifier if "classifier" in needs else "auto"
    return Audit(
        encoder, data, (audit,), kind, parent if "parent" in needs else None, (), 0.05, images
    )


@dataclass
class AuditFindings:
    """What audits say of one encoder. facts: as verdict.json holds it. tensors: `mask@i` and `pattern@i` of the i-th of its
    `inversions`. examples: the first clean images."""

    facts: dict[str, Any]
    tensors: dict[str, Any]
    examples: dict[str, Any]

    @property
    def audits(self) -> list[dict[str, Any]]:
        """One object an audit."""
        return self.facts["audits"]

    @staticmethod
    def read(run: Run) -> AuditFindings:
        """What an audit run found."""
        from safetensors.torch import load_file

        facts = json.loads(run.file(VERDICT_FILE).read_text(encoding="utf-8"))
        return AuditFindings(facts, load_file(run.file(INVERSIONS)), load_file(run.file(EXAMPLES)))

    @staticmethod
    def joined(parts: Sequence[AuditFindings]) -> AuditFindings:
        """Audits of one encoder, side by side."""
        renamed: dict[str, Any] = {}
        for p in parts:
            first = len(renamed) // 2
            renamed |= {
                f"{k.partition('@')[0]}@{first + int(k.partition('@')[2])}": v
                for k, v in p.tensors.items()
            }
        lists = {k: [x for p in parts for x in p.facts[k]] for k in ("audits", "inversions")}
        return AuditFindings(parts[0].facts | lists, renamed, parts[0].examples)


def tensors(verdict: Verdict) -> dict[str, Any]:
    """Masks and patterns of one audit's inversions."""
    kept = list(enumerate(verdict.inversions[:MAX_INVERSIONS]))
    masks = {f"mask@{j}": i.mask.float().cpu().clone().contiguous() for j, i in kept}
    return masks | {f"pattern@{j}": i.pattern.float().cpu().clone().contiguous() for j, i in kept}


def shown(inversion: Inversion, images: Any, reader: Classifier | None) -> dict[str, Any]:
    """An inversion in words: what it does to clean images as a classifier reads them; of the first few, one by one."""
    out: dict[str, Any] = {k: getattr(inversion, k) for k in ("target", "norm", "success")}
    if reader is None:
        return out
    before, after = reader.predict(images).tolist(), reader.predict(inversion(images)).tolist()
    names, n = reader.classes, len(images)
    into = [
        [names[c], count / n, before.count(c) / n] for c, count in Counter(after).most_common(3)
    ]
    told = {
        "before": [names[c] for c in before[:MAX_INVERSIONS]],
        "after": [names[c] for c in after[:MAX_INVERSIONS]],
    }
    return out | told | {"turns_into": into, "reader": reader.how}


def reading(encoder: Encoder, labelled: Pairs, kind: Any) -> Classifier | None:
    """What reads stamped images, where one can be had; it says no more than what an inverted trigger turns images into."""
    from bezoar.evaluation.classifiers import make_classifier

    if kind is None:
        return None
    try:
        return make_classifier(encoder, labelled, kind)
    except UserError:
        return None


def default_clean_images(given: Any) -> Any:
    """The clean images that belong to a run: the test split of what its encoder was trained on."""
    from bezoar.runs import inputs

    if not isinstance(given, Run):
        raise UserError("name clean images (--data): what this encoder was trained on is not known")
    return inputs.test_split(inputs.root_method(given.ancestor("train") or given))


def sample_clean_records(method: Any, images: int) -> tuple[Pairs, Pairs]:
    """Clean records: those that are audited, and more for heads. The same ones whatever the seed, so that a bank's values
    and a suspect's differ by the encoder alone. Raises UserError for too few."""
    from bezoar.data import randomness
    from bezoar.runs import inputs

    records = inputs.open_dataset(method).clean
    if len(records) < MIN_IMAGES:
        raise UserError(
            f"{len(records)} clean images; an audit takes {MIN_IMAGES} and more, with fewer it is sensitive to nothing"
        )
    rows = randomness.sample_rows(list(records.ids), max(images, MAX_LABELLED), 0)
    labelled = inputs.in_memory(records.take(rows))
    return labelled.take(range(min(images, len(labelled)))), labelled


def check_auditable(encoder: Encoder, what: str = "the encoder") -> Encoder:
    """The encoder. Raises UserError for one that no audit can look at."""
    import torch

    if getattr(encoder, "image", None) is None:
        raise UserError(f"{what} reads no images; audits look at image towers")
    odd = [
        k
        for k, v in encoder.state_dict().items()
        if v.is_floating_point() and not torch.isfinite(v).all()
    ]
    if odd:
        raise UserError(
            f"{what} has NaN or infinite weights ({odd[0]}, {len(odd)} tensors); nothing can be said of it"
        )
    return encoder


def banks(given: Sequence[Any]) -> list[Bank]:
    """Banks of calibrate runs, of files, of bezoar's own."""
    from bezoar.auditing.bank import FILE, Bank

    return [b for g in given for b in ((Bank.read(g.file(FILE)),) if isinstance(g, Run) else g())]


def judge(found: AuditFindings, known: Sequence[Bank], rate: float) -> None:
    """What banks say of each value, into the facts."""
    from bezoar.auditing import verdict_text
    from bezoar.auditing.bank import Calibration, Family, Sample, judge_value

    family, sample = Family(**found.facts["family"]), Sample(**found.facts["sample"])
    for a in found.audits:
        own = Calibration(a["audit"], a["code"], a["classifier"])
        a |= verdict_text.verdict_json(
            judge_value(known, family, sample, own, a["value"], rate, found.facts["encoder"])
        )
    fewer = [b.sample.images for b in known if sample.images < b.sample.images]
    found.facts["few"] = verdict_text.small_sample_warning(sample.images, min(fewer, default=0))


def measures(a: Mapping[str, Any], images: int) -> dict[str, Measure]:
    """An audit's figures, under its name."""
    from bezoar.evaluation.scores import Measure

    def one(value: float, n: int, how: str) -> Measure:
        return Measure(value, n, value, value, how)

    out = {
        "value": one(
            a["value"], images, f"{a['audit']} on clean images; higher = more suspicious, counted"
        )
    }
    out["seconds"] = one(a["seconds"], 1, "wall-clock seconds of the audit, counted")
    if a["p"] is not None:
        n = len(a["bank"]["clean"])
        out["p_value"] = one(
            a["p"], n, "(1 + clean encoders at or above the value) / (clean encoders + 1), counted"
        )
    if a["false_positives"]:
        out["false_positive_rate"] = Measure(**a["false_positives"])
    if a["sensitivity"]:
        out["sensitivity"] = Measure(**a["sensitivity"][""])
    out |= {k: Measure(**m) for k, m in a["evidence"].items() if k not in out}
    return {f"{a['name']}.{k}": m for k, m in out.items()}


def audit_spec(audit: Any) -> str:
    """An audit as it is asked for."""
    return audit if isinstance(audit, str) else registry.spec(audit)


def audit_name(audit: Any) -> str:
    """An audit's name; of a user's own file its stem."""
    return Path(registry.method_name(type(audit))).stem


def encoder_name(given: Any) -> str:
    """An encoder's name: a run's, or a spec."""
    return given.name if isinstance(given, Run) else registry.spec(given)


def data_text(method: Any) -> str:
    """Clean images as banks compare them."""
    from bezoar.auditing import bank
    from bezoar.runs import inputs

    return bank.comparable_data_spec(registry.spec(inputs.open_dataset(method).method))
