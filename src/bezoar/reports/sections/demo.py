"""The page of a demo: the story of poisoned data, or of a backdoor put into an encoder.

A story is made of sections of its runs' pages.
"""

import functools
from dataclasses import replace
from functools import partial

from bezoar.reports import charts, dose_charts, pictures
from bezoar.reports.metric_names import (
    format_percent,
    format_rate_in_full,
    group_label,
    quantity,
    short_label,
    variants,
)
from bezoar.reports.page_parts import Figure, Line, Part, Section, Text, Tile
from bezoar.reports.run_page import Page, RunView
from bezoar.reports.run_page import build_page as build_run_page
from bezoar.reports.sections import evaluate, inject, poison, scan, train
from bezoar.reports.shared_parts import group_goals, loss_figure
from bezoar.runs.run import Run

RECORDS = 8  # poisoned records of a group of goals
CLASSES = 40  # classes with an example picture
PATCH = "images with a small patch"


class DemoView(RunView):
    """A demo with the runs it made. `attack`: the evaluation of the attacked encoder."""

    def training(self, name: str) -> RunView:
        """Return one of the trainings: `clean`, `poisoned` or `repaired`."""
        return RunView(self.run.sibling(self.notes["trained"][name]))

    @functools.cached_property
    def attack(self) -> evaluate.EvaluateView:
        """The evaluation of the attacked encoder."""
        name = self.notes["attacked" if self.ask.get("story") == "encoder" else "poisoned"]
        return evaluate.EvaluateView(self.run.sibling(name))


def build_page(run: Run) -> Page:
    """Return the page of a demo, by its story."""
    view = DemoView(run)
    page = encoder_page(view) if view.ask.get("story") == "encoder" else data_page(view)
    return replace(page, warning=page.warning if view.goals else "", poisoned=bool(view.goals))


def data_page(view: DemoView) -> Page:
    """Return the story of poisoned data: from clean data to a repaired encoder."""
    return Page(
        data_headline(view),
        build_run_page(view.attack.run).lead if "poisoned" in view.notes else "",
        "The data and two of the three encoders of this story were poisoned on purpose.",
        data_cards(view),
        {
            "1 · Clean data": partial(clean_data_section, view),
            "2 · The poison": partial(poison_section, view),
            "3 · The attack": partial(attack_section, view),
            "4 · The scan": partial(scan_section, view),
            "5 · After repair": partial(repair_section, view),
        },
    )


def data_headline(view: DemoView) -> str:
    """State the success of the attack, the scan's recall, and the success after repair."""
    attack, twin = view.metric("poisoned.attack_success"), view.metric("clean.attack_success")
    removed, rest = view.metric("scan.poisons_removed"), view.metric("repaired.attack_success")
    if attack is None or twin is None or removed is None or rest is None:
        return "This demonstration was not finished."
    goal = next((g for g in view.goals if g.trigger), None)
    target, poisons = (goal.target, goal.poisons) if goal else ("the target", 0)
    records, success = quantity(poisons, "poisoned record"), format_percent(attack.value)
    if attack.low > twin.high:
        effect = f"{records} made an encoder read {success} of {PATCH} as “{target}”"
    else:
        effect = f"{records} did not take hold: an encoder reads {success} of {PATCH} as “{target}”"
    return (
        f"{effect}, where its clean twin reads {format_percent(twin.value)}; the scan found "
        f"{format_percent(removed.value)} of all poisons, and training again without them leaves "
        f"{format_percent(rest.value)}."
    )


def data_cards(view: DemoView) -> list[str]:
    """Return accuracy and success of the three encoders, and the scan's recall."""
    names = [
        "clean.clean_accuracy",
        "poisoned.clean_accuracy",
        "poisoned.attack_success",
        "poisoned.attack_success_baseline",
        "poisoned.z_std",
        *variants(view.measures, "poisoned.targeted_success"),
        "scan.poisons_removed",
        "repaired.attack_success",
        "repaired.clean_accuracy",
    ]
    return [name if name in view.measures else f"{name}@0" for name in names]


def clean_data_section(view: DemoView) -> Section | None:
    """Show one picture of each class."""
    records = view.training("clean").data.clean
    if records.labels is None:
        return None
    first_row: dict[int, int] = {}
    for row, label in enumerate(records.labels.tolist()):
        if label >= 0:
            first_row.setdefault(label, row)
    labels = sorted(first_row)[:CLASSES]
    tiles = [Tile((i,), [Line(records.classes[label], "muted")]) for i, label in enumerate(labels)]
    gallery = pictures.contact_sheet(records.images[[first_row[k] for k in labels]], tiles, 64)
    lead = (
        f"{quantity(len(records), 'picture')} with captions, {len(records.classes)} classes; one "
        "of each is shown."
    )
    if (accuracy := view.metric("clean.clean_accuracy")) is not None:
        lead += (
            f" An encoder trained on these alone reads {format_rate_in_full(accuracy)} of held-out "
            "images right."
        )
    caption = f"A caption: “{pictures.shorten(records.captions[0])}”"
    return Section([gallery, Text(caption)], lead)


def poison_section(view: DemoView) -> Section | None:
    """Show the attacker's additions."""
    run = view.training("poisoned").run.ancestor("poison")
    if run is None:
        return None
    poison_view = RunView(run)
    galleries = [
        poison.poison_gallery(poison_view, group, RECORDS)
        for group in group_goals(poison_view.data.plan.goals)
    ]
    return Section(galleries, poison.headline(poison_view))


def attack_section(view: DemoView) -> Section:
    """Show when the attack took hold, the readings of triggered images, and the victims."""
    progress = train.progress_figure(view.training("poisoned"))
    triggered = evaluate.triggered_section(view.attack, charts.HALF)
    parts: list[Part] = [progress] if progress else []
    parts += triggered.parts if triggered else ()
    if victims := evaluate.victims_section(view.attack):
        parts += [Text(victims.lead), *victims.parts]
    page = build_run_page(view.attack.run)
    return Section(parts, f"{page.headline} {page.lead}")


def scan_section(view: DemoView) -> Section:
    """Show how the poisons were found."""
    scan_view = scan.ScanView(view.run.sibling(view.notes["scan"]))
    sections = (
        scan.ranking_section(scan_view),
        scan.keep_list_section(scan_view),
        scan.worst_section(scan_view),
    )
    parts = [part for section in sections if section for part in section.parts]
    page = build_run_page(scan_view.run)
    return Section(parts, f"{page.headline} {page.lead}")


def repair_section(view: DemoView) -> Section | None:
    """Show accuracy and success of the clean, the poisoned and the repaired encoder."""
    targeted = variants(view.measures, "poisoned.targeted_success")
    names = ["clean_accuracy", "attack_success", *(k.removeprefix("poisoned.") for k in targeted)]
    series = [
        (title, colour, [view.metric(f"{group}.{name}") for name in names])
        for title, colour, group in (
            ("clean twin", "clean", "clean"),
            ("poisoned", "bad", "poisoned"),
            ("repaired", "good", "repaired"),
        )
    ]
    if not any(m for _, _, measures in series for m in measures):
        return None
    labels = [short_label(name) for name in names]
    svg = dose_charts.draw_levels(labels, series, "rate", size=charts.WIDE)
    poisons = view.training("repaired").measures.get("poisons_kept")
    lead = "Trained again without the records that the scan removed"
    if poisons:
        lead += f", {quantity(int(poisons.value), 'poison')} still among the rest"
    success = view.metric("repaired.attack_success")
    if success:
        lead += f": {format_rate_in_full(success)} of triggered images are read as the target"
    return Section([Figure(svg, "Before and after, with 95 % intervals")], f"{lead}.")


def encoder_page(view: DemoView) -> Page:
    """Return the story of a backdoor that is put into an encoder."""
    warning = "A backdoor was put into one of the two encoders of this story, on purpose."
    if "attacked" not in view.notes:
        return Page("This demonstration was not finished.", warning=warning)
    attack = view.attack
    success = [
        f"{group_label(head)} {format_percent(m.value)}"
        for head in attack.heads
        if (m := attack.measures.get(f"{head}.attack_success"))
    ]
    names = [
        f"attacked.{head}.{name}"
        for head in attack.heads
        for name in ("clean_accuracy", "attack_success")
    ]
    return Page(
        build_run_page(attack.run).headline,
        f"{evaluate.accuracy_finding(attack)} Success by head: {', '.join(success)}. The heads "
        "were fixed before the attack.",
        warning,
        [*names, "inject.clean_similarity"],
        {
            "1 · An encoder is pre-trained": partial(pretraining_section, view),
            "2 · What the attacker wants": partial(injection_goals_section, view),
            "3 · What the attack does to vectors": partial(injection_section, view),
            "4 · Every classifier built on it": partial(evaluate.heads_section, attack),
            "5 · Triggered images": partial(evaluate.triggered_section, attack, charts.HALF),
        },
    )


def pretraining_section(view: DemoView) -> Section:
    """Show the loss of the clean encoder."""
    training = view.training("clean")
    return Section([loss_figure(training)], train.headline(training))


def injection_goals_section(view: DemoView) -> Section:
    """Show the references and triggered images."""
    return inject.goals_section(inject.InjectView(view.run.sibling(view.notes["inject"])))


def injection_section(view: DemoView) -> Section:
    """Show cosines before and after the attack."""
    injected = inject.InjectView(view.run.sibling(view.notes["inject"]))
    section = inject.similarity_section(injected)
    return replace(section, lead=inject.headline(injected))
