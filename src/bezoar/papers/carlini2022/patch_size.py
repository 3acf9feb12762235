"""Backdoor success and z-score against the size of the patch (Carlini & Terzis 2022, 5.2)."""

from bezoar.papers import carlini2022
from bezoar.registry import method
from bezoar.runs.tables import Claim, Row, Table, TableOptions, row_difference

COLUMNS = {"z": "z_std", "ASR": "attack_success", "taken for another": "attack_success_of_others"}


@method
class PatchSize:
    """Every trigger is trained at every size, at one place and at random places."""

    def __call__(self, options: TableOptions) -> Table:
        setup = carlini2022.get_setup(options)
        rows = rows_of_curve(setup, "one place", "", setup.dose)
        rows += rows_of_curve(setup, "random places", "random", setup.random_dose)

        smallest, largest = str(setup.patch_sizes[0]), str(setup.patch_sizes[-1])
        return Table(
            title="Size of the patch",
            paper_finding=(
                "A larger patch gives a higher z-score, the more so at random places (recalled)."
            ),
            axis="side of the patch in pixels",
            rows=tuple(rows),
            claims=tuple(
                Claim(
                    f"A larger patch gives a higher z-score: {curve}",
                    "recalled",
                    "+",
                    row_difference("z", largest, smallest, curve),
                )
                for curve in ("one place", "random places")
            ),
            notes=(
                f"{setup.dose} poisons a trigger at one place, {setup.random_dose} at random "
                "places.",
                carlini2022.SHARED_NOTE,
            ),
        )


def rows_of_curve(setup: carlini2022.Setup, curve: str, place: str, dose: int) -> list[Row]:
    """A row for each size of a patch at one place or at random places."""
    trainings = []
    count = max(len(setup.patch_sizes), setup.seeds)
    for seed, sizes in enumerate(carlini2022.rotate(setup.patch_sizes, count)):
        backdoors = tuple(
            carlini2022.Backdoor(j, dose, size, place) for j, size in enumerate(sizes)
        )
        trainings.append(
            carlini2022.Training(setup.evaluate(setup.poison(backdoors), seed), backdoors)
        )
    rows = []
    for size in setup.patch_sizes:
        attacks = carlini2022.select_attacks(trainings, size=size)
        rows.append(Row(str(size), carlini2022.attack_cells(attacks, COLUMNS), size, curve))
    return rows
