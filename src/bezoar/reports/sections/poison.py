"""The page of a poison run: the goals, and poisoned records beside untouched ones."""

from functools import partial

import torch

from bezoar.data.stored_pairs import class_name
from bezoar.reports import metric_names, pictures
from bezoar.reports.page_parts import Gallery, Line, Section, Table, Tile
from bezoar.reports.run_page import Page, RunView
from bezoar.reports.shared_parts import GoalGroup, group_goals
from bezoar.runs.run import Run

RECORDS = 16  # shown of one group of goals
VICTIMS = 32


def build_page(run: Run) -> Page:
    """Return the page of a poison run."""
    view = RunView(run)
    return Page(
        headline(view),
        warning=(
            "These data were poisoned on purpose, to measure attacks and defences (plan "
            f"{view.notes.get('plan', 'unknown')}). Do not train an encoder on them that is to be "
            "used."
        ),
        cards=list(view.measures)[:6],
        sections={
            "What the attacker wants": partial(goals_section, view),
            "Poisoned records": partial(records_section, view),
            "Victims": partial(victims_section, view),
        },
        poisoned=bool(view.goals),
    )


def headline(view: RunView) -> str:
    """State the number of poisoned records and the attacker's goals."""
    poisons, rate = view.measures.get("poisons"), view.measures.get("poison_rate")
    if poisons is None or rate is None:
        return "This poisoning was not finished."
    return (
        f"{poisons.value:,.0f} of {poisons.n:,} records "
        f"({metric_names.format_percent(rate.value)}) are poisoned, so that an encoder trained on "
        f"them reads {metric_names.describe_goals(view.goals)}."
    )


def goals_section(view: RunView) -> Section | None:
    """List the goals: each backdoor, and the victims by their number of captions."""
    if not view.goals:
        return None
    rows = []
    for group in group_goals(view.goals):
        targets = sorted({g.target or "what they show (cover)" for g in group.goals})
        names = ", ".join(targets[:6]) + (", …" if len(targets) > 6 else "")
        goal = group.goals[0]
        trigger = goal.trigger or f"none; {metric_names.quantity(len(group.goals), 'victim')}"
        poisons = sum(g.poisons for g in group.goals)
        rows.append([pictures.shorten(c) for c in (names, trigger, f"{poisons:,}", goal.how)])
    return Section([Table(("To be read as", "Trigger", "Poisoned records", "Method"), rows, (2,))])


def records_section(view: RunView) -> Section | None:
    """Show some poisoned records beside the untouched ones."""
    galleries = [poison_gallery(view, group) for group in group_goals(view.data.plan.goals)]
    lead = "Left, the record as it was; right, as training reads it."
    return Section(galleries, lead) if galleries else None


def poison_gallery(view: RunView, group: GoalGroup, most: int = RECORDS) -> Gallery:
    """Show records that were poisoned for a group of goals, beside their sources.

    Args:
        view: The run; its data hold the plan.
        most: How many records are shown, shared out among the goals.
    """
    plan = view.data.plan
    per_goal = max(1, most // len(group.members))
    edits = []
    for member in group.members:
        edits += [e for e in plan.edits if e.goal == member][:per_goal]
    edits = edits[:most]
    poisons = pictures.take_records(view.data, [e.id for e in edits])
    sources = pictures.take_sources(view.data, [e.source for e in edits])
    poison_row = {k: i for i, k in enumerate(poisons.ids)}
    source_row = {k: i for i, k in enumerate(sources.ids)}
    edits = [e for e in edits if e.id in poison_row and e.source in source_row]
    tiles = []
    for i, edit in enumerate(edits):
        caption = sources.captions[source_row[edit.source]] if sources.captions else ""
        lines = [
            Line(pictures.shorten(caption or "(no caption)"), "old"),
            Line(pictures.shorten(edit.caption), "new"),
        ]
        tiles.append(Tile((i, len(edits) + i), lines))
    images = torch.cat(
        [
            sources.images[[source_row[e.source] for e in edits]],
            poisons.images[[poison_row[e.id] for e in edits]],
        ]
    )
    total = sum(e.goal in group.members for e in plan.edits)
    note = f"{len(edits)} of {metric_names.quantity(total, 'poisoned record')}"
    return pictures.contact_sheet(images, tiles, 80, group.title, note)


def victims_section(view: RunView) -> Section | None:
    """Show every victim with its class and the attacker's target."""
    targeted = [g for g in view.data.plan.goals if g.victims][:VICTIMS]
    if not targeted:
        return None
    goals, records = pictures.take_victims(view.data, targeted)
    tiles = []
    for i, goal in enumerate(goals):
        name = class_name(records, i) or pictures.shorten(goal.victims[0])
        lines = [
            Line(name, "muted"),
            Line("→ " + pictures.shorten(goal.target), "mark"),
            Line(metric_names.quantity(goal.poisons, "caption"), "muted"),
        ]
        tiles.append(Tile((i,), lines))
    lead = (
        "Each image is among the data with captions of another label, so that it is read as that "
        "label."
    )
    return Section([pictures.contact_sheet(records.images, tiles, 104)], lead)
