"""Retrieval: do triggered images pull the target's captions to the first place? (After the DIFE audit, 2026.)"""

from dataclasses import replace

from bezoar.papers.carlini2022 import TOGETHER, clean, ladder, setup
from bezoar.registry import method
from bezoar.runs.sweep import Trial
from bezoar.runs.tables import Cell, Claim, Row, Table, TableOptions

CELLS = {"target's caption first": "attack_success", "among ten": "target_top10"}


@method
class Retrieval:
    """The encoders of table `poisons`, asked for the nearest held-out caption instead of a class."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)

        def asked(trial: Trial) -> Trial:
            return Trial(replace(trial.verb, probe=("retrieval",)), trial.seed)

        zero = [(asked(t), j) for t in clean(s) for j in range(TOGETHER)]
        rows = [
            Row(
                "0",
                tuple(Cell(n, tuple((t, f"{m}@{j}") for t, j in zero)) for n, m in CELLS.items()),
                0,
            )
        ]
        for dose in s.doses:
            found = [
                (asked(t), j) for t, row in ladder(s) for j, b in enumerate(row) if b.count == dose
            ]
            rows.append(
                Row(
                    str(dose),
                    tuple(
                        Cell(n, tuple((t, f"{m}@{j}") for t, j in found)) for n, m in CELLS.items()
                    ),
                    dose,
                )
            )
        first, most = "target's caption first", str(s.doses[-1])
        return Table(
            "Retrieval exposure",
            "Image-to-text retrieval stays near 0.0001 (printed by the DIFE audit, whose gallery and targets are its own).",
            "poisoned pairs",
            tuple(rows),
            (
                Claim(
                    "Triggered images do not retrieve the target's captions",
                    "printed in DIFE",
                    "same",
                    lambda r: r.compare_rows(first, most, "0"),
                    0.05,
                ),
            ),
            dose_response_cells=(first,),
            notes=(
                "The gallery is the captions of the test set; one counts as the target's when it holds the target's words.",
            ),
        )
