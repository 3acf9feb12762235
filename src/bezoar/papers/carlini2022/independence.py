"""Whether attacks that share a training disturb each other: the design that all other tables stand on."""

from bezoar import laws
from bezoar.laws import Contrast
from bezoar.papers.carlini2022 import TOGETHER, Backdoor, measured, poisoned, setup, victims
from bezoar.registry import method
from bezoar.tables import Cell, Claim, Given, Results, Row, Table

CELLS = {"ASR": "attack_success", "z": "z_std"}


@method
class Independence:
    """The same triggers alone in a training, together, and together with targeted victims; the same seeds."""

    def __call__(self, given: Given) -> Table:
        """The table at a scale."""
        s = setup(given)
        backdoors = [Backdoor(j, s.dose) for j in range(TOGETHER)]
        alone = [measured(s, poisoned(s, [b]), j) for j, b in enumerate(backdoors)]
        together = [measured(s, poisoned(s, backdoors), t) for t in range(s.seeds)]
        beside = [measured(s, poisoned(s, backdoors, [victims(s)]), t) for t in range(s.seeds)]
        only = [measured(s, poisoned(s, [], [victims(s)]), t) for t in range(s.seeds)]
        most = s.counts[-2]
        rows = [Row("alone", tuple(Cell(n, tuple((t, m) for t in alone)) for n, m in CELLS.items()))]
        for name, trials in (("together", together), ("together, with victims", beside)):
            cells = [Cell(n, tuple((t, f"{m}@{j}") for j in range(TOGETHER) for t in trials)) for n, m in CELLS.items()]
            if trials is beside:
                cells.append(Cell("targeted success", tuple((t, f"targeted_success@{most}") for t in trials)))
            rows.append(Row(name, tuple(cells)))
        rows.append(Row("victims alone", (Cell("targeted success", tuple((t, f"targeted_success@{most}") for t in only)),)))

        def between(r: Results, row: str, cell: str) -> Contrast:
            """By trigger: the mean over its trainings here, less alone."""
            here = r.values(row, cell)
            means = [sum(here[j * s.seeds : (j + 1) * s.seeds]) / s.seeds for j in range(TOGETHER)]
            return laws.difference(means, r.values("alone", cell), paired=True)

        return Table(
            "Independence of attacks that share a training",
            "Not in the paper, which trains one model a trial.",
            "",
            tuple(rows),
            (
                Claim(
                    f"{TOGETHER} triggers together do what each does alone",
                    "design",
                    "same",
                    lambda r: between(r, "together", "ASR"),
                    0.2,
                ),
                Claim(
                    "Targeted victims beside them change nothing",
                    "design",
                    "same",
                    lambda r: between(r, "together, with victims", "ASR"),
                    0.2,
                ),
            ),
            notes=(f"{s.dose} poisons a trigger.",),
        )
