"""Choice of the reference input (Jia, Liu, Gong 2022, ablation)."""

from dataclasses import replace

from bezoar.papers.badencoder2022 import ablation, attacked, setup
from bezoar.registry import method
from bezoar.runs.tables import Table, TableOptions


@method
class Reference:
    """Chosen by margin, by nearness to the class's mean, the first of the class, and the published file."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        task = s.tasks[0]
        usual = attacked(s, task, "chosen")
        variants = [
            (rule, replace(usual, choose=rule)) for rule in ("confident", "central", "first")
        ]
        variants += [(n, attacked(s, task, n)) for n in task.references if n != "chosen"]
        return ablation(
            s,
            "BadEncoder: choice of the reference",
            "The choice makes no large difference (recalled).",
            variants,
        )
