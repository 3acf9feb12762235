"""Choice of the reference input (Jia, Liu, Gong 2022, ablation)."""

from dataclasses import replace
from typing import Literal

from bezoar.papers.badencoder2022 import ablation, get_setup
from bezoar.registry import method
from bezoar.runs.tables import Table, TableOptions
from bezoar.verbs.inject import Inject

RULES: tuple[Literal["confident", "central", "first"], ...] = ("confident", "central", "first")


@method
class Reference:
    """Chosen by margin or nearness to the class's mean, the first, and the published file."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        task = setup.tasks[0]
        usual = setup.attack_task(task, "chosen")
        variants: dict[str, Inject] = {rule: replace(usual, choose=rule) for rule in RULES}
        for name in task.references:
            if name != "chosen":
                variants[name] = setup.attack_task(task, name)
        return ablation(
            setup,
            "BadEncoder: choice of the reference",
            "The choice makes no large difference (recalled).",
            variants,
        )
