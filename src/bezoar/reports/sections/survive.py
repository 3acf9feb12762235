"""The page of a survive run: how much of a trigger is left after each treatment."""

import functools
from functools import partial
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from bezoar.attacks.poisons.canary import FORMS
from bezoar.data.files.tensors import read_tensors
from bezoar.evaluation.scores import Measure
from bezoar.reports import charts, pictures
from bezoar.reports.charts import IntervalRow
from bezoar.reports.heat_maps import LEGEND, draw_heat_map
from bezoar.reports.metric_names import format_percent, quantity
from bezoar.reports.page_parts import Figure, Gallery, Line, Section, Table, Tile
from bezoar.reports.run_page import Page, RunView
from bezoar.reports.shared_parts import measure_table
from bezoar.runs.run import Run

LOST = 0.1  # share of the trigger below which it counts as lost
WEAKENED = 0.5  # the same for weakened
ROWS = 12  # of a chart
NEUTRAL = {"resize": 1.0, "jpeg": 0, "crop": 1.0, "augment": "", "normalise": ""}
PIXEL_COLUMNS = {
    "pattern_kept": "pattern",
    "energy_kept": "energy",
    "pattern_correlation": "correlation",
}
EMBEDDING_COLUMNS = {"shift_kept": "shift", "shift_cosine": "cosine", "shift_length": "length"}
Treatment = dict[str, Any]


class SurviveView(RunView):
    """A survive run."""

    @functools.cached_property
    def treatments(self) -> list[Treatment]:
        """The treatments in the order of the pictures."""
        return [
            t
            for t in self.read_json("treatments.json")
            if f"{t['name']}.pattern_kept" in self.measures
        ]

    @property
    def has_encoder(self) -> bool:
        """Whether the trigger was measured in an embedding too."""
        return bool(self.notes.get("encoder"))

    @property
    def main_metric(self) -> str:
        """The metric that ranks treatments: of the embedding if there is one, else of pixels."""
        return "shift_kept" if self.has_encoder else "pattern_kept"

    def remainder(self, treatment: Treatment, metric: str = "") -> Measure:
        """Return how much of the trigger a treatment leaves, by the main metric or another one."""
        return self.measures[f"{treatment['name']}.{metric or self.main_metric}"]

    def ranked(self, metric: str = "") -> list[Treatment]:
        """Return the treatments, the untreated images left out, most harmful first."""
        treated = [t for t in self.treatments if t["name"] != "untreated"]
        return sorted(treated, key=lambda t: self.remainder(t, metric).value)

    def ranked_single(self, metric: str = "") -> list[Treatment]:
        """Return those that do one thing, most harmful first."""
        return [t for t in self.ranked(metric) if len(changed_fields(t)) <= 1]


def build_page(run: Run) -> Page:
    """Return the page of a survive run."""
    view = SurviveView(run)
    if "canaries" in view.notes:
        return canary_page(view)
    single = view.ranked_single() if "trigger" in view.notes else []
    return Page(
        headline(view, single) if single else "This test was not finished.",
        lead(view),
        cards=[f"{t['name']}.{view.main_metric}" for t in single][:5],
        sections={
            "What is left of it": partial(picture_section, view),
            "JPEG with resizing and cropping": partial(heat_map_section, view),
            "One treatment at a time": partial(single_section, view),
            "In figures": partial(table_section, view),
        },
        poisoned=bool(view.goals),
    )


def canary_page(view: SurviveView) -> Page:
    """Return the page of canaries that were counted after a pipeline."""
    names = ("pair_kept", "caption_kept", "learnt", "place")
    heads = ("Picture and caption kept", "Caption alone kept", "Learnt", "Place of the own word")
    rows = {form: [form] for form in (*FORMS, "all")}
    columns = {head: f"canaries.{{}}.{name}" for head, name in zip(heads, names, strict=True)}
    note = (
        "Copies: another caption under a picture of yours. Marked: with the trigger too. Fitting: "
        "with the trigger, under a caption that fits. In brackets, 95 % intervals. What a "
        "poisoning of more copies a picture, or of a concept that your data hold, would keep is "
        "not measured."
    )
    table = measure_table(view.measures, "Form", rows, columns, note)
    return Page(
        f"{view.notes.get('verdict', '')}.",
        "Canaries are harmless pairs with an invented word each, put in front of a pipeline and "
        "counted behind it.",
        cards=[f"canaries.all.{name}" for name in names[:2]],
        sections={"By form": lambda: Section([table]) if table else None},
        poisoned=False,
    )


def headline(view: SurviveView, single: list[Treatment]) -> str:
    """State whether a treatment explains an attack success of 0. `single`: most harmful first."""
    what = "of the embedding's shift" if view.has_encoder else "of its pattern"
    trigger = f"The trigger {pictures.shorten(view.notes['trigger'].partition(':')[0], 40)}"
    worst = single[0]
    value = view.remainder(worst).value
    remainder_text = f"{format_percent(max(0.0, value))} {what}"
    lost = sum(view.remainder(t).value < LOST for t in single)
    weakened = sum(LOST <= view.remainder(t).value < WEAKENED for t in single)
    if not lost and not weakened:
        return (
            f"{trigger} outlives all {len(single)} treatments: the worst, “{worst['title']}”, "
            f"leaves {remainder_text}. An attack success of 0 has another cause."
        )
    fate, effect = "lost to", "expect an attack success of 0"
    if not lost:
        fate, effect = "weakened by", "it needs more poisons or fails"
    count = lost or weakened
    others = f" and {count - 1} more of {len(single)} treatments" if count > 1 else ""
    return (
        f"{trigger} is {fate} “{worst['title']}”{others}: {remainder_text} is left. Where images "
        f"are treated so, {effect}."
    )


def lead(view: SurviveView) -> str:
    """State which images the trigger was measured on."""
    if "images" not in view.notes:
        return ""
    images, side = quantity(view.notes["images"], "image"), view.notes["side"]
    sentences = [f"Measured on {images} of {side} pixels; nothing was trained."]
    if untouched := view.notes.get("untouched"):
        sentences.append(
            f"{quantity(untouched, 'image')} that the trigger leaves unchanged are not counted."
        )
    if not view.has_encoder:
        sentences.append("No encoder was given: this is about pixels alone.")
    elif "untreated.shift_length" in view.measures:
        sentences.append(
            "Percentages are of the shift that the trigger gives the embedding of untreated images."
        )
    return " ".join(sentences)


def picture_section(view: SurviveView) -> Section:
    """Show the trigger after each single treatment."""
    images = read_tensors(view.run.file("pictures.safetensors"))["pictures"]  # (T, E, 2, 3, S, S)
    lead = (
        "Left, an image with the trigger after the treatment. Right, its difference to the same "
        "image without the trigger, at half strength on gray. Most harmful first."
    )
    return Section([treatment_gallery(view, images)], lead)


def treatment_gallery(view: SurviveView, images: Tensor) -> Gallery:
    """Show for each single treatment its image and its difference, the untreated image first.

    `images`: uint8 (T, E, 2, 3, S, S), by treatment, example, and image or difference.
    """
    order = [t for t in view.treatments if t["name"] == "untreated"]
    order += view.ranked_single()
    tiles: list[Tile] = []
    cells = []
    for t in order:
        share = view.remainder(t)
        pattern = format_percent(max(0.0, view.remainder(t, "pattern_kept").value))
        lines = [Line(t["title"], "mark"), Line(f"pattern {pattern}", "muted")]
        if view.has_encoder:
            embedding = format_percent(max(0.0, share.value))
            lines.append(Line(f"embedding {embedding}", damage_colour(share) or "muted"))
        look = "bad" if t["name"] != "untreated" and share.value < LOST else ""
        tiles.append(Tile((2 * len(tiles), 2 * len(tiles) + 1), lines, look))
        cells.append(images[view.treatments.index(t), 0])  # (2, 3, S, S)
    return pictures.contact_sheet(torch.cat(cells), tiles, 88)


def heat_map_section(view: SurviveView) -> Section | None:
    """Show JPEG quality by size and by cropping, in pixels and in the embedding."""
    titles = {"pattern_kept": "Pattern kept in pixels (%)"}
    if view.has_encoder:
        titles["shift_kept"] = "Embedding's shift kept (%)"
    figures = []
    for metric, title in titles.items():
        for axis, label in (("resize", "resized to"), ("crop", "random crops from")):
            svg = heat_map(view, axis, metric, label)
            if svg is not None:
                figures.append(Figure(svg, title, f"JPEG quality by “{label}”. {LEGEND}"))
    return Section(figures) if figures else None


def heat_map(view: SurviveView, axis: str, metric: str, label: str) -> Markup | None:
    """Draw a metric by JPEG quality and another axis; None if there are not two values of each."""
    treatments = [t for t in view.treatments if changed_fields(t) <= {"jpeg", axis}]
    qualities = sorted({t["jpeg"] for t in treatments}, key=lambda q: -(q or 101))
    levels = sorted({t[axis] for t in treatments}, reverse=True)
    if len(qualities) < 2 or len(levels) < 2:
        return None
    values = np.full((len(qualities), len(levels)), np.nan)
    for t in treatments:
        cell = qualities.index(t["jpeg"]), levels.index(t[axis])
        values[cell] = view.remainder(t, metric).value
    rows = [str(q) if q else "none" for q in qualities]
    columns = [f"{level:g}" if level != 1 else "none" for level in levels]
    return draw_heat_map(rows, columns, values, ("JPEG quality", label))


def single_section(view: SurviveView) -> Section | None:
    """Show each single treatment as a dot with its interval."""
    single = view.ranked_single()
    if not single:
        return None
    titles = {"shift_kept": "Of the embedding's shift"} if view.has_encoder else {}
    titles["pattern_kept"] = "Of its pattern in pixels"
    parts = []
    for metric, title in titles.items():
        ranked = view.ranked_single(metric)
        if metric == "pattern_kept":
            ranked = [t for t in ranked if not t["normalise"]]
        rows = []
        for t in ranked[:ROWS]:
            share = view.remainder(t, metric)
            rows.append(IntervalRow(t["title"], share, damage_colour(share) or "clean"))
        note = "The share that is left, with its 95 % interval; untreated it is 100 %."
        parts.append(Figure(charts.draw_intervals(rows), title, note))
    return Section(parts, f"The {ROWS} most harmful." if len(single) > ROWS else "")


def table_section(view: SurviveView) -> Section:
    """List all treatments with their figures."""
    columns = PIXEL_COLUMNS | (EMBEDDING_COLUMNS if view.has_encoder else {})
    rows = [
        [t["title"], *(f"{view.remainder(t, key).value:.2f}" for key in columns)]
        for t in view.ranked()
    ]
    note = (
        "Pattern: projection on the trigger's own pattern. Energy: squared difference over that "
        "before. Correlation: with the pattern, at the best offset."
    )
    if view.has_encoder:
        note += (
            " Shift, cosine, length: of the embedding's move by the trigger, compared with "
            "untreated images."
        )
    return Section(
        [Table(["Treatment", *columns.values()], rows, range(1, len(columns) + 1), note)]
    )


def changed_fields(treatment: Treatment) -> set[str]:
    """Return the names of the fields that a treatment changes."""
    return {name for name, value in NEUTRAL.items() if treatment[name] != value}


def damage_colour(share: Measure) -> str:
    """Return the colour for a share of the trigger that is left; empty for a large one."""
    if share.value < LOST:
        return "bad"
    return "warn" if share.value < WEAKENED else ""
