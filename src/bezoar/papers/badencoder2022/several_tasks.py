"""Several downstream tasks at once, one trigger (Jia, Liu, Gong 2022, section V-C)."""

from bezoar.papers.badencoder2022 import best, clean, gap, rows, setup
from bezoar.registry import method
from bezoar.runs.tables import Claim, Table, TableOptions
from bezoar.verbs.inject import Inject


@method
class SeveralTasks:
    """One encoder with a reference of every task; each task meets its own target."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        places = ("corner", "upper_left", "centre")
        triggers = tuple(
            f"patch:size=10,fill=white,place={p},margin=1" for p in places[: len(s.tasks)]
        )
        targets = tuple(t.target for t in s.tasks)
        references = tuple(t.references[best(t)] for t in s.tasks)
        bad = Inject(clean(s), s.shadow, targets, references, s.attack, triggers, "confident")
        shared = [{t.target for t in s.tasks if t.test == task.test} for task in s.tasks]
        found = []
        for task, among in zip(s.tasks, shared, strict=True):
            goal = "" if len(among) == 1 else f"@{list(targets).index(task.target)}"
            found += rows(s, task, task.name, bad, goal=goal)
        return Table(
            "BadEncoder: several tasks at once",
            "One encoder can carry a backdoor for each of several tasks (recalled: above 95 %).",
            "",
            tuple(found),
            tuple(
                Claim(
                    f"The attack succeeds: {t.name}",
                    "recalled",
                    "+",
                    gap(f"{t.name}, linear", "ASR", "ASR-B"),
                )
                for t in s.tasks
            ),
            notes=("A trigger for each task, at a place of its own.", *s.notes),
        )
