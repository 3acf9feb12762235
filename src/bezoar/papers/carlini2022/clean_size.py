"""Success against the size of the clean set, at a fixed number of poisons (Carlini & Terzis 2022, section 5.1)."""

from dataclasses import replace

from bezoar.papers.carlini2022 import SHARED, TOGETHER, Backdoor, measured, poisoned, setup
from bezoar.registry import make, method, spec
from bezoar.runs.tables import Cell, Claim, Row, Table, TableOptions, readings


@method
class CleanSize:
    """The poisons stay as many; what is around them grows."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        backdoors = [Backdoor(j, s.dose) for j in range(TOGETHER)]
        many = f"targeted:captions={s.reference},victims={2 * TOGETHER}"
        data = make("data", s.data)
        size = "limit" if hasattr(data, "limit") else "count"
        rows = []
        for count in s.sets:
            part = spec(replace(data, **{size: count}))
            trials = [measured(s, poisoned(s, backdoors, [many], part), t) for t in range(s.seeds)]
            each = [f"@{j}" for j in range(TOGETHER)]
            cells = (
                Cell("targeted success", readings(trials, f"targeted_success@{s.reference}")),
                Cell("ASR", readings(trials, *("attack_success" + j for j in each))),
                Cell("z", readings(trials, *("z_std" + j for j in each))),
                Cell("CA", readings(trials, "clean_accuracy")),
            )
            rows.append(Row(f"{count:,}", cells, count))

        return Table(
            "Size of the clean set",
            "With the number of poisons fixed, success stays about constant as the clean set shrinks.",
            "clean pairs",
            tuple(rows),
            (
                Claim(
                    "Constant as the clean set doubles: targeted",
                    "summary",
                    "same",
                    lambda r: r.trend("targeted success"),
                    0.07,
                ),
                Claim(
                    "Constant as the clean set doubles: backdoor",
                    "summary",
                    "same",
                    lambda r: r.trend("ASR"),
                    0.07,
                ),
            ),
            notes=(
                f"{s.dose} poisons a trigger, {s.reference} captions a victim; every set is trained on for the same epochs, "
                "so that a poison is drawn as often, and a larger set means more steps.",
                SHARED,
            ),
        )
