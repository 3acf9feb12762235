"""One target class of one downstream task (Jia, Liu, Gong 2022, tables of section V-B; public logs)."""

from bezoar.papers.badencoder2022 import attacked, gap, rows, setup
from bezoar.registry import method
from bezoar.runs.tables import Claim, Table, TableOptions


@method
class SingleTarget:
    """Every task, with the published reference and with one chosen by rule, under every head."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        found, claims = [], []
        for task in s.tasks:
            for how in task.references:
                name = f"{task.name}, {how} reference"
                found += rows(s, task, name, attacked(s, task, how))
                for head in ("linear", "knn", "mlp"):
                    row = f"{name}, {head}"

                    claims.append(
                        Claim(
                            f"The attack succeeds: {row}", "printed", "+", gap(row, "ASR", "ASR-B")
                        )
                    )
                    claims.append(
                        Claim(
                            f"Accuracy stays: {row}", "printed", "same", gap(row, "BA", "CA"), 0.02
                        )
                    )
        return Table(
            "BadEncoder: one target",
            "Triggered images are read as the target by every classifier built on the encoder, whose accuracy stays.",
            "",
            tuple(found),
            tuple(claims),
            notes=(
                "Printed numbers are epoch-500 values of the public logs, for the paper's MLP head and encoders pre-trained "
                "for 1000 epochs; its ASR counts images of the target class in (all), ours leaves them out.",
                *s.notes,
            ),
        )
