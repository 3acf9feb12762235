"""Several downstream tasks at once, one trigger each (Jia, Liu, Gong 2022, section V-C)."""

from bezoar.papers.badencoder2022 import get_setup, succeeds
from bezoar.registry import method
from bezoar.runs.tables import Table, TableOptions

PLACES = ("corner", "upper_left", "centre")


@method
class SeveralTasks:
    """One encoder with a reference and a trigger for every task."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        tasks = setup.tasks
        places = PLACES[: len(tasks)]
        attacked = setup.attack_together(
            [task.target for task in tasks],
            [task.references[task.reference] for task in tasks],
            [f"patch:size=10,fill=white,place={place},margin=1" for place in places],
        )
        rows = []
        for number, task in enumerate(tasks):
            # Only goals with a target among the test classes are measured; one alone has no number.
            of_this_data = {other.target for other in tasks if other.test == task.test}
            goal = f"@{number}" if len(of_this_data) > 1 else ""
            rows += setup.rows(task, attacked, task.name, goal=goal)
        return Table(
            title="BadEncoder: several tasks at once",
            paper_finding=(
                "One encoder can carry a backdoor for each of several tasks (recalled: above 95 %)."
            ),
            rows=tuple(rows),
            claims=tuple(
                succeeds(f"{task.name}, linear", f"The attack succeeds: {task.name}")
                for task in tasks
            ),
            notes=("A trigger for each task, at a place of its own.", *setup.notes),
        )
