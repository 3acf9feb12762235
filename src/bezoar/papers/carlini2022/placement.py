"""Where the patch is at training and at test (Carlini & Terzis 2022, section 5.2)."""

from bezoar.papers import carlini2022
from bezoar.registry import method
from bezoar.runs.tables import Claim, Row, Table, TableOptions, row_difference

COLUMNS = {"ASR": "attack_success", "z": "z_std", "taken for another": "attack_success_of_others"}
PLACES = {"": "one place", "random": "random"}


@method
class Placement:
    """One place or random places, at training and at test; the same number of poisons."""

    def __call__(self, options: TableOptions) -> Table:
        setup = carlini2022.get_setup(options)
        rows = []
        # A trigger at random places is never trained beside one at a fixed place, which would be
        # mistaken for it there.
        for training_place in PLACES:
            backdoors = [
                carlini2022.Backdoor(j, setup.random_dose, place=training_place)
                for j in range(carlini2022.TOGETHER)
            ]
            trials = setup.evaluate_seeds(setup.poison(backdoors))
            for test_place in PLACES:
                moved_to = "corner" if training_place and not test_place else test_place
                moved = [carlini2022.change_verb(trial, place=moved_to) for trial in trials]
                cells = carlini2022.attack_cells(carlini2022.all_attacks(moved), COLUMNS)
                rows.append(Row(row_name(training_place, test_place), cells))
        fixed, random = row_name("", ""), row_name("random", "random")
        fixed_to_random, random_to_fixed = row_name("", "random"), row_name("random", "")
        return Table(
            title="Place of the patch at training and at test",
            paper_finding=(
                "A patch that is always at one place needs fewer poisons than one at random "
                "places (recalled)."
            ),
            rows=tuple(rows),
            claims=(
                Claim(
                    "At one place the same poisons do more than at random places",
                    "recalled",
                    "+",
                    row_difference("ASR", fixed, random),
                ),
                Claim(
                    "A patch trained at random places works at the fixed place too",
                    "recalled",
                    "same",
                    row_difference("ASR", random_to_fixed, random),
                    0.15,
                ),
                Claim(
                    "A patch trained at one place fails elsewhere",
                    "recalled",
                    "-",
                    row_difference("ASR", fixed_to_random, fixed),
                ),
            ),
            notes=(
                f"{setup.random_dose} poisons a trigger; one place is a corner, another one for "
                "every trigger.",
                carlini2022.SHARED_NOTE,
            ),
        )


def row_name(training_place: str, test_place: str) -> str:
    """The name of a row."""
    return f"trained {PLACES[training_place]}, tested {PLACES[test_place]}"
