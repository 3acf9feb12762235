"""Parts that the pages of several verbs show."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bezoar.attacks.plan import Goal
from bezoar.attacks.stamping import stamp_records
from bezoar.data.pairs import Pairs
from bezoar.evaluation.scores import Measure
from bezoar.reports import charts, pictures
from bezoar.reports.charts import Series
from bezoar.reports.metric_names import format_measure, label_and_unit, quantity, trigger_name
from bezoar.reports.page_parts import Figure, Table
from bezoar.reports.run_page import RunView
from bezoar.runs.inputs import recorded_trigger


def measure_table(
    measures: Mapping[str, Measure],
    title: str,
    rows: Mapping[str, Sequence[str]],
    columns: Mapping[str, str],
    note: str = "",
) -> Table | None:
    """Return a table of metrics with their intervals, without empty rows and columns.

    Args:
        measures: The metrics.
        title: The head of the first column.
        rows: For each row its label, and the texts that complete the names of its metrics.
        columns: For each column its head, and the name of its metrics as a format string.
        note: A sentence below the table.

    Returns:
        The table, or None if there are none of these metrics.
    """
    cells: dict[str, list[str]] = {}
    for label, texts in rows.items():
        keys = [template.format(*texts) for template in columns.values()]
        cells[label] = [
            format_measure(measures[key], label_and_unit(key)[1]) if key in measures else ""
            for key in keys
        ]
    filled_rows = {label: row for label, row in cells.items() if any(row)}
    used = [i for i in range(len(columns)) if any(row[i] for row in filled_rows.values())]
    if not used:
        return None
    heads = list(columns)
    return Table(
        [title, *(heads[i] for i in used)],
        [[label, *(row[i] for i in used)] for label, row in filled_rows.items()],
        range(1, len(used) + 1),
        note,
    )


def loss_figure(view: RunView, size: tuple[float, float] = charts.WIDE) -> Figure:
    """Show the loss of a training, step by step."""
    losses = view.read_tensors("ledger.safetensors")["losses"]
    svg = charts.draw_loss(losses, size)
    return Figure(svg, "Loss", "Thin line: each step; thick line: running mean.")


def encoder_strips(clean: Sequence[float], attacked: Iterable[tuple[str, float]]) -> list[Series]:
    """Return rows of a strip chart: the clean encoders, then the attacked ones by attack.

    Args:
        clean: A value for each clean encoder.
        attacked: Attack and value of each attacked encoder.
    """
    by_attack: dict[str, list[float]] = {}
    for attack, value in sorted(attacked, key=lambda pair: pair[0]):
        by_attack.setdefault(attack, []).append(value)
    strips = [Series(f"clean ({len(clean)})", clean, "clean")]
    for attack, values in by_attack.items():
        strips.append(Series(f"{pictures.shorten(attack, 32)} ({len(values)})", values, "bad"))
    return strips


@dataclass(frozen=True)
class GoalGroup:
    """Goals that are shown together: a backdoor, or victims with equally many captions."""

    title: str  # the goals in words
    members: list[int]  # their indices among all goals
    goals: list[Goal]


def group_goals(goals: Sequence[Goal]) -> list[GoalGroup]:
    """Group goals: each backdoor alone, then victims by method and number of captions."""
    groups = []
    for index, goal in enumerate(goals):
        if goal.trigger:
            name = trigger_name(goal).capitalize()
            target = f"read as “{pictures.shorten(goal.target)}”"
            title = f"{name} trigger, {'captions kept (cover)' if goal.is_cover else target}"
            groups.append(GoalGroup(title, [index], [goal]))
        elif goal.query:
            query, target = pictures.shorten(goal.query), pictures.shorten(goal.target)
            title = f"Texts with “{query}”, images of “{target}”"
            groups.append(GoalGroup(title, [index], [goal]))
    kinds = {(g.poisons, g.how) for g in goals if not g.trigger and not g.query}
    for poisons, how in sorted(kinds, reverse=True):
        members = [
            i for i, g in enumerate(goals) if not g.trigger and (g.poisons, g.how) == (poisons, how)
        ]
        victims = quantity(len(members), "victim")
        title = f"{victims}, {quantity(poisons, 'caption')} each"
        groups.append(GoalGroup(title, members, [goals[i] for i in members]))
    return groups


def triggered_texts(
    view: RunView, goal: Goal, records: Pairs, references: Sequence[str] = ()
) -> Table:
    """List the reference texts of a goal, then records of texts with its trigger."""
    trigger = recorded_trigger(goal.trigger or "", view.run)
    rows = [("reference", text) for text in references]
    rows += [("with the trigger", text) for text in stamp_records(trigger, records).captions]
    cells = [[kind, pictures.shorten(text, 120)] for kind, text in rows]
    return Table(("", f"To be read as “{pictures.shorten(goal.target)}”"), cells)
