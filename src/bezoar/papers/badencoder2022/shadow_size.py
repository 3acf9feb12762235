"""Size of the shadow data (Jia, Liu, Gong 2022, ablation)."""

from bezoar.papers import limit_records
from bezoar.papers.badencoder2022 import get_setup
from bezoar.registry import method
from bezoar.runs.tables import Claim, Row, Table, TableOptions, row_difference


@method
class ShadowSize:
    """The same number of passes over fewer images."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        task = setup.tasks[0]
        rows: list[Row] = []
        for count in setup.shadow_sizes:
            shadow = limit_records(setup.shadow, count)
            rows += setup.rows(task, setup.attack_task(task, shadow=shadow), x=float(count))
        fifth, most = setup.shadow_sizes[-2:]  # of the pre-training set, and as many as there are
        return Table(
            title="BadEncoder: size of the shadow data",
            paper_finding="A fifth of the pre-training set suffices (recalled).",
            axis="shadow images",
            rows=tuple(rows),
            claims=(
                Claim(
                    f"{fifth:,} shadow images do as well as {most:,}: success",
                    "recalled",
                    "same",
                    row_difference("ASR", f"{fifth:g}", f"{most:g}", "linear", paired=True),
                    0.1,
                ),
            ),
            notes=setup.task_notes(
                task, "The same passes over the shadow data, so fewer images take fewer steps."
            ),
        )
