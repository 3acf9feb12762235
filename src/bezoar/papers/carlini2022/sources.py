"""Backdoor success against the number of distinct images that the poisons are made of (after Carlini & Terzis 2022)."""

from bezoar.evaluation.dose_response import Contrast
from bezoar.papers.carlini2022 import SHARED, TOGETHER, Backdoor, measured, poisoned, setup
from bezoar.registry import method
from bezoar.runs.tables import Cell, Claim, Results, Row, Table, TableOptions


@method
class Sources:
    """The same number of poisons, made of one image or of many; captions differ all the same."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        dose = s.doses[-2]
        images = tuple(sorted({max(1, dose // d) for d in (dose, 16, 4, 1)}))
        trainings = []
        for t in range(max(s.seeds, len(images))):
            row = []
            for j in range(TOGETHER):
                m = images[(t + j) % len(images)]
                row.append(
                    Backdoor(j, dose, size=s.patch, poison=f"backdoor:count={dose},sources={m}")
                )
            trainings.append(
                (
                    measured(s, poisoned(s, row), t),
                    [images[(t + j) % len(images)] for j in range(TOGETHER)],
                )
            )
        rows = []
        for m in images:
            found = [(t, j) for t, row in trainings for j, of in enumerate(row) if of == m]
            cells = tuple(
                Cell(n, tuple((t, f"{k}@{j}") for t, j in found))
                for n, k in (("ASR", "attack_success"), ("z", "z_std"))
            )
            rows.append(Row(str(m), cells, m))

        def most(r: Results) -> Contrast:
            return r.compare_rows("ASR", rows[-1].name, rows[0].name)

        return Table(
            "Number of distinct source images",
            "The paper stamps its patch on as many images as there are poisons; what fewer would do is not printed.",
            "distinct images",
            tuple(rows),
            (Claim("More distinct images give more success", "direction of ours", "+", most),),
            notes=(f"{dose} poisons a trigger.", SHARED),
        )
