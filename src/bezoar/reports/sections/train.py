"""The page of a train run: the loss, success by epoch, and how often poisons were drawn."""

import itertools
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bezoar.data.files.artefacts import read_lines
from bezoar.reports import charts, metric_names
from bezoar.reports.charts import Series
from bezoar.reports.page_parts import Figure, Section, Table
from bezoar.reports.run_page import Page, RunView
from bezoar.reports.shared_parts import group_goals, loss_figure
from bezoar.runs.run import Run


def build_page(run: Run) -> Page:
    """Return the page of a train run."""
    view = RunView(run)
    return Page(
        headline(view),
        warning=warning(view),
        cards=["final_loss", "poisons_kept", "poison_exposures"],
        sections={
            "Training": partial(training_section, view),
            "What was seen": partial(exposure_section, view),
        },
        poisoned=bool(view.goals),
    )


def warning(view: RunView) -> str:
    """Warn that the encoder was trained on poisons, or that its data held some."""
    poisons = view.measures.get("poisons_kept")
    if not view.goals:
        return ""
    if poisons is not None and poisons.value == 0:
        return "The data of this encoder were poisoned; the keep-list left out every known poison."
    count = f"{poisons.value:,.0f} poisoned records" if poisons else "poisoned data"
    return f"This encoder was trained on {count}, on purpose. Use it for measurements only."


def headline(view: RunView) -> str:
    """State the number of records and steps, and how many records were poisoned."""
    records, steps = view.notes.get("records"), view.notes.get("steps")
    if records is None or steps is None:
        return "This training was not finished."
    poisons, draws = view.measures.get("poisons_kept"), view.measures.get("poison_exposures")
    sentence = f"Trained on {records:,} records in {steps:,} steps"
    if poisons is None:
        return f"{sentence}; none is known to be poisoned."
    sentence += f", {poisons.value:,.0f} of them poisoned"
    if draws is not None and poisons.value:
        average = draws.value / poisons.value
        sentence += f"; each poison was drawn {average:.1f} times on average"
    return f"{sentence}."


def training_section(view: RunView) -> Section:
    """Show the loss, and success by epoch if it was measured."""
    progress = progress_figure(view)
    if progress is None:
        return Section([loss_figure(view)])
    return Section([loss_figure(view, charts.HALF), progress])


def progress_figure(view: RunView) -> Figure | None:
    """Show accuracy, ASR and targeted success after each epoch; None if they were not measured."""
    log = view.read_log()
    if not log:
        return None
    keys = [
        key
        for name in ("clean_accuracy", "attack_success", "targeted_success")
        for key in metric_names.variants(log[0], name)
    ]
    if not keys:
        return None
    series = [
        Series(metric_names.short_label(key), [e.get(key, np.nan) for e in log], colour)
        for key, colour in zip(keys, itertools.cycle(charts.SERIES_COLOURS), strict=False)
    ]
    svg = charts.draw_curves([e["epoch"] for e in log], series, "epoch")
    return Figure(
        svg, "When the attack takes hold", "Measured on held-out images after each epoch."
    )


def exposure_section(view: RunView) -> Section:
    """Show how often poisons and clean records were drawn."""
    draws = view.read_tensors("ledger.safetensors")["exposures"]  # (N,)
    ids = trained_ids(view)
    if len(ids) != len(draws):
        raise ValueError(f"the ledger counts {len(draws)} records, the data have {len(ids)}")
    is_poison = view.data.plan.mask(ids)
    series = [Series("clean records", draws[~is_poison], "clean")]
    if is_poison.any():
        series.append(Series("poisoned records", draws[is_poison], "bad"))
    svg = charts.draw_histogram(series, "times a record was drawn", size=charts.WIDE)
    figure = Figure(svg, "Exposure ledger", "The share of each group by number of draws.")
    if not is_poison.any():
        return Section([figure])
    lead = "Every draw of every record was counted."
    return Section([figure, exposure_table(view, ids, draws)], lead)


def exposure_table(view: RunView, ids: list[str], draws: NDArray[np.int64]) -> Table:
    """Return the draws of each group of goals and of the clean records."""
    plan = view.data.plan
    goal_of = {e.id: e.goal for e in plan.edits}
    goal = np.array([goal_of.get(k, -1) for k in ids])
    rows = []
    for group in group_goals(plan.goals):
        group_draws = draws[np.isin(goal, group.members)]
        planned = sum(g.poisons for g in group.goals)
        victims = len(group.goals) if group.goals[0].victims else 0
        trained = f"{len(group_draws):,} of {planned:,}"
        rows.append([group.title, trained, *draw_cells(group_draws, victims)])
    clean_draws = draws[goal < 0]
    rows.append(["clean records", f"{len(clean_draws):,}", *draw_cells(clean_draws, 0)])
    head = ("Records", "Trained on", "Draws", "Draws a record", "Draws a victim")
    return Table(head, rows, (1, 2, 3, 4))


def draw_cells(draws: NDArray[np.int64], victims: int) -> list[str]:
    """Return the draws in all, for each record, and for each victim if there are any."""
    total = int(draws.sum())
    return [
        f"{total:,}",
        f"{total / len(draws):.2f}" if len(draws) else "–",
        f"{total / victims:.1f}" if victims else "–",
    ]


def trained_ids(view: RunView) -> list[str]:
    """Return the ids of the records trained on, in the order of the ledger."""
    data, plan = view.data, view.data.plan
    clean_ids = list(data.clean.ids)
    present = set(clean_ids)
    additions = [e for e in plan.edits if e.id not in present]
    ids = clean_ids + [e.id for e in additions if e.source in present]
    if data.victims is not None:
        victim_ids = set(data.victims.ids)
        ids += [e.id for e in plan.edits if e.source in victim_ids]
    keep = view.run.input_run("keep")
    if keep is None:
        return ids
    keep_list = set(read_lines(keep.file("keep.txt")))
    return [k for k in ids if k in keep_list]
