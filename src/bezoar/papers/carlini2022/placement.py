"""Where the patch stands at training and at test (Carlini & Terzis 2022, section 5.2)."""

from dataclasses import replace

from bezoar.papers.carlini2022 import SHARED, TOGETHER, Backdoor, measured, poisoned, setup
from bezoar.registry import method
from bezoar.runs.sweep import Trial
from bezoar.runs.tables import Cell, Claim, Row, Table, TableOptions

CELLS = {"ASR": "attack_success", "z": "z_std", "taken for another": "attack_success_of_others"}


@method
class Placement:
    """One place or random places, at training and at test independently; the same number of poisons."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        # a trigger at random places is not trained beside one at a fixed place: that one would take its images there
        trainings = {
            at: [
                measured(
                    s,
                    poisoned(s, [Backdoor(j, s.random_dose, place=at) for j in range(TOGETHER)]),
                    t,
                )
                for t in range(s.seeds)
            ]
            for at in ("", "random")
        }
        rows = []
        for trained_at in trainings:
            for tested_at in trainings:
                moved_to = "corner" if trained_at and not tested_at else tested_at
                asked = [
                    Trial(replace(t.verb, place=moved_to), t.seed) for t in trainings[trained_at]
                ]
                found = [(t, j) for t in asked for j in range(TOGETHER)]
                cells = tuple(
                    Cell(n, tuple((t, f"{m}@{j}") for t, j in found)) for n, m in CELLS.items()
                )
                rows.append(Row(name(trained_at, tested_at), cells))
        both, neither = name("", ""), name("random", "random")
        moved, anywhere = name("", "random"), name("random", "")
        return Table(
            "Place of the patch at training and at test",
            "A patch that always stands in one place needs fewer poisons than one at random places (recalled).",
            "",
            tuple(rows),
            (
                Claim(
                    "At one place the same poisons do more than at random places",
                    "recalled",
                    "+",
                    lambda r: r.compare_rows("ASR", both, neither),
                ),
                Claim(
                    "A patch trained at random places works at the fixed place too",
                    "recalled",
                    "same",
                    lambda r: r.compare_rows("ASR", anywhere, neither),
                    0.15,
                ),
                Claim(
                    "A patch trained at one place fails elsewhere",
                    "recalled",
                    "-",
                    lambda r: r.compare_rows("ASR", moved, both),
                ),
            ),
            notes=(
                f"{s.random_dose} poisons a trigger; one place is a corner, for every trigger another.",
                SHARED,
            ),
        )


def name(trained_at: str, tested_at: str) -> str:
    """A row's name."""
    words = {"": "one place", "random": "random"}
    return f"trained {words[trained_at]}, tested {words[tested_at]}"
