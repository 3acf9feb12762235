"""Size of the trigger (Jia, Liu, Gong 2022, ablation)."""

from bezoar.papers.badencoder2022 import get_setup
from bezoar.registry import method
from bezoar.runs.tables import Claim, Row, Table, TableOptions, row_difference


@method
class TriggerSize:
    """A white square at the lower right, from small to large."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        task = setup.tasks[0]
        rows: list[Row] = []
        for size in setup.trigger_sizes:
            trigger = f"patch:size={size},fill=white,margin=1"
            rows += setup.rows(task, setup.attack_task(task, trigger=trigger), x=float(size))
        smallest, largest = f"{setup.trigger_sizes[0]:g}", f"{setup.trigger_sizes[-1]:g}"
        return Table(
            title="BadEncoder: size of the trigger",
            paper_finding="About 5x5 pixels on 32x32 suffice (recalled).",
            axis="side of the trigger in pixels",
            rows=tuple(rows),
            claims=(
                Claim(
                    "A larger trigger succeeds more",
                    "recalled",
                    "+",
                    row_difference("ASR", largest, smallest, "linear", paired=True),
                ),
            ),
            notes=setup.task_notes(task),
        )
