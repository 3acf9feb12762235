"""Backdoor success and z-score against the number of poisons (Carlini & Terzis 2022, section 5.2)."""

import math

from bezoar.evaluation import dose_response
from bezoar.evaluation.dose_response import Contrast
from bezoar.papers.carlini2022 import TOGETHER, alone, clean, setup
from bezoar.registry import method
from bezoar.runs.tables import Cell, Claim, Results, Row, Table, TableOptions, readings

METRICS = {"ASR": "attack_success", "z": "z_std", "z (variance)": "z_var"}


@method
class Poisons:
    """Patch at one place, one trigger a training; every dose is met by every trigger."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        numbered = [f"@{j}" for j in range(TOGETHER)]
        at_zero = tuple(
            Cell(n, readings(clean(s), *(m + j for j in numbered))) for n, m in METRICS.items()
        )
        rows = [Row("0", (*at_zero, Cell("CA", readings(clean(s), "clean_accuracy"))), 0)]
        for dose in s.doses:
            columns = METRICS | {"CA": "clean_accuracy"}
            rows.append(
                Row(
                    str(dose),
                    tuple(Cell(n, readings(alone(s, dose), m)) for n, m in columns.items()),
                    dose,
                )
            )
        low, high = str(s.doses[0]), str(s.doses[-1])
        return Table(
            "Backdoor: success and z-score against the number of poisons",
            "300 of 3,000,000 pairs plant a patch backdoor; the z-score moves before the success rate does.",
            "poisoned pairs",
            tuple(rows),
            (
                Claim(
                    "Success rises with the number of poisons",
                    "abstract",
                    "+",
                    lambda r: r.compare_rows("ASR", high, low),
                ),
                Claim(
                    "The z-score rises with the number of poisons",
                    "summary",
                    "+",
                    lambda r: r.compare_rows("z", high, low),
                ),
                Claim(
                    "The z-score moves before success does",
                    "summary",
                    "+",
                    lambda r: earlier(r, [str(d) for d in s.doses]),
                ),
                Claim("Poisons leave clean accuracy as it was", "summary", "same", cost, 0.03),
            ),
            dose_response_cells=("ASR",),
            notes=("One trigger a training, each with a place and a target of its own.",),
        )


def earlier(results: Results, doses: list[str]) -> Contrast:
    """How far z is ahead of success: each as a share of its gain from no poison to the largest dose, over all readings."""
    ahead = {}
    for cell in ("z", "ASR"):
        floor, top = (sum(v := results.values(d, cell)) / len(v) for d in ("0", doses[-1]))
        if top <= floor:
            return Contrast(
                0.0,
                -math.inf,
                math.inf,
                0,
                math.inf,
                f"{cell} does not rise with the dose: nothing to compare",
            )
        ahead[cell] = [
            (v - floor) / (top - floor) for d in doses[:-1] for v in results.values(d, cell)
        ]
    return dose_response.difference(ahead["z"], ahead["ASR"], paired=True)


def cost(results: Results) -> Contrast:
    """Clean accuracy of the poisoned encoders less that of the clean twins."""
    rows = [r.name for r in results.table.rows]
    every = tuple(
        dict.fromkeys(found for name in rows[1:] for found in results.cell(name, "CA").readings)
    )
    return results.compare_cells(Cell("CA", every), results.cell(rows[0], "CA"))
