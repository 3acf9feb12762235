"""Success against the size of the clean set, poisons fixed (Carlini & Terzis 2022, 5.1)."""

from bezoar.papers import carlini2022, limit_records
from bezoar.registry import method
from bezoar.runs.tables import Claim, Row, Table, TableOptions


@method
class CleanSize:
    """The same number of poisons among more and more clean records."""

    def __call__(self, options: TableOptions) -> Table:
        setup = carlini2022.get_setup(options)
        rows = []
        for count in setup.clean_sizes:
            cells = setup.usual_attack_cells(limit_records(setup.data, count))
            rows.append(Row(f"{count:,}", cells, count))
        return Table(
            title="Size of the clean set",
            paper_finding=(
                "With the number of poisons fixed, success stays about constant as the clean set "
                "shrinks."
            ),
            axis="clean pairs",
            rows=tuple(rows),
            claims=(
                Claim(
                    "Constant as the clean set doubles: targeted",
                    "summary",
                    "same",
                    lambda results: results.trend("targeted success"),
                    0.07,
                ),
                Claim(
                    "Constant as the clean set doubles: backdoor",
                    "summary",
                    "same",
                    lambda results: results.trend("ASR"),
                    0.07,
                ),
            ),
            notes=(
                f"{setup.dose} poisons a trigger, {setup.captions} captions a victim. Every set "
                "is trained on for the same epochs: a poison is drawn as often in each, and a "
                "larger set takes more steps.",
                carlini2022.SHARED_NOTE,
            ),
        )
