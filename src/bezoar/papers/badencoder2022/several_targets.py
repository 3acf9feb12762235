"""Several target classes of one task, a trigger for each (Jia, Liu, Gong 2022, section V-C)."""

from bezoar.papers.badencoder2022 import HEADS, WHITE_PATCH, get_setup, succeeds
from bezoar.registry import method
from bezoar.runs.tables import Table, TableOptions

SECOND_TARGET = {"priority road": "stop", "striped star": "dotted heart"}
TRIGGERS = (WHITE_PATCH, "patch:size=10,fill=white,place=upper_left,margin=1")


@method
class SeveralTargets:
    """Two triggers, two targets, one encoder."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        task = setup.tasks[0]
        targets = (task.target, SECOND_TARGET[task.target])
        reference = task.references[task.reference]
        attacked = setup.attack_together(targets, (reference, reference), TRIGGERS)
        rows = []
        for number, target in enumerate(targets):
            rows += setup.rows(task, attacked, target, goal=f"@{number}")
        return Table(
            title="BadEncoder: several targets of one task",
            paper_finding="Several targets at once succeed as one does (recalled: above 95 %).",
            rows=tuple(rows),
            claims=tuple(succeeds(f"{t}, linear", f"The attack succeeds: {t}") for t in targets),
            notes=(f"Task {task.name}; heads {', '.join(HEADS)}.", *setup.notes),
        )
