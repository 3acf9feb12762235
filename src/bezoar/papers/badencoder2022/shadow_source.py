"""Shadow data from another distribution than pre-training (Jia, Liu, Gong 2022, ablation)."""

from bezoar.papers.badencoder2022 import ablation, get_setup
from bezoar.registry import method
from bezoar.runs.tables import Table, TableOptions


@method
class ShadowSource:
    """A part of the pre-training data, and images from elsewhere."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        task = setup.tasks[0]
        return ablation(
            setup,
            "BadEncoder: source of the shadow data",
            "Another distribution still works (recalled).",
            {
                "own": setup.attack_task(task),
                "other": setup.attack_task(task, shadow=setup.other_shadow),
            },
            notes=(f"Other: {setup.other_shadow}.",),
        )
