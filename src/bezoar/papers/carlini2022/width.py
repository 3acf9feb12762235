"""Success against the width of the image tower (Carlini & Terzis 2022, section 5.1: model size)."""

from bezoar.evaluation.dose_response import Contrast
from bezoar.papers.carlini2022 import SHARED, TOGETHER, Backdoor, measured, poisoned, setup
from bezoar.registry import make, method
from bezoar.runs.tables import Cell, Claim, Results, Row, Table, TableOptions, readings


@method
class Width:
    """The same poisons in towers from narrow to wide."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        backdoors = [Backdoor(j, s.dose) for j in range(TOGETHER)]
        many = f"targeted:captions={s.reference},victims={2 * TOGETHER}"
        rows = []
        for network in s.widths:
            trials = [
                measured(s, poisoned(s, backdoors, [many]), t, network) for t in range(s.seeds)
            ]
            each = [f"@{j}" for j in range(TOGETHER)]
            cells = (
                Cell("targeted success", readings(trials, f"targeted_success@{s.reference}")),
                Cell("ASR", readings(trials, *("attack_success" + j for j in each))),
                Cell("z", readings(trials, *("z_std" + j for j in each))),
                Cell("CA", readings(trials, "clean_accuracy")),
            )
            channels = float(getattr(make("network", network), "width", 0)) or None
            rows.append(Row(f"{channels:g}" if channels else network, cells, channels))

        def widest(r: Results, cell: str) -> Contrast:
            """Per doubling of the width; from the narrowest to the widest where a network has no such number."""
            return (
                r.trend(cell)
                if all(row.x for row in rows)
                else r.compare_rows(cell, rows[-1].name, rows[0].name)
            )

        return Table(
            "Width of the image tower",
            "Larger models are more susceptible.",
            "channels of the first convolution",
            tuple(rows),
            (
                Claim(
                    "A wider tower is more susceptible: targeted",
                    "summary",
                    "+",
                    lambda r: widest(r, "targeted success"),
                ),
                Claim(
                    "A wider tower is more susceptible: backdoor",
                    "summary",
                    "+",
                    lambda r: widest(r, "ASR"),
                ),
                Claim(
                    "A wider tower is more susceptible: z-score",
                    "summary",
                    "+",
                    lambda r: widest(r, "z"),
                ),
            ),
            notes=(
                f"{s.dose} poisons a trigger, {s.reference} captions a victim, the same epochs for all.",
                SHARED,
            ),
        )
