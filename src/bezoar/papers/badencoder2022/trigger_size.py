"""Size of the trigger (Jia, Liu, Gong 2022, ablation)."""

from bezoar.papers.badencoder2022 import attacked, best, rows, setup
from bezoar.registry import method
from bezoar.runs.tables import Claim, Table, TableOptions


@method
class TriggerSize:
    """A white square at the lower right, from small to large."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        task = s.tasks[0]
        found = []
        for size in s.sizes:
            bad = attacked(s, task, best(task), trigger=f"patch:size={size},fill=white,margin=1")
            found += rows(s, task, "", bad, float(size))
        small, large = f"{s.sizes[0]:g}", f"{s.sizes[-1]:g}"
        return Table(
            "BadEncoder: size of the trigger",
            "About 5x5 pixels on 32x32 suffice (recalled).",
            "side of the trigger in pixels",
            tuple(found),
            (
                Claim(
                    "A larger trigger succeeds more",
                    "recalled",
                    "+",
                    lambda r: r.compare_rows("ASR", large, small, "linear", True),
                ),
            ),
            notes=(f"Task {task.name}, target {task.target!r}.", *s.notes),
        )
