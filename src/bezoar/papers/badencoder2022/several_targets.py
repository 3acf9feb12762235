"""Several target classes of one task, each with a trigger of its own (Jia, Liu, Gong 2022, section V-C)."""

from bezoar.papers.badencoder2022 import HEADS, best, clean, gap, rows, setup
from bezoar.registry import method
from bezoar.runs.tables import Claim, Table, TableOptions
from bezoar.verbs.inject import Inject

OTHER = {"priority road": "stop", "striped star": "dotted heart"}
TRIGGERS = (
    "patch:size=10,fill=white,margin=1",
    "patch:size=10,fill=white,place=upper_left,margin=1",
)


@method
class SeveralTargets:
    """Two triggers, two targets, one encoder."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        task = s.tasks[0]
        targets = (task.target, OTHER[task.target])
        reference = task.references[best(task)]
        bad = Inject(clean(s), s.shadow, targets, (reference,) * 2, s.attack, TRIGGERS, "confident")
        found = [row for i, t in enumerate(targets) for row in rows(s, task, t, bad, goal=f"@{i}")]
        return Table(
            "BadEncoder: several targets of one task",
            "Several targets at once succeed as one does (recalled: above 95 %).",
            "",
            tuple(found),
            tuple(
                Claim(
                    f"The attack succeeds: {t}",
                    "recalled",
                    "+",
                    gap(f"{t}, linear", "ASR", "ASR-B"),
                )
                for t in targets
            ),
            notes=(f"Task {task.name}; heads {', '.join(HEADS)}.", *s.notes),
        )
