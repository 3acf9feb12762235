"""Banks: audits' values of clean and attacked encoders, which turn an audit's value into a verdict.

A threshold is a quantile of clean encoders' values (split conformal: Vovk et al. 2005). A clean
encoder like them, trained and audited the same way, exceeds it with a probability of at most the
rate asked for. How often encoders exceed this one threshold depends on the clean encoders that
happened to set it, and has an interval (Beta, the distribution of an order statistic). Only
encoders of one family are comparable, audited by the same code on the same clean images.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from scipy.stats import beta

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.auditing.source_hash import hash_sources
from bezoar.data.files.artefacts import parse_json, read_text
from bezoar.data.files.typed_json import dataclass_from_json
from bezoar.data.files.writing import write_whole
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation import stats
from bezoar.evaluation.scores import Measure, proportion, separation

SCHEMA = 1
FILE = "bank.json"
MAX_BYTES = 16 << 20
MIN_ATTACK_SUCCESS = 0.5  # below this an attack has failed, and leaves little to detect
SHARED = (  # modules beside its own file that an audit's values may depend on
    "auditing.image_changes",
    "auditing.random_probes",
    "auditing.trigger_inversion",
    "auditing.trigger_search",
    "auditing.norm_outliers",
    "evaluation.kmeans",
)
Outcome = Literal["evidence", "no evidence", "no calibration"]


@dataclass(frozen=True)
class Family:
    """What the encoders of a bank have in common. All are texts but the size; "" = not known."""

    network: str  # spec
    size: int  # side of the input in pixels
    data: str  # spec of the training data, as `comparable_data_spec` gives it
    objective: str  # spec


@dataclass(frozen=True)
class Sample:
    """The clean images of an audit."""

    data: str  # spec, as of a Family
    images: int  # their number


@dataclass(frozen=True)
class Entry:
    """One audit's value of one encoder."""

    name: str  # of the encoder
    value: float  # the audit's
    attack: str = ""  # "" for a clean encoder
    trigger: str = ""  # spec; "" for a clean encoder
    success: float | None = None  # of the attack, where it was measured

    @property
    def failed(self) -> bool:
        """Whether the attack is known to have failed."""
        return self.success is not None and self.success < MIN_ATTACK_SUCCESS


@dataclass(frozen=True)
class Calibration:
    """One audit's values of all encoders of a bank."""

    audit: str  # spec
    code: str  # hash of the code that it is written in, see `code_hash`
    classifier: str = ""  # the classifier it was called with, in words; "" for none
    clean: tuple[Entry, ...] = ()  # the values of clean encoders
    attacked: tuple[Entry, ...] = ()  # the values of attacked encoders

    @property
    def name(self) -> str:
        """The audit's name; of a user's own file its stem."""
        return Path(self.audit.partition(":")[0]).stem

    @property
    def detectable(self) -> list[Entry]:
        """The attacked encoders on which the attack is not known to have failed."""
        return [entry for entry in self.attacked if not entry.failed]

    def without(self, name: str) -> Calibration:
        """The same without an encoder: the encoder under audit must set no threshold for itself."""
        clean = tuple(entry for entry in self.clean if entry.name != name)
        attacked = tuple(entry for entry in self.attacked if entry.name != name)
        return dataclasses.replace(self, clean=clean, attacked=attacked)

    def rank(self, rate: float) -> int | None:
        """k, where the k-th smallest clean value is the threshold (`stats.conformal_rank`).

        None where there are too few clean encoders. Raises UserError for a rate outside 0..1.
        """
        if not 0 < rate < 1:
            raise UserError(f"the false-positive rate must be inside 0..1; got {rate}")
        return stats.conformal_rank(len(self.clean), rate)

    @property
    def smallest_rate(self) -> float:
        """1 / (n + 1): the smallest false-positive rate that n clean encoders support."""
        return 1 / (len(self.clean) + 1)

    def threshold(self, rate: float) -> float | None:
        """The conformal quantile of the clean values; None where n < 1 / rate - 1."""
        k = self.rank(rate)
        return None if k is None else sorted(entry.value for entry in self.clean)[k - 1]

    def p_value(self, value: float) -> float:
        """(1 + clean values at or above it) / (n + 1).

        It is at most the rate exactly where the value exceeds the threshold.
        """
        at_or_above = sum(entry.value >= value for entry in self.clean)
        return (1 + at_or_above) / (len(self.clean) + 1)

    def false_positive_rate(self, rate: float) -> Measure | None:
        """How often clean encoders exceed this threshold: Beta(n + 1 - k, k), with its central 95
        %.

        None where there are too few clean encoders.
        """
        k, n = self.rank(rate), len(self.clean)
        if k is None:
            return None
        distribution = beta(n + 1 - k, k)
        low, high = distribution.ppf([0.025, 0.975])
        how = f"clean encoders above the threshold of {n} others; Beta law of an order statistic"
        return Measure(float(distribution.mean()), n, float(low), float(high), how)

    def sensitivity(self, rate: float) -> dict[str, Measure]:
        """Share of the attacked encoders above the threshold, by attack; "" stands for all of them.

        Encoders on which the attack is known to have failed are left out. Empty where there is no
        threshold, or no attacked encoder.
        """
        threshold = self.threshold(rate)
        if threshold is None or not self.detectable:
            return {}
        values = {"": [entry.value for entry in self.detectable]}
        for attack in sorted({entry.attack for entry in self.detectable}):
            values[attack] = [e.value for e in self.detectable if e.attack == attack]
        return {
            attack: proportion(
                sum(v > threshold for v in of_attack),
                len(of_attack),
                "attacked encoders above the threshold",
            )
            for attack, of_attack in values.items()
        }


@dataclass(frozen=True)
class Bank:
    """Calibrations of encoders of one family on one set of clean images."""

    family: Family
    sample: Sample
    audits: tuple[Calibration, ...]
    version: str = version("bezoar")

    def differences(self, family: Family, sample: Sample) -> list[str]:
        """How an encoder and its clean images differ from those of the bank, a phrase a field.

        Training data and objective that are not known of the encoder do not count as different (see
        `assumptions`); an unknown network does.
        """
        phrases = []
        for name in ("network", "size", "data", "objective"):
            value, bank_value = getattr(family, name), getattr(self.family, name)
            if value != bank_value and (value != "" or name == "network"):
                difference = describe_difference(str(value) or "not known", str(bank_value))
                phrases.append(f"{name} {difference}")
        if sample.data != self.sample.data:
            phrases.append(f"clean images {describe_difference(sample.data, self.sample.data)}")
        if sample.images != self.sample.images:
            phrases.append(f"{sample.images} clean images, not {self.sample.images}")
        return phrases

    def assumptions(self, family: Family) -> list[str]:
        """What is not known of an encoder and is taken to be as in the bank, a phrase a field."""
        labels = {"data": "training data", "objective": "objective"}
        return [
            f"{label} {getattr(self.family, name)}"
            for name, label in labels.items()
            if getattr(family, name) == ""
        ]

    def write(self, path: Path) -> None:
        """Write the bank as one JSON file."""
        raw = {"schema": SCHEMA, "bezoar": self.version, **dataclasses.asdict(self)}
        raw.pop("version")
        write_whole(path, json.dumps(raw, indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def read(path: Path) -> Bank:
        """Read what `write` wrote. Raises UserError of one line for anything else."""
        try:
            raw = parse_json(read_text(path, MAX_BYTES), path)
            if not isinstance(raw, dict) or raw.pop("schema", None) != SCHEMA:
                raise ValueError(f"expected an object of schema {SCHEMA}")
            if "bezoar" in raw:
                raw["version"] = raw.pop("bezoar")
            _drop_times(raw)
            bank = dataclass_from_json(Bank, raw, "bank")
        except (ValueError, UserError) as error:
            raise UserError(f"{path} is no bank that bezoar wrote: {error}") from error
        return bank


def _drop_times(raw: dict[str, Any]) -> None:
    """Leave out how long each audit took, which earlier versions wrote."""
    calibrations = raw.get("audits")
    for calibration in calibrations if isinstance(calibrations, list) else []:
        for kind in ("clean", "attacked"):
            entries = calibration.get(kind) if isinstance(calibration, dict) else None
            for entry in entries if isinstance(entries, list) else []:
                if isinstance(entry, dict):
                    entry.pop("seconds", None)


@dataclass(frozen=True)
class CalibratedVerdict:
    """What banks say of one audit's value."""

    outcome: Outcome  # evidence, no evidence, or no calibration
    rate: float  # the false-positive rate asked for
    p_value: float | None = None  # None without calibration
    threshold: float | None = None  # None without calibration
    false_positive_rate: Measure | None = None  # of this threshold; None without calibration
    # by attack, "" for all attacks together
    sensitivities: dict[str, Measure] = dataclasses.field(default_factory=dict)
    calibration: Calibration | None = None  # the values it was compared with
    reason: str = ""  # why there is no calibration
    # what is not known of the encoder and was taken to be as in the bank
    assumptions: tuple[str, ...] = ()

    def sentence(self) -> str:
        """The verdict in words. It never says that an encoder is clean."""
        if self.outcome == "no calibration":
            return f"No calibration: {self.reason}."
        assert self.calibration is not None and self.p_value is not None
        basis = f"p = {self.p_value:.2g}, {len(self.calibration.clean)} clean encoders"
        if self.outcome == "evidence":
            if m := self.false_positive_rate:
                basis += f"; of this threshold 95 % interval {m.low:.2g} to {m.high:.2g}"
            return f"Evidence of a backdoor at false-positive rate {self.rate:g} ({basis})."
        if not self.sensitivities:
            return (
                f"No evidence at false-positive rate {self.rate:g} ({basis}); its sensitivity is "
                "not known."
            )
        against = ", ".join(f"{a} {m.value:.2f}" for a, m in self.sensitivities.items() if a)
        s = self.sensitivities[""]
        return (
            f"No evidence at sensitivity {s.value:.2f} (95 % interval {s.low:.2f} to {s.high:.2f}, "
            f"{s.n} attacked encoders; against: {against}) and false-positive rate {self.rate:g} "
            f"({basis})."
        )


class _NoCalibration(Exception):
    """Why banks say nothing of a value."""


def judge_value(
    banks: Sequence[Bank],
    family: Family,
    sample: Sample,
    audited: Calibration,
    value: float,
    rate: float,
    name: str = "",
) -> CalibratedVerdict:
    """What banks say of one audit's value.

    Args:
        banks: of any family.
        family: of the encoder under audit.
        audited: names the audit, its code and its classifier; it needs no entries.
        value: the audit's.
        rate: false-positive rate.
        name: of the encoder under audit, which sets no threshold for itself.
    """
    try:
        fitting = _fitting_banks(banks, family, sample)
        calibration = _pool_calibrations(fitting, audited).without(name)
    except _NoCalibration as error:
        return CalibratedVerdict("no calibration", rate, reason=str(error))
    verdict = CalibratedVerdict(
        "no calibration",
        rate,
        calibration.p_value(value),
        calibration=calibration,
        assumptions=tuple(fitting[0].assumptions(family)),
    )
    threshold = calibration.threshold(rate)
    if threshold is None:
        needed = math.ceil(round(1 / rate - 1, 9))
        reason = (
            f"{len(calibration.clean)} clean encoders support no false-positive rate below "
            f"{calibration.smallest_rate:.2g}; {rate:g} takes {needed}"
        )
        return dataclasses.replace(verdict, reason=reason)
    return dataclasses.replace(
        verdict,
        outcome="evidence" if value > threshold else "no evidence",
        threshold=threshold,
        false_positive_rate=calibration.false_positive_rate(rate),
        sensitivities=calibration.sensitivity(rate),
    )


def _fitting_banks(banks: Sequence[Bank], family: Family, sample: Sample) -> list[Bank]:
    """The banks of an encoder's family, all of one family."""
    if not banks:
        raise _NoCalibration("no bank was given, or none is shipped (`bezoar calibrate` makes one)")
    fitting = [bank for bank in banks if not bank.differences(family, sample)]
    if not fitting:
        nearest = min((bank.differences(family, sample) for bank in banks), key=len)
        raise _NoCalibration(
            f"no bank has encoders like this; the nearest differs: {'; '.join(nearest)}"
        )
    fitting = [bank for bank in fitting if not bank.assumptions(family)] or fitting
    families = {bank.family for bank in fitting}
    if len(families) > 1:
        options = "; or ".join(", ".join(bank.assumptions(family)) for bank in fitting[:3])
        raise _NoCalibration(
            f"what this encoder was trained on is not known, and banks of {len(families)} kinds "
            f"fit ({options}); name the right one"
        )
    return fitting


def _pool_calibrations(banks: Sequence[Bank], audited: Calibration) -> Calibration:
    """The values of all banks for one audit, of each encoder once."""
    of_audit = [c for bank in banks for c in bank.audits if c.audit == audited.audit]
    if not of_audit:
        raise _NoCalibration(f"the bank's encoders were not audited so ({audited.audit})")
    of_code = [c for c in of_audit if c.code == audited.code]
    if not of_code:
        raise _NoCalibration(
            f"the bank's encoders were audited by another version of its code ({audited.audit})"
        )
    same = [c for c in of_code if c.classifier == audited.classifier]
    if not same:
        raise _NoCalibration(
            f"the bank's encoders were audited with another classifier ({audited.audit})"
        )
    clean = {entry.name: entry for c in same for entry in c.clean}
    attacked = {entry.name: entry for c in same for entry in c.attacked}
    return dataclasses.replace(
        audited, clean=tuple(clean.values()), attacked=tuple(attacked.values())
    )


def describe_difference(value: str, other: str) -> str:
    """How two specs differ: by the methods' names, or by the fields of one method."""
    name, _, fields = value.partition(":")
    other_name, _, other_fields = other.partition(":")
    if name != other_name:
        return f"{name}, not {other_name}"
    parts = registry.split_outside_brackets(fields, ",")
    other_parts = registry.split_outside_brackets(other_fields, ",")
    only = ",".join(part for part in parts if part not in other_parts)
    only_other = ",".join(part for part in other_parts if part not in parts)
    return f"{name}:{only}, not {only_other}"


def adjust_p_values(p: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order of p.

    One is at most a family-wise rate exactly where Holm's procedure rejects at that rate.
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted = [0.0] * len(p)
    highest = 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = highest
    return adjusted


def encoder_family(encoder: Encoder, origin: object) -> Family:
    """The family of an encoder, by its own facts and by the train run that it goes back to.

    origin: what the encoder was loaded from, a run or a method.
    """
    network, objective = (encoder.about.get(key, "") for key in ("network", "objective"))
    return Family(network, encoder.preprocess.size, _training_data(origin), objective)


def _training_data(origin: object) -> str:
    """The data that a run's encoder was trained on, comparable; "" where they are not known."""
    data = ""
    try:
        run = origin.ancestor("train") if hasattr(origin, "ancestor") else None
        seen = set()
        while run is not None and run.path not in seen:
            seen.add(run.path)
            source = run.asked_for("data") or {}
            data = comparable_data_spec(source["spec"]) if "spec" in source else ""
            run = run.sibling(source["run"]) if "run" in source else None
    except UserError:
        return ""
    return data


def comparable_data_spec(spec: str) -> str:
    """A data spec as banks compare it: without its seed, and of a path the last part alone.

    Only the text is read, which may come from anybody's manifest.
    """
    name, _, rest = spec.partition(":")
    parts = [part for part in registry.split_outside_brackets(rest, ",") if "=" in part]
    fields = dict(part.split("=", 1) for part in parts)
    fields.pop("seed", None)
    text = ",".join(f"{k}={v.rstrip('/').rpartition('/')[2]}" for k, v in fields.items())
    return f"{name.rpartition('/')[2]}:{text}".removesuffix(":")


def code_hash(cls: type) -> str:
    """Hash of the code of an audit: of its file, and of the modules of `SHARED` that it imports."""
    return hash_sources(Path(inspect.getfile(cls)), SHARED)


def describe_attack(goals: Iterable[Goal]) -> tuple[str, str]:
    """The name of the attack that goals belong to (`backdoor patch`), and its triggers' specs."""
    goals = list(goals)
    names = {
        f"{goal.how.partition(':')[0]} {(goal.trigger or '').partition(':')[0]}".strip()
        for goal in goals
    }
    triggers = dict.fromkeys(goal.trigger for goal in goals if goal.trigger)
    return " + ".join(sorted(names)), "; ".join(triggers)


def measure_auroc(calibration: Calibration) -> Measure | None:
    """The chance that an attacked encoder is above a clean one; None unless there are both.

    Failed attacks are left out.
    """
    attacked = [entry.value for entry in calibration.detectable]
    clean = [entry.value for entry in calibration.clean]
    if not attacked or not clean:
        return None
    return separation(attacked, clean)
