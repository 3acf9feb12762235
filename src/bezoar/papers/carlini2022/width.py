"""Success against the width of the image tower (Carlini & Terzis 2022, section 5.1: model size)."""

from collections.abc import Callable

from bezoar.evaluation.dose_response import Contrast
from bezoar.papers import carlini2022
from bezoar.registry import make, method
from bezoar.runs.tables import Claim, Results, Row, Table, TableOptions, row_difference

CLAIMS = {"targeted": "targeted success", "backdoor": "ASR", "z-score": "z"}


@method
class Width:
    """The same poisons in image towers from narrow to wide."""

    def __call__(self, options: TableOptions) -> Table:
        setup = carlini2022.get_setup(options)
        rows = []
        for network in setup.networks:
            cells = setup.usual_attack_cells(network=network)
            channels = float(getattr(make("network", network), "width", 0)) or None
            rows.append(Row(f"{channels:g}" if channels else network, cells, channels))

        def rise(cell: str) -> Callable[[Results], Contrast]:
            """Per doubling of the width; or from narrowest to widest if networks have no width."""
            if all(row.x for row in rows):
                return lambda results: results.trend(cell)
            return row_difference(cell, rows[-1].name, rows[0].name)

        return Table(
            title="Width of the image tower",
            paper_finding="Larger models are more susceptible.",
            axis="channels of the first convolution",
            rows=tuple(rows),
            claims=tuple(
                Claim(f"A wider tower is more susceptible: {label}", "summary", "+", rise(cell))
                for label, cell in CLAIMS.items()
            ),
            notes=(
                f"{setup.dose} poisons a trigger, {setup.captions} captions a victim, the same "
                "epochs for all.",
                carlini2022.SHARED_NOTE,
            ),
        )
