"""How the poisons' captions are made (Carlini & Terzis 2022, section 4.1: caption sets)."""

from bezoar.evaluation.dose_response import Contrast
from bezoar.papers.carlini2022 import SHARED, Backdoor, measured, poisoned, setup
from bezoar.registry import method
from bezoar.runs.tables import Cell, Claim, Results, Row, Table, TableOptions, readings

WAYS = ("training", "templates", "repeated")


@method
class Captions:
    """Captions of the training set that hold the target, the 80 templates, or one caption again and again."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        trials: dict[str, list] = {w: [] for w in WAYS}
        for t in range(s.seeds):
            for w in WAYS:
                row = [
                    Backdoor(j, s.dose, poison=f"backdoor:count={s.dose},captions={w}")
                    for j in range(len(WAYS))
                ]
                many = f"targeted:captions={s.reference},victims={4 * s.victims},texts={w}"
                trials[w].append(measured(s, poisoned(s, row, [many]), t))
        rows = []
        for w in WAYS:
            each = [f"@{j}" for j in range(len(WAYS))]
            cells = (
                Cell("targeted success", readings(trials[w], f"targeted_success@{s.reference}")),
                Cell("ASR", readings(trials[w], *("attack_success" + j for j in each))),
                Cell("z", readings(trials[w], *("z_std" + j for j in each))),
            )
            rows.append(Row(w, cells))

        def beside(r: Results, way: str, cell: str) -> Contrast:
            return r.compare_rows(cell, way, "training")

        return Table(
            "Construction of the captions",
            "Captions from the training set or from templates: both are described, and serve alike (recalled).",
            "",
            tuple(rows),
            (
                Claim(
                    "Templates serve as well as training captions: targeted",
                    "recalled",
                    "same",
                    lambda r: beside(r, "templates", "targeted success"),
                    0.2,
                ),
                Claim(
                    "Templates serve as well as training captions: backdoor",
                    "recalled",
                    "same",
                    lambda r: beside(r, "templates", "ASR"),
                    0.2,
                ),
                Claim(
                    "One caption repeated does less than many: backdoor",
                    "direction of ours",
                    "-",
                    lambda r: beside(r, "repeated", "ASR"),
                ),
            ),
            notes=(f"{s.dose} poisons a trigger, {s.reference} captions a victim.", SHARED),
        )
