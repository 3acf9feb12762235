"""Backdoor success and z-score against the number of poisons (Carlini & Terzis 2022, 5.2)."""

import math

from bezoar.evaluation import dose_response
from bezoar.evaluation.dose_response import Contrast
from bezoar.papers.carlini2022 import all_attacks, attack_cells, get_setup
from bezoar.registry import method
from bezoar.runs.tables import (
    Cell,
    Claim,
    Results,
    Row,
    Table,
    TableOptions,
    mean_cells,
    row_difference,
)

COLUMNS = {"ASR": "attack_success", "z": "z_std", "z (variance)": "z_var"}


@method
class Poisons:
    """Patch at one place, one trigger a training; every trigger is trained at every dose."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        clean_trials = setup.clean_trials()
        clean_accuracy = Cell.mean("CA", clean_trials, "clean_accuracy")
        rows = [Row("0", (*attack_cells(all_attacks(clean_trials), COLUMNS), clean_accuracy), 0)]
        for dose in setup.doses:
            columns = COLUMNS | {"CA": "clean_accuracy"}
            rows.append(
                Row(str(dose), mean_cells(setup.single_trigger_trials(dose), columns), dose)
            )
        low, high = str(setup.doses[0]), str(setup.doses[-1])
        return Table(
            title="Backdoor: success and z-score against the number of poisons",
            paper_finding=(
                "300 of 3,000,000 pairs plant a patch backdoor; the z-score rises at fewer "
                "poisons than success."
            ),
            axis="poisoned pairs",
            rows=tuple(rows),
            claims=(
                Claim(
                    "Success rises with the number of poisons",
                    "abstract",
                    "+",
                    row_difference("ASR", high, low),
                ),
                Claim(
                    "The z-score rises with the number of poisons",
                    "summary",
                    "+",
                    row_difference("z", high, low),
                ),
                Claim(
                    "The z-score rises at fewer poisons than success",
                    "summary",
                    "+",
                    lambda results: lead_of_z(results, [str(dose) for dose in setup.doses]),
                ),
                Claim(
                    "Poisons leave clean accuracy as it was",
                    "summary",
                    "same",
                    change_of_accuracy,
                    0.03,
                ),
            ),
            dose_response_cells=("ASR",),
            notes=("One trigger a training, each with a place and a target of its own.",),
        )


def lead_of_z(results: Results, doses: list[str]) -> Contrast:
    """How far the z-score is ahead of success.

    Both are shares of their rise from no poison to the largest dose. The mean is over all readings
    below the largest dose. If one of the two does not rise, the interval is open.
    """
    shares = {}
    for cell in ("z", "ASR"):
        floor, top = (mean(results.values(dose, cell)) for dose in ("0", doses[-1]))
        if top <= floor:
            how = f"{cell} does not rise with the dose: nothing to compare"
            return Contrast(0.0, -math.inf, math.inf, 0, math.inf, how)
        values = [value for dose in doses[:-1] for value in results.values(dose, cell)]
        shares[cell] = [(value - floor) / (top - floor) for value in values]
    return dose_response.difference(shares["z"], shares["ASR"], paired=True)


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def change_of_accuracy(results: Results) -> Contrast:
    """Clean accuracy of the poisoned encoders minus that of the clean ones."""
    clean, *poisoned = [row.name for row in results.table.rows]
    readings = [r for name in poisoned for r in results.cell(name, "CA").readings]
    cell = Cell("CA", tuple(dict.fromkeys(readings)))
    return results.compare_cells(cell, results.cell(clean, "CA"))
