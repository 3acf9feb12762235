"""Audits of attacked and clean encoders (DECREE 2023; Neural Cleanse 2019; SSL-Cleanse 2024)."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from bezoar.evaluation.scores import Measure, proportion, separation
from bezoar.papers.matrix import BADENCODER, get_setup
from bezoar.registry import method
from bezoar.runs.tables import Cell, Row, Table, TableOptions, readings, share_above_threshold
from bezoar.runs.verb import Trial
from bezoar.verbs.audit import Audit

FALSE_POSITIVE_RATE = 0.05  # at which thresholds are set


@method
class Audits:
    """AUROC of each audit for each attack, and the share above a threshold from clean encoders."""

    takes: ClassVar[tuple[str, ...]] = ("audit",)

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        added = options.added_specs("audit")
        clips = [setup.clean_clip(seed) for seed in range(setup.clean)]
        towers, attacked_towers = setup.towers()
        rows = []
        for attack in setup.attacks:
            attacked = [setup.poisoned_clip(attack, s) for s in setup.seeds(attack.name)]
            rows += audit_rows(attack.name, (*setup.audits, *added), setup.test, attacked, clips)
        rows += audit_rows(
            BADENCODER, (*setup.image_audits, *added), setup.held_out, attacked_towers, towers
        )
        note = (
            f"AUROC and `found`: against {setup.clean} clean encoders, which set the threshold at "
            f"a false-positive rate of {FALSE_POSITIVE_RATE:.0%}. `false positives`: clean "
            "encoders above every one of the other half, which happens to one in "
            f"{setup.clean // 2 + 1} by chance. The towers that BadEncoder attacked are among its "
            "clean encoders."
        )
        return Table(title="Audits", axis="audit", rows=tuple(rows), notes=(note,), grid="AUROC")


def audit_rows(
    attack: str, audits: Sequence[str], data: str, attacked: Sequence[Trial], clean: Sequence[Trial]
) -> list[Row]:
    """A row for each audit of attacked and clean encoders, on held-out images (`data`, a spec)."""
    rows = []
    for audit in audits:
        name = Path(audit.partition(":")[0]).stem  # of a user's own file, as the audit names it
        attacked_audits = [audit_without_bank(encoder, data, audit) for encoder in attacked]
        clean_audits = [audit_without_bank(encoder, data, audit) for encoder in clean]
        values = readings(attacked_audits, f"{name}.value")
        clean_values = readings(clean_audits, f"{name}.value")
        threshold = share_above_threshold(FALSE_POSITIVE_RATE)
        cells = (
            Cell("AUROC", values, reference_readings=clean_values, compare=separation),
            Cell("found", values, reference_readings=clean_values, compare=threshold),
            Cell(
                "false positives",
                clean_values,
                reference_readings=clean_values,
                compare=share_above_other_half,
            ),
            Cell.mean("seconds", attacked_audits, f"{name}.seconds"),
        )
        rows.append(Row(name, cells, curve=attack))
    return rows


def audit_without_bank(encoder: Trial, data: str, audit: str) -> Trial:
    """An audit without a bank: the clean encoders of the table set the threshold."""
    return Trial(Audit(encoder.verb, data, (audit,), bank=()), encoder.seed)


def share_above_other_half(values: Sequence[float], _: Sequence[float] = ()) -> Measure:
    """The share of clean encoders that lie above all of the other half of them."""
    even, odd = values[::2], values[1::2]
    above = sum(v > max(odd) for v in even) + sum(v > max(even) for v in odd)
    return proportion(
        above, len(values), "clean encoders above the largest value of the other half"
    )
