"""Backdoor success against the number of distinct source images (after Carlini & Terzis 2022)."""

from bezoar.papers.carlini2022 import (
    SHARED_NOTE,
    Backdoor,
    Training,
    attack_cells,
    get_setup,
    rotate,
    select_attacks,
)
from bezoar.registry import method
from bezoar.runs.tables import Claim, Row, Table, TableOptions, row_difference


@method
class Sources:
    """The same number of poisons, made of one image or of many; captions differ in either case."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        dose = setup.doses[-2]
        image_counts = tuple(sorted({max(1, dose // part) for part in (dose, 16, 4, 1)}))
        trainings = []
        for seed, counts in enumerate(rotate(image_counts, max(setup.seeds, len(image_counts)))):
            backdoors = tuple(
                Backdoor(j, dose, options=f"sources={count}") for j, count in enumerate(counts)
            )
            trainings.append(Training(setup.evaluate(setup.poison(backdoors), seed), backdoors))
        rows = []
        for count in image_counts:
            attacks = select_attacks(trainings, options=f"sources={count}")
            cells = attack_cells(attacks, {"ASR": "attack_success", "z": "z_std"})
            rows.append(Row(str(count), cells, count))
        most, fewest = rows[-1].name, rows[0].name
        return Table(
            title="Number of distinct source images",
            paper_finding=(
                "The paper stamps its patch on as many images as there are poisons; it prints "
                "nothing on fewer."
            ),
            axis="distinct images",
            rows=tuple(rows),
            claims=(
                Claim(
                    "More distinct images give more success",
                    "direction of ours",
                    "+",
                    row_difference("ASR", most, fewest),
                ),
            ),
            notes=(f"{dose} poisons a trigger.", SHARED_NOTE),
        )
