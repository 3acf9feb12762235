"""Learning rate of the injection (Jia, Liu, Gong 2022, ablation)."""

from bezoar.papers.badencoder2022 import ablation, get_setup
from bezoar.registry import make, method
from bezoar.runs.tables import Table, TableOptions


@method
class LearningRate:
    """The scale's own, a tenth of it, and ten times it."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        task = setup.tasks[0]
        usual = make("attack", setup.attack).lr
        variants = {
            f"lr {lr:g}": setup.attack_task(task, attack=setup.change_attack(lr=lr))
            for lr in (usual, usual / 10, usual * 10)
        }
        return ablation(
            setup,
            "BadEncoder: learning rate",
            "A large learning rate harms accuracy (recalled).",
            variants,
            expected={f"lr {usual * 10:g}": {"BA": "-"}},
        )
