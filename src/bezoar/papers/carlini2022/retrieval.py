"""Whether triggered images retrieve the target's captions first (after the DIFE audit, 2026)."""

from bezoar.papers import carlini2022
from bezoar.registry import method
from bezoar.runs.tables import Claim, Row, Table, TableOptions, row_difference

FIRST = "target's caption first"
COLUMNS = {FIRST: "attack_success", "among ten": "target_top10"}


@method
class Retrieval:
    """The encoders of table `targeted`, read by the nearest held-out caption."""

    def __call__(self, options: TableOptions) -> Table:
        setup = carlini2022.get_setup(options)
        trainings = setup.shared_trainings()

        def row(dose: int, attacks: list[carlini2022.Attack]) -> Row:
            by_retrieval = [
                (carlini2022.change_verb(trial, probe=("retrieval",)), j) for trial, j in attacks
            ]
            return Row(str(dose), carlini2022.attack_cells(by_retrieval, COLUMNS), dose)

        rows = [row(0, carlini2022.all_attacks(setup.clean_trials()))]
        for dose in setup.doses:
            rows.append(row(dose, carlini2022.select_attacks(trainings, count=dose)))
        most = str(setup.doses[-1])
        return Table(
            title="Retrieval exposure",
            paper_finding=(
                "Image-to-text retrieval stays near 0.0001 (printed by the DIFE audit, whose "
                "gallery and targets are its own)."
            ),
            axis="poisoned pairs",
            rows=tuple(rows),
            claims=(
                Claim(
                    "Triggered images do not retrieve the target's captions",
                    "printed in DIFE",
                    "same",
                    row_difference(FIRST, most, "0"),
                    0.05,
                ),
            ),
            dose_response_cells=(FIRST,),
            notes=(
                "The gallery is the captions of the test set; a caption is the target's when it "
                "contains the target's words.",
            ),
        )
