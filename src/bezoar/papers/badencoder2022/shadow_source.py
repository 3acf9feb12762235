"""Shadow data from another distribution than the pre-training data (Jia, Liu, Gong 2022, ablation)."""

from bezoar.papers.badencoder2022 import ablation, attacked, best, setup
from bezoar.registry import method
from bezoar.runs.tables import Table, TableOptions


@method
class ShadowSource:
    """A part of the pre-training data, and images from elsewhere."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        task = s.tasks[0]
        variants = [
            ("own", attacked(s, task, best(task))),
            ("other", attacked(s, task, best(task), shadow=s.other)),
        ]
        return ablation(
            s,
            "BadEncoder: source of the shadow data",
            "Another distribution still works (recalled).",
            variants,
            (f"Other: {s.other}.",),
        )
