"""The page of a check: scores beside those of clean images, and the flagged images."""

import functools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from bezoar.data.files.tensors import read_tensors
from bezoar.reports import charts, metric_names, pictures
from bezoar.reports.charts import Mark, Series
from bezoar.reports.metric_names import format_measure, format_percent
from bezoar.reports.page_parts import Figure, Gallery, Line, Section, Table, Tile
from bezoar.reports.record_tiles import Box, draw_frame
from bezoar.reports.run_page import Page, RunView, as_sentences
from bezoar.reports.shared_parts import measure_table
from bezoar.runs.run import Run
from bezoar.verbs.check import CLEAN_SCORES_FILE, FLAGGED_FILE, PICTURES_FILE, SCORES_FILE

FLAGGED = 50  # flagged images of a check that are listed
CARDS = ("caught", "auroc", "flagged", "expected_false_positives")
COLUMNS = ("flagged", "expected_false_positives", "false_positives", "caught", "auroc")
Columns = dict[str, NDArray[Any]]


class CheckView(RunView):
    """A check run."""

    @functools.cached_property
    def names(self) -> list[str]:
        """The checks, in the user's order."""
        return list(self.note_dict("checks"))

    @functools.cached_property
    def scores(self) -> Columns:
        """The scores of the checked images, by column."""
        return read_columns(self.run.file(SCORES_FILE))

    @functools.cached_property
    def clean_scores(self) -> Columns:
        """The scores of the clean images that set the thresholds, by column."""
        return read_columns(self.run.file(CLEAN_SCORES_FILE))

    @property
    def has_trigger(self) -> NDArray[np.bool_] | None:
        """For each image whether it carries a trigger; None if that is unknown."""
        return self.scores.get("triggered")


def read_columns(path: Path) -> Columns:
    """Read the columns of a Parquet file."""
    table = pq.read_table(path)
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def build_page(run: Run) -> Page:
    """Return the page of a check."""
    view = CheckView(run)
    if not view.names:
        return Page("This check was not finished.", poisoned=bool(view.goals))
    trigger = view.notes.get("trigger")
    return Page(
        headline(view),
        lead(view),
        f"Half of the images were given the trigger {trigger} to measure the checks."
        if trigger
        else "",
        [f"{name}.{key}" for name in view.names for key in CARDS][:4],
        {
            "Side by side": partial(comparison_section, view),
            "Scores": partial(score_section, view),
            **{
                f"Most suspicious to {name}": partial(suspicious_section, view, name)
                for name in view.names
            },
            "Flagged images": partial(flagged_section, view),
        },
        bool(view.goals),
    )


def headline(view: CheckView) -> str:
    """State how many images the first check flags."""
    name = view.names[0]
    flagged, caught = view.measures[f"{name}.flagged"], view.measures.get(f"{name}.caught")
    count, share = round(flagged.value * flagged.n), format_percent(flagged.value)
    sentence = f"{name} flags {count:,} of {flagged.n:,} images ({share})"
    if caught is None:
        return f"{sentence}."
    false_positives = format_percent(view.measures[f"{name}.false_positives"].value)
    return (
        f"{sentence}: {format_percent(caught.value)} of those with a trigger, {false_positives} of "
        "those without."
    )


def lead(view: CheckView) -> str:
    """Explain the meaning of a flag, and list omissions."""
    clean = view.note_dict("clean").get("thresholds", 0)
    expected = view.measures[f"{view.names[0]}.expected_false_positives"]
    sentences = (
        f"Of clean images like the {clean:,} that set the thresholds, {format_measure(expected)} "
        "are flagged too. A flag is a warning about the image, not about the encoder: a foreign "
        "patch can raise it where there is no backdoor. An image that is not flagged may still "
        "carry a trigger that these checks do not see."
    )
    limits = as_sentences((view.notes.get("limits") or [])[:1])
    return " ".join(filter(None, (sentences, limits, view.incomplete)))


def comparison_section(view: CheckView) -> Section | None:
    """Show several checks as the rows of a table."""
    if len(view.names) < 2:
        return None
    columns = {metric_names.label_and_unit(key)[0]: f"{{}}.{key}" for key in COLUMNS}
    rows = {name: [name] for name in view.names}
    table = measure_table(view.measures, "Check", rows, columns)
    return Section([table]) if table else None


def score_section(view: CheckView) -> Section:
    """Show a histogram of the scores for each check."""
    figures = []
    for name in view.names:
        values = view.scores[name]
        series = [Series("clean images", view.clean_scores[name], "good")]
        if view.has_trigger is None:
            series.append(Series("images checked", values, "clean"))
        else:
            series.append(Series("without trigger", values[~view.has_trigger], "clean"))
            series.append(Series("with trigger", values[view.has_trigger], "bad"))
        threshold = Mark(view.measures[f"{name}.threshold"].value, "threshold")
        svg = charts.draw_histogram(series, "score", threshold)
        note = "Higher is more suspicious. Images to the right of the threshold are flagged."
        figures.append(Figure(svg, name, note))
    return Section(figures)


def suspicious_section(view: CheckView, name: str) -> Section:
    """Show the images that a check scores highest."""
    images = read_tensors(view.run.file(PICTURES_FILE))[str(view.names.index(name))]
    if not images.numel():
        return suspicious_texts(view, name)
    return Section([suspicious_gallery(view, name, images)])


def suspicious_texts(view: CheckView, name: str) -> Section:
    """List the texts that a check flags, highest first."""
    rows = [
        [pictures.shorten(row["text"], 160), f"{row['score']:.3g}"]
        for row in view.read_json(FLAGGED_FILE)[name][:FLAGGED]
        if isinstance(row.get("text"), str)
    ]
    return Section([Table(["Flagged text", "Score"], rows, [1])]) if rows else Section(lead="None.")


def suspicious_gallery(view: CheckView, name: str, images: Tensor) -> Gallery:
    """Show the highest scored images, with a frame around the most suspicious window.

    Args:
        view: The run.
        name: The check.
        images: uint8 (N, 3, H, W), the N highest scored images, highest first.
    """
    values, ids = view.scores[name], view.scores["id"]
    order = sorted(range(len(values)), key=lambda i: (-values[i], ids[i]))[: len(images)]
    boxes = {row["id"]: row["box"] for row in view.read_json(FLAGGED_FILE)[name] if "box" in row}
    tiles, cells = [], []
    for rank, (row, image) in enumerate(zip(order, images, strict=True)):
        lines = [Line(pictures.shorten(ids[row], 40), "key")]
        if view.scores[f"{name}.flagged"][row]:
            lines.append(Line("flagged", "mark"))
        look = ""
        if view.has_trigger is not None:
            look = "bad" if view.has_trigger[row] else "good"
            lines.append(Line("trigger" if view.has_trigger[row] else "no trigger", look))
        lines.append(Line(f"score {values[row]:.3g}"))
        if label := view.scores["class"][row]:
            lines.append(Line(pictures.shorten(label, 40), "muted"))
        tiles.append(Tile((rank,), lines, look, f"{rank + 1}"))
        box = boxes.get(str(ids[row]))
        cells.append(draw_frame(image, scale_box(view, box, image) if box else None))
    note = "Framed: the window whose masking moves the embedding most." if boxes else ""
    return pictures.contact_sheet(torch.stack(cells), tiles, 104, note=note)


def scale_box(view: CheckView, box: list[int], picture: Tensor) -> Box:
    """Scale a window of the checked image to its stored picture (3, H, W)."""
    height = picture.shape[-2]
    scale = height / max(1, int(view.notes.get("side", height)))
    top, left, height, width = (round(n * scale) for n in box)
    return top, left, height, width


def flagged_section(view: CheckView) -> Section:
    """List the flagged images."""
    flagged = {name: view.read_json(FLAGGED_FILE)[name] for name in view.names}
    rows = [
        [pictures.shorten(image["id"], 80), name, f"{image['score']:.4g}"]
        for name, images in flagged.items()
        for image in images[:FLAGGED]
    ]
    if not rows:
        return Section(lead="None.")
    note = f"All scores are in {SCORES_FILE}."
    total = sum(map(len, flagged.values()))
    if total > len(rows):
        note = f"{total:,} images are flagged in all. {note}"
    return Section([Table(["Image", "Check", "Score"], rows, [2], note)])
