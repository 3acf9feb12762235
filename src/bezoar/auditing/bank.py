"""Bank: what audits say of encoders known to be clean, and of attacked ones; it turns an audit's number into a verdict.

A threshold is a quantile of clean encoders' values (split conformal: Vovk et al. 2005): a clean encoder like them, trained
and audited the same way, exceeds it with a probability of at most the rate asked for. How often encoders exceed *this*
threshold depends on the clean ones that happened to set it, and has an interval (Beta: the law of an order statistic).
Only encoders of one family are comparable, audited by the same code on the same clean images.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import json
import math
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from bezoar import registry
from bezoar.errors import UserError
from bezoar.evaluation import stats
from bezoar.evaluation.scores import Measure, proportion

SCHEMA = 1
FILE = "bank.json"
MAX_BYTES, MAX_TEXT, MAX_ENTRIES = 16 << 20, 4096, 100_000
MIN_ATTACK_SUCCESS = (
    0.5  # an attack of known success below this has failed: there is little to be found
)
SHARED = (
    "auditing.trigger_inversion",
    "auditing.random_probes",
)  # modules that audits are written in, beside their own file
Outcome = Literal["evidence", "no evidence", "no calibration"]


@dataclass(frozen=True)
class Family:
    """What encoders have in common that a bank compares. Texts; "" = not known.

    network, objective: specs. size: input side in pixels. data: training data, without their seed and their folder.
    """

    network: str
    size: int
    data: str
    objective: str


@dataclass(frozen=True)
class Sample:
    """The clean images that an encoder was audited on. data: as of a Family. images: how many."""

    data: str
    images: int


@dataclass(frozen=True)
class Entry:
    """One encoder's value. attack, trigger: "" of a clean one. success: what the attack was measured at, if it was."""

    name: str
    value: float
    seconds: float = 0.0
    attack: str = ""
    trigger: str = ""
    success: float | None = None


@dataclass(frozen=True)
class Calibration:
    """One audit's values over a bank. audit: spec. code: hash of what it is written in. classifier: what it was given."""

    audit: str
    code: str
    classifier: str = ""
    clean: tuple[Entry, ...] = ()
    attacked: tuple[Entry, ...] = ()

    @property
    def name(self) -> str:
        """The audit's name; of a user's own file its stem."""
        return Path(self.audit.partition(":")[0]).stem

    def without(self, name: str) -> Calibration:
        """The same without an encoder: what is audited must set no threshold for itself."""
        kept = ((e for e in own if e.name != name) for own in (self.clean, self.attacked))
        clean, attacked = map(tuple, kept)
        return dataclasses.replace(self, clean=clean, attacked=attacked)

    def rank(self, rate: float) -> int | None:
        """k: the k-th smallest clean value is the threshold (`stats.conformal_rank`). None where n is too small."""
        if not 0 < rate < 1:
            raise UserError(f"the false-positive rate must be inside 0..1; got {rate}")
        return stats.conformal_rank(len(self.clean), rate)

    @property
    def smallest_rate(self) -> float:
        """1 / (n + 1): the smallest false-positive rate that n clean encoders support."""
        return 1 / (len(self.clean) + 1)

    def threshold(self, rate: float) -> float | None:
        """The conformal quantile of the clean values; what lies above it is evidence. None where n < 1 / rate - 1."""
        k = self.rank(rate)
        return None if k is None else sorted(e.value for e in self.clean)[k - 1]

    def p_value(self, value: float) -> float:
        """(1 + clean values at or above it) / (n + 1). At most rate exactly where the value exceeds the threshold."""
        return (1 + sum(e.value >= value for e in self.clean)) / (len(self.clean) + 1)

    def false_positive_rate(self, rate: float) -> Measure | None:
        """How often clean encoders exceed this threshold: Beta(n + 1 - k, k), its mean and central 95 %."""
        from scipy.stats import beta

        k, n = self.rank(rate), len(self.clean)
        if k is None:
            return None
        law = beta(n + 1 - k, k)
        how = f"clean encoders above the threshold that {n} clean ones set; Beta law of an order statistic"
        return Measure(float(law.mean()), n, float(law.ppf(0.025)), float(law.ppf(0.975)), how)

    def sensitivity(self, rate: float) -> dict[str, Measure]:
        """Share of the attacked encoders above the threshold, by attack; "" is all of them. Empty where nothing is known.

        Encoders on which the attack is known to have failed are left out.
        """
        t, worked = (
            self.threshold(rate),
            [e for e in self.attacked if e.success is None or e.success >= MIN_ATTACK_SUCCESS],
        )
        if t is None or not worked:
            return {}
        groups = {"": worked} | {
            a: [e for e in worked if e.attack == a] for a in sorted({e.attack for e in worked})
        }
        how = "attacked encoders above the threshold"
        return {
            a: proportion(sum(e.value > t for e in own), len(own), how) for a, own in groups.items()
        }


@dataclass(frozen=True)
class Bank:
    """Calibrations of one family on one clean set."""

    family: Family
    sample: Sample
    audits: tuple[Calibration, ...]
    version: str = version("bezoar")

    def fits(self, family: Family, sample: Sample) -> list[str]:
        """How an encoder differs from those of the bank, a phrase a field; none: it is one of their kind.

        Training data and objective that are not known of the encoder do not differ: `assumed` names them. A network does.
        """
        out = []
        for name in ("network", "size", "data", "objective"):
            own, theirs = getattr(family, name), getattr(self.family, name)
            if own != theirs and (own != "" or name == "network"):
                out.append(f"{name} {describe_difference(str(own) or 'not known', str(theirs))}")
        if sample.data != self.sample.data:
            out.append(f"clean images {describe_difference(sample.data, self.sample.data)}")
        if sample.images != self.sample.images:
            out.append(f"{sample.images} clean images, not {self.sample.images}")
        return out

    def assumed(self, family: Family) -> list[str]:
        """What is not known of an encoder and taken to be as in the bank, a phrase a field."""
        names = {"data": "training data", "objective": "objective"}
        return [
            f"{told} {getattr(self.family, k)}"
            for k, told in names.items()
            if getattr(family, k) == ""
        ]

    def write(self, path: Path) -> None:
        """One JSON file, under a temporary name first."""
        raw = {"schema": SCHEMA, "bezoar": self.version, **dataclasses.asdict(self)}
        raw.pop("version")
        path.with_suffix(".tmp").write_text(
            json.dumps(raw, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        path.with_suffix(".tmp").replace(path)

    @staticmethod
    def read(path: Path) -> Bank:
        """Read what `write` wrote. Raises UserError, one line, for anything else, however it is made."""
        try:
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise ValueError(f"{size >> 20} MiB; a bank may have {MAX_BYTES >> 20}")
            raw = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
                raise ValueError(f"expected an object of schema {SCHEMA}")
            bank = _filled(
                Bank,
                {k if k != "bezoar" else "version": v for k, v in raw.items() if k != "schema"},
                "bank",
            )
        except (OSError, ValueError, RecursionError) as error:
            reason = (
                error.strerror if isinstance(error, OSError) else str(error) or type(error).__name__
            )
            raise UserError(f"{path} is no bank that bezoar wrote: {reason}") from error
        return bank


@dataclass(frozen=True)
class CalibratedVerdict:
    """What banks say of one audit's value. threshold, p: None without calibration. attacks: sensitivity by attack, "" all.

    why: with no calibration, the reason. assumed: what is not known of the encoder and was taken to be as in the bank.
    """

    words: Outcome
    rate: float
    p: float | None = None
    threshold: float | None = None
    false_positives: Measure | None = None
    attacks: dict[str, Measure] = dataclasses.field(default_factory=dict)
    calibration: Calibration | None = None
    why: str = ""
    assumed: tuple[str, ...] = ()

    def sentence(self) -> str:
        """The verdict in words. It never says that an encoder is clean."""
        if self.words == "no calibration":
            return f"No calibration: {self.why}."
        assert self.calibration is not None and self.p is not None
        told = f"p = {self.p:.2g}, {len(self.calibration.clean)} clean encoders"
        if self.words == "evidence":
            m = self.false_positives
            own = f"; of this threshold 95 % interval {m.low:.2g} to {m.high:.2g}" if m else ""
            return f"Evidence of a backdoor at false-positive rate {self.rate:g} ({told}{own})."
        if not self.attacks:
            return f"No evidence at false-positive rate {self.rate:g} ({told}); its sensitivity is not known."
        against = ", ".join(f"{a} {m.value:.2f}" for a, m in self.attacks.items() if a)
        s = self.attacks[""]
        return (
            f"No evidence at sensitivity {s.value:.2f} (95 % interval {s.low:.2f} to {s.high:.2f}, {s.n} attacked encoders; "
            f"against: {against}) and false-positive rate {self.rate:g} ({told})."
        )


def describe_difference(own: str, theirs: str) -> str:
    """Two specs that differ, told by what differs: the methods' names, or the fields of one method."""
    name, _, mine = own.partition(":")
    other, _, others = theirs.partition(":")
    if name != other:
        return f"{name}, not {other}"
    first, second = (
        registry.split_outside_brackets(mine, ","),
        registry.split_outside_brackets(others, ","),
    )
    left, right = (
        ",".join(f for f in a if f not in b) for a, b in ((first, second), (second, first))
    )
    return f"{name}:{left}, not {right}"


def judge_value(
    banks: Sequence[Bank],
    family: Family,
    sample: Sample,
    own: Calibration,
    value: float,
    rate: float,
    name: str = "",
) -> CalibratedVerdict:
    """What banks say of one value. own: which audit, which code, which classifier. name: of the encoder, to leave it out."""
    fitting = [b for b in banks if not b.fits(family, sample)]
    if not banks:
        return CalibratedVerdict(
            "no calibration",
            rate,
            why="no bank was given, or none is shipped (`bezoar calibrate` makes one)",
        )
    if not fitting:
        nearest = min((b.fits(family, sample) for b in banks), key=len)
        return CalibratedVerdict(
            "no calibration",
            rate,
            why=f"no bank has encoders like this; the nearest differs: {'; '.join(nearest)}",
        )
    fitting = [b for b in fitting if not b.assumed(family)] or fitting
    if len(kinds := list(dict.fromkeys(b.family for b in fitting))) > 1:
        theirs = "; or ".join(", ".join(b.assumed(family)) for b in fitting[:3])
        why = f"what this encoder was trained on is not known, and banks of {len(kinds)} kinds fit ({theirs}); name the right one"
        return CalibratedVerdict("no calibration", rate, why=why)
    found = [c for b in fitting for c in b.audits if c.audit == own.audit]
    same = [c for c in found if c.code == own.code and c.classifier == own.classifier]
    if not same:
        odd = (
            "with another classifier"
            if any(c.code == own.code for c in found)
            else "by another version of its code"
        )
        why = (
            f"the bank's encoders were audited {odd}"
            if found
            else "the bank's encoders were not audited so"
        )
        return CalibratedVerdict("no calibration", rate, why=f"{why} ({own.audit})")
    pooled = dataclasses.replace(
        own, clean=_each(c.clean for c in same), attacked=_each(c.attacked for c in same)
    )
    pooled = pooled.without(name)
    threshold = pooled.threshold(rate)
    told: dict[str, Any] = {
        "calibration": pooled,
        "assumed": tuple(fitting[0].assumed(family)),
        "p": pooled.p_value(value),
    }
    if threshold is None:
        n, wanted = len(pooled.clean), math.ceil(round(1 / rate - 1, 9))
        why = f"{n} clean encoders support no false-positive rate below {pooled.smallest_rate:.2g}; {rate:g} takes {wanted}"
        return CalibratedVerdict("no calibration", rate, why=why, **told)
    told |= {
        "threshold": threshold,
        "false_positives": pooled.false_positive_rate(rate),
        "attacks": pooled.sensitivity(rate),
    }
    return CalibratedVerdict("evidence" if value > threshold else "no evidence", rate, **told)


def adjust_p_values(p: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: at most a family-wise rate exactly where Holm rejects at it."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    out, highest = [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - place) * p[i]))
        out[i] = highest
    return out


def encoder_family(encoder: Any, given: Any) -> Family:
    """What kind of encoder this is: as its weights were read, and as the train run says that it goes back to.

    Where that run is no longer there, its data are not known.
    """
    data = ""
    try:
        trained = given.ancestor("train") if hasattr(given, "ancestor") else None
        while trained is not None:
            asked = trained.manifest["ask"].get("data") or {}
            data = comparable_data_spec(asked["spec"]) if "spec" in asked else ""
            trained = trained.sibling(asked["run"]) if "run" in asked else None
    except UserError:
        data = ""
    about = encoder.about
    return Family(
        about.get("network", ""), encoder.preprocess.size, data, about.get("objective", "")
    )


def comparable_data_spec(spec: str) -> str:
    """A data spec as banks compare it: every field, but no seed, and of a path its last part. The text alone is read."""
    name, _, rest = spec.partition(":")
    given = dict(
        part.partition("=")[::2]
        for part in registry.split_outside_brackets(rest, ",")
        if "=" in part
    )
    kept = {k: v.rstrip("/").rpartition("/")[2] for k, v in given.items() if k != "seed"}
    return (
        name.rpartition("/")[2] + ":" + ",".join(f"{k}={v}" for k, v in kept.items())
    ).removesuffix(":")


def code_hash(cls: type) -> str:
    """A hash of what an audit is written in: its file and the modules it shares with others, without their docstrings.

    A reworded docstring changes no value; the code of a method that is the user's own is its file.
    """
    tree = ast.parse(Path(inspect.getfile(cls)).read_text(encoding="utf-8"))
    named = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    named |= {
        f"{n.module}.{a.name}"
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom)
        for a in n.names
    }
    files = [
        registry.PACKAGE / f"{s.replace('.', '/')}.py" for s in SHARED if f"bezoar.{s}" in named
    ]
    trees = [tree, *(ast.parse(f.read_text(encoding="utf-8")) for f in files)]
    for node in (n for t in trees for n in ast.walk(t)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:]
    return hashlib.sha256("".join(map(ast.dump, trees)).encode()).hexdigest()[:16]


def describe_attack(goals: Iterable[Any]) -> tuple[str, str]:
    """Which attack goals belong to, as sensitivities are told apart (`backdoor patch`), and their triggers' specs."""
    names = {
        f"{g.how.partition(':')[0]} {(g.trigger or '').partition(':')[0]}".strip() for g in goals
    }
    return " + ".join(sorted(names)), "; ".join(
        dict.fromkeys(g.trigger for g in goals if g.trigger)
    )


def measure_auroc(found: Calibration) -> Measure | None:
    """Chance that an attacked encoder is above a clean one; None unless there are both. Failed attacks are left out."""
    bad = [e.value for e in found.attacked if e.success is None or e.success >= MIN_ATTACK_SUCCESS]
    if not bad or not found.clean:
        return None
    values, truth = (
        [*bad, *(e.value for e in found.clean)],
        [True] * len(bad) + [False] * len(found.clean),
    )
    how = f"chance that one of {len(bad)} attacked encoders is above one of {len(found.clean)} clean ones; {stats.AUROC_INTERVAL}"
    return Measure(
        stats.auroc(values, truth), len(values), *stats.auroc_interval(values, truth), how
    )


def _each(groups: Iterable[Iterable[Entry]]) -> tuple[Entry, ...]:
    """Every encoder once, by name."""
    return tuple({e.name: e for group in groups for e in group}.values())


def _filled(hint: Any, raw: Any, where: str) -> Any:
    """JSON -> a value of a type: a dataclass, a tuple of one type, a text, a number. Raises ValueError that says where."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints = typing.get_type_hints(hint)
        if not isinstance(raw, dict) or raw.keys() - hints.keys():
            raise ValueError(f"{where} must be an object of {', '.join(hints)}")
        needed = [f.name for f in dataclasses.fields(hint) if f.default is dataclasses.MISSING]
        if missing := [k for k in needed if k not in raw]:
            raise ValueError(f"{where} has no {missing[0]}")
        return hint(**{k: _filled(hints[k], v, f"{where}.{k}") for k, v in raw.items()})
    if typing.get_origin(hint) is tuple:
        if not isinstance(raw, list) or len(raw) > MAX_ENTRIES:
            raise ValueError(f"{where} must be a list of at most {MAX_ENTRIES}")
        return tuple(
            _filled(typing.get_args(hint)[0], v, f"{where}[{i}]") for i, v in enumerate(raw)
        )
    if hint is str:
        if not isinstance(raw, str) or len(raw) > MAX_TEXT:
            raise ValueError(f"{where} must be a text of at most {MAX_TEXT} characters")
        return raw
    if raw is None and type(None) in typing.get_args(hint):
        return None
    if (
        isinstance(raw, bool) or not isinstance(raw, int | float) or not abs(raw) < 1e300
    ):  # neither NaN nor too large
        raise ValueError(f"{where} must be a finite number")
    if hint is int and raw != int(raw):
        raise ValueError(f"{where} must be a whole number")
    return int(raw) if hint is int else float(raw)
