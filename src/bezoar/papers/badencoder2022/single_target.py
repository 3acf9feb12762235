"""One target class of one downstream task (Jia, Liu, Gong 2022, section V-B; public logs)."""

from bezoar.papers.badencoder2022 import HEADS, get_setup, keeps_accuracy, succeeds
from bezoar.registry import method
from bezoar.runs.tables import Claim, Row, Table, TableOptions


@method
class SingleTarget:
    """Every task, with the published reference and with one chosen by rule, under every head."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        rows: list[Row] = []
        claims: list[Claim] = []
        for task in setup.tasks:
            for reference in task.references:
                name = f"{task.name}, {reference} reference"
                rows += setup.rows(task, setup.attack_task(task, reference), name)
                for row in (f"{name}, {head}" for head in HEADS):
                    claims.append(succeeds(row, f"The attack succeeds: {row}", "printed"))
                    claims.append(keeps_accuracy(row, f"Accuracy stays: {row}", "printed"))
        return Table(
            title="BadEncoder: one target",
            paper_finding=(
                "Triggered images are read as the target by every classifier built on the "
                "encoder, whose accuracy stays."
            ),
            rows=tuple(rows),
            claims=tuple(claims),
            notes=(
                "Printed numbers are epoch-500 values of the public logs, for the paper's MLP "
                "head and encoders pre-trained for 1000 epochs; its ASR counts images of the "
                "target class in (all), ours leaves them out.",
                *setup.notes,
            ),
        )
