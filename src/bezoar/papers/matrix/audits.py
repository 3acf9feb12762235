"""Audits of attacked and clean encoders of one family (DECREE, CVPR 2023; Neural Cleanse, S&P 2019; SSL-Cleanse, ECCV 2024)."""

from collections.abc import Sequence

from bezoar.papers.matrix import ENCODER, setup
from bezoar.registry import method
from bezoar.sweep import Trial
from bezoar.tables import Cell, Given, Reading, Row, Table, exceeding, readings, separation
from bezoar.verbs.audit import Audit

RATE = 0.05  # of false positives, at which thresholds are set


@method
class Audits:
    """AUROC of each audit for each attack, and what it finds at a threshold that other clean encoders set."""

    def __call__(self, given: Given) -> Table:
        """The table at a scale."""
        s = setup(given)
        numbers = range(s.bank), range(s.bank, s.bank + s.clean)
        clips, towers = ([[make(k) for k in part] for part in numbers] for make in (s.clip, s.simple))
        rows = []
        for attack in (*s.attacks, None):
            name = attack.name if attack else ENCODER
            victims = [s.poisoned(attack, k) if attack else s.injected(k) for k in s.seeds(name)]
            bank, clean = clips if attack else towers
            for audit in s.audits if attack else s.image_audits:
                data = s.test if attack else s.held_out
                cells = columns(audit, *([self.audited(t, data, audit) for t in part] for part in (victims, clean, bank)))
                rows.append(Row(audit.partition(":")[0], cells, curve=name))
        note = (
            f"Thresholds are set by {s.bank} clean encoders at a false-positive rate of {RATE:.0%}; `found` and "
            f"`false positives` are measured on attacked encoders and on {s.clean} clean ones, none of which set one. "
            "AUROC: against all clean ones."
        )
        return Table("Audits", "", "audit", tuple(rows), notes=(note,), grid="AUROC")

    @staticmethod
    def audited(encoder: Trial, data: str, audit: str) -> Trial:
        """An encoder audited on held-out images, without a bank."""
        return Trial(Audit(encoder.verb, data, (audit,), bank=()), encoder.seed)


def columns(audit: str, bad: Sequence[Trial], clean: Sequence[Trial], bank: Sequence[Trial]) -> tuple[Cell, ...]:
    """An audit's cells from audit runs of attacked encoders, of clean ones, and of those that set thresholds."""
    name = audit.partition(":")[0]

    def values(trials: Sequence[Trial]) -> tuple[Reading, ...]:
        return readings(trials, f"{name}.value")

    return (
        Cell("AUROC", values(bad), against=values([*clean, *bank]), compare=separation),
        Cell("found", values(bad), against=values(bank), compare=exceeding(RATE)),
        Cell("false positives", values(clean), against=values(bank), compare=exceeding(RATE)),
        Cell("seconds", readings(bad, f"{name}.seconds")),
    )
