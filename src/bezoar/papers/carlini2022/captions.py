"""How the poisons' captions are made (Carlini & Terzis 2022, section 4.1: caption sets)."""

from bezoar.papers.carlini2022 import SHARED_NOTE, Backdoor, get_setup
from bezoar.registry import method
from bezoar.runs.tables import Cell, Claim, Row, Table, TableOptions, row_difference

WAYS = ("training", "templates", "repeated")
TRIGGERS = 3


@method
class Captions:
    """Training captions that contain the target, the 80 templates, or one caption repeated."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        goals = range(TRIGGERS)
        rows = []
        for way in WAYS:
            backdoors = [Backdoor(j, setup.dose, options=f"captions={way}") for j in goals]
            targeted = setup.targeted_poison(4 * setup.victims, f"texts={way}")
            trials = setup.evaluate_seeds(setup.poison(backdoors, targeted))
            cells = (
                Cell.mean("targeted success", trials, setup.targeted_success),
                Cell.mean("ASR", trials, *(f"attack_success@{j}" for j in goals)),
                Cell.mean("z", trials, *(f"z_std@{j}" for j in goals)),
            )
            rows.append(Row(way, cells))
        return Table(
            title="Construction of the captions",
            paper_finding=(
                "The paper describes captions from the training set and from templates; both do "
                "alike (recalled)."
            ),
            rows=tuple(rows),
            claims=(
                Claim(
                    "Templates do as well as training captions: targeted",
                    "recalled",
                    "same",
                    row_difference("targeted success", "templates", "training"),
                    0.2,
                ),
                Claim(
                    "Templates do as well as training captions: backdoor",
                    "recalled",
                    "same",
                    row_difference("ASR", "templates", "training"),
                    0.2,
                ),
                Claim(
                    "One caption repeated does less than many: backdoor",
                    "direction of ours",
                    "-",
                    row_difference("ASR", "repeated", "training"),
                ),
            ),
            notes=(
                f"{setup.dose} poisons a trigger, {setup.captions} captions a victim.",
                SHARED_NOTE,
            ),
        )
