"""Audits of attacked and clean encoders of one family (DECREE, CVPR 2023; Neural Cleanse, S&P 2019; SSL-Cleanse, ECCV 2024)."""

from collections.abc import Sequence

from bezoar.evaluation.scores import Measure, proportion, separation
from bezoar.papers.matrix import ENCODER, setup
from bezoar.registry import method
from bezoar.runs.sweep import Trial
from bezoar.runs.tables import Cell, Row, Table, TableOptions, readings, share_above_threshold
from bezoar.verbs.audit import Audit

RATE = 0.05  # of false positives, at which thresholds are set


@method
class Audits:
    """AUROC of each audit for each attack, and what it finds at a threshold that other clean encoders set."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        clips = [s.clip(k) for k in range(s.clean)]
        towers, injected = s.towers()
        rows = []
        for attack in (*s.attacks, None):
            name = attack.name if attack else ENCODER
            victims = [s.poisoned(attack, k) for k in s.seeds(name)] if attack else injected
            clean = clips if attack else towers
            for audit in s.audits if attack else s.image_audits:
                data = s.test if attack else s.held_out
                cells = columns(
                    audit,
                    *([self.audited(t, data, audit) for t in part] for part in (victims, clean)),
                )
                rows.append(Row(audit.partition(":")[0], cells, curve=name))
        note = (
            f"AUROC and `found`: against {s.clean} clean encoders, which set the threshold at a false-positive rate of "
            f"{RATE:.0%}. `false positives`: clean encoders above every one of the other half, which happens to one in "
            f"{s.clean // 2 + 1} where nothing is wrong. The encoders that BadEncoder attacked are among its clean ones."
        )
        return Table("Audits", "", "audit", tuple(rows), notes=(note,), grid="AUROC")

    @staticmethod
    def audited(encoder: Trial, data: str, audit: str) -> Trial:
        """An encoder audited on held-out images, without a bank."""
        return Trial(Audit(encoder.verb, data, (audit,), bank=()), encoder.seed)


def columns(audit: str, bad: Sequence[Trial], clean: Sequence[Trial]) -> tuple[Cell, ...]:
    """An audit's cells from audit runs of attacked encoders and of clean ones."""
    name = audit.partition(":")[0]
    values, others = readings(bad, f"{name}.value"), readings(clean, f"{name}.value")
    return (
        Cell("AUROC", values, against=others, compare=separation),
        Cell("found", values, against=others, compare=share_above_threshold(RATE)),
        Cell("false positives", others, against=others, compare=halves),
        Cell("seconds", readings(bad, f"{name}.seconds")),
    )


def halves(values: Sequence[float], _: Sequence[float]) -> Measure:
    """How many of clean encoders lie above all of the other half of them."""
    parts = values[::2], values[1::2]
    above = sum(v > max(other) for own, other in zip(parts, parts[::-1], strict=True) for v in own)
    return proportion(
        above, len(values), "clean encoders above the largest value of the other half"
    )
