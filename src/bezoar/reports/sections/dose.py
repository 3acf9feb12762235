"""The page of a dose run: success by dose, and how many poisons it takes."""

from bezoar.reports.metric_names import quantity
from bezoar.reports.run_page import Page
from bezoar.reports.sections.reproduce import WARNING, ReproduceView, table_sections
from bezoar.runs.run import Run


def build_page(run: Run) -> Page:
    """Return the page of a dose run."""
    view = ReproduceView(run)
    is_done = view.manifest["status"] == "done"
    unfinished = "This sweep was not finished; the same command goes on with it."
    trainings = quantity(int(view.notes.get("trainings", 0)), "training")
    purchase = str(view.notes.get("purchase", ""))
    return Page(
        str(view.notes.get("law", unfinished)),
        f"From {trainings}.{f' {purchase[:1].upper()}{purchase[1:]}.' if purchase else ''}",
        WARNING,
        ["dose_for_50_percent", "dose_for_90_percent"],
        dict(table_sections(view)) if is_done else {},
        bool(view.goals),
    )
