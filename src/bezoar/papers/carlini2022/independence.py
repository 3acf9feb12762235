"""Whether attacks that share a training disturb each other, which the other tables rest on."""

from collections.abc import Callable

from bezoar.evaluation.dose_response import Contrast
from bezoar.papers.carlini2022 import TOGETHER, attack_cells, get_setup, select_attacks
from bezoar.registry import method
from bezoar.runs.tables import Cell, Claim, Results, Row, Table, TableOptions, mean_cells

ALONE = {"ASR": "attack_success", "z": "z_std"}
TOGETHER_COLUMNS = ALONE | {"taken for another": "attack_success_of_others"}


@method
class Independence:
    """The same triggers and doses alone in a training, and in the shared trainings of other tables.

    The doses are on the steep part of the curve. In a shared training, the other triggers have up
    to eight times a trigger's dose, and there are targeted victims too.
    """

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        trainings = setup.shared_trainings()
        doses = setup.doses[1:3]
        rows = []
        for dose in doses:
            alone = mean_cells(setup.single_trigger_trials(dose), ALONE)
            rows.append(Row(f"{dose} poisons, alone", alone))
            first_square = trainings[: len(setup.doses)]
            attacks = select_attacks(first_square, count=dose)
            attacks.sort(key=lambda attack: attack[1])  # in the order of the triggers, as above
            together = attack_cells(attacks, TOGETHER_COLUMNS)
            rows.append(Row(f"{dose} poisons, together", together))
        metric = f"targeted_success@{setup.caption_counts[-2]}"
        victims_alone = setup.evaluate_seeds(
            setup.poison([], setup.targeted_poison_of_all_counts())
        )
        victims_together = [training.trial for training in trainings]
        rows.append(Row("victims alone", (Cell.mean("targeted success", victims_alone, metric),)))
        rows.append(
            Row("victims, together", (Cell.mean("targeted success", victims_together, metric),))
        )

        def together_minus_alone(column: str) -> Callable[[Results], Contrast]:
            """By trigger and dose."""

            def contrast(results: Results) -> Contrast:
                together = [results.cell(f"{dose} poisons, together", column) for dose in doses]
                alone = [results.cell(f"{dose} poisons, alone", column) for dose in doses]
                return results.compare_cells(together, alone, paired=True)

            return contrast

        return Table(
            title="Independence of attacks that share a training",
            paper_finding="Not in the paper, which trains one model a trial.",
            rows=tuple(rows),
            claims=(
                Claim(
                    "Triggers do together what each does alone: success",
                    "design",
                    "same",
                    together_minus_alone("ASR"),
                    0.2,
                ),
                Claim(
                    "Triggers do together what each does alone: z-score",
                    "design",
                    "same",
                    together_minus_alone("z"),
                    0.5,
                ),
            ),
            notes=(
                f"{TOGETHER} triggers a training, each at a place of its own. Two triggers at one "
                "place are taken for each other: the one with fewer poisons is read as the "
                "other's target.",
            ),
        )
