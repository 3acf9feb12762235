"""Whether attacks that share a training disturb each other: the design that all other tables stand on."""

from bezoar.evaluation.dose_response import Contrast
from bezoar.papers.carlini2022 import TOGETHER, alone, ladder, measured, poisoned, setup, victims
from bezoar.registry import method
from bezoar.runs.tables import Cell, Claim, Results, Row, Table, TableOptions, readings

CELLS = {"ASR": "attack_success", "z": "z_std"}


@method
class Independence:
    """The same triggers at the same doses alone in a training, and in the trainings that the other tables are read from.

    Doses from the steep part of the curve: beside them stand triggers of two to eight times their dose, and victims.
    """

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        rows = []
        for dose in s.doses[1:3]:
            rows.append(
                Row(
                    f"{dose} poisons, alone",
                    tuple(Cell(n, readings(alone(s, dose), m)) for n, m in CELLS.items()),
                )
            )
            found = sorted(
                (b.number, t)
                for t, row in ladder(s)[: len(s.doses)]
                for b in row
                if b.count == dose
            )
            cells = [Cell(n, tuple((t, f"{m}@{j}") for j, t in found)) for n, m in CELLS.items()]
            cells.append(
                Cell(
                    "taken for another",
                    tuple((t, f"attack_success_of_others@{j}") for j, t in found),
                )
            )
            rows.append(Row(f"{dose} poisons, together", tuple(cells)))
        most = s.counts[-2]
        only = [measured(s, poisoned(s, [], [victims(s)]), t) for t in range(s.seeds)]
        beside = [t for t, _ in ladder(s)]
        for name, trials in (("victims alone", only), ("victims, together", beside)):
            rows.append(
                Row(name, (Cell("targeted success", readings(trials, f"targeted_success@{most}")),))
            )

        def together(r: Results, cell: str) -> Contrast:
            """By trigger and dose: together less alone."""
            shared, single = (
                [r.cell(f"{d} poisons, {how}", cell) for d in s.doses[1:3]]
                for how in ("together", "alone")
            )
            return r.compare_cells(shared, single, paired=True)

        return Table(
            "Independence of attacks that share a training",
            "Not in the paper, which trains one model a trial.",
            "",
            tuple(rows),
            (
                Claim(
                    "Triggers do together what each does alone: success",
                    "design",
                    "same",
                    lambda r: together(r, "ASR"),
                    0.2,
                ),
                Claim(
                    "Triggers do together what each does alone: z-score",
                    "design",
                    "same",
                    lambda r: together(r, "z"),
                    0.5,
                ),
            ),
            notes=(
                f"{TOGETHER} triggers a training, each at a place of its own. Two at one place are taken for each other: "
                "the one with fewer poisons is read as the other's target.",
            ),
        )
