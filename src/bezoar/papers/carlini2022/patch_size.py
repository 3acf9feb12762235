"""Backdoor success and z-score against the size of the patch (Carlini & Terzis 2022, section 5.2)."""

from bezoar.evaluation.dose_response import Contrast
from bezoar.papers.carlini2022 import SHARED, TOGETHER, Backdoor, measured, poisoned, setup
from bezoar.registry import method
from bezoar.runs.tables import Cell, Claim, Results, Row, Table, TableOptions

CELLS = {"z": "z_std", "ASR": "attack_success", "taken for another": "attack_success_of_others"}


@method
class PatchSize:
    """Every size is met by every trigger, at one place and at random places."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        rows = []
        for curve, place, dose in (
            ("one place", "", s.dose),
            ("random places", "random", s.random_dose),
        ):
            trainings = []
            for t in range(max(len(s.sizes), s.seeds)):
                row = [
                    Backdoor(j, dose, s.sizes[(t + j) % len(s.sizes)], place)
                    for j in range(TOGETHER)
                ]
                trainings.append((measured(s, poisoned(s, row), t), row))
            for size in s.sizes:
                found = [
                    (t, j) for t, row in trainings for j, b in enumerate(row) if b.size == size
                ]
                cells = tuple(
                    Cell(n, tuple((t, f"{m}@{j}") for t, j in found)) for n, m in CELLS.items()
                )
                rows.append(Row(str(size), cells, size, curve))

        def gain(r: Results, cell: str, curve: str) -> Contrast:
            return r.compare_rows(cell, str(s.sizes[-1]), str(s.sizes[0]), curve)

        return Table(
            "Size of the patch",
            "A larger patch gives a higher z-score, the more so at random places (recalled).",
            "side of the patch in pixels",
            tuple(rows),
            (
                Claim(
                    "A larger patch gives a higher z-score: one place",
                    "recalled",
                    "+",
                    lambda r: gain(r, "z", "one place"),
                ),
                Claim(
                    "A larger patch gives a higher z-score: random places",
                    "recalled",
                    "+",
                    lambda r: gain(r, "z", "random places"),
                ),
            ),
            notes=(
                f"{s.dose} poisons a trigger at one place, {s.random_dose} at random places.",
                SHARED,
            ),
        )
