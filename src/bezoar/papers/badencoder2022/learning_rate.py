"""Learning rate of the injection (Jia, Liu, Gong 2022, ablation)."""

from dataclasses import replace

from bezoar.papers.badencoder2022 import ablation, attacked, best, setup
from bezoar.registry import make, method, spec
from bezoar.runs.tables import Table, TableOptions


@method
class LearningRate:
    """The scale's own, a tenth, and ten times."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        task, usual = s.tasks[0], make("attack", s.attack)
        rates = (usual.lr, usual.lr / 10, usual.lr * 10)
        variants = [
            (f"lr {lr:g}", attacked(s, task, best(task), attack=spec(replace(usual, lr=lr))))
            for lr in rates
        ]
        paper, large = "A large learning rate harms accuracy (recalled).", variants[-1][0]
        return ablation(
            s, "BadEncoder: learning rate", paper, variants, expected={large: {"BA": "-"}}
        )
