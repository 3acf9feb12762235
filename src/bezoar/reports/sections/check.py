"""The page of a check: what was flagged and what that means, scores beside clean ones, the most suspicious images."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from bezoar.reports import charts, metric_names, pictures
from bezoar.reports.charts import Series
from bezoar.reports.page_parts import Figure, Figures, Gallery, Line, Section, Table, Tile
from bezoar.reports.record_tiles import draw_frame
from bezoar.reports.run_page import Chapter, Story
from bezoar.verbs.check import CLEAN_SCORES_FILE, FLAGGED_FILE, PICTURES_FILE, SCORES_FILE

FEW = 50  # rows of the table of flagged images


class Check(Story):
    """Histograms with thresholds, galleries, the flagged images by name."""

    @functools.cached_property
    def names(self) -> list[str]:
        """The checks that were asked, in their order."""
        return list(metric_names.as_dict(self.notes.get("checks")))

    @functools.cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """A row an image."""
        return columns(self.run.file(SCORES_FILE))

    @functools.cached_property
    def clean(self) -> dict[str, np.ndarray]:
        """A row a clean image that set the thresholds."""
        return columns(self.run.file(CLEAN_SCORES_FILE))

    @property
    def truth(self) -> np.ndarray | None:
        """Which images carry a trigger, where it is known."""
        return self.scores.get("triggered")

    def warning(self) -> str:
        """That triggers were stamped here, where they were."""
        if "trigger" not in self.notes:
            return ""
        return f"One half of the images were stamped with {self.notes['trigger']} to measure the checks."

    def headline(self) -> str:
        """What the first check flags."""
        if not self.names:
            return "This check was not finished."
        name = self.names[0]
        m, caught = self.measures[f"{name}.flagged"], self.measures.get(f"{name}.caught")
        told = f"{name} flags {round(m.value * m.n):,} of {m.n:,} images ({metric_names.format_percent(m.value)})"
        if caught is None:
            return told + "."
        wrong = metric_names.format_percent(self.measures[f"{name}.false_positives"].value)
        return f"{told}: {metric_names.format_percent(caught.value)} of those with a trigger, {wrong} of those without."

    def more(self) -> str:
        """What a flag is worth."""
        clean = metric_names.as_dict(self.notes.get("clean"))
        if not self.names:
            return ""
        expected = self.measures[f"{self.names[0]}.expected_false_positives"]
        told = (
            f"Of clean images like the {clean.get('thresholds', 0):,} that set the thresholds, {metric_names.format_rate(expected)} are "
            "flagged too. A flag warns of the image, not of the encoder: a foreign patch can raise it where there is no "
            "backdoor. An image that is not flagged may still carry a trigger that these checks do not see."
        )
        limits = self.notes.get("limits") or []
        return " ".join(
            [
                told,
                *(f"{line[:1].upper()}{line[1:]}." for line in map(str, limits[:1])),
                self.undone(),
            ]
        ).strip()

    def cards(self) -> list[str]:
        """The first check's share flagged, and how well it tells."""
        return [
            f"{n}.{k}"
            for n in self.names
            for k in ("caught", "auroc", "flagged", "expected_false_positives")
        ][:4]

    def chapters(self) -> list[Chapter]:
        """Charts, then pictures, then names."""
        return [
            self.side_by_side,
            self.scores_of_all_images,
            *(functools.partial(self.most_suspicious, n) for n in self.names),
            self.flagged,
        ]

    def side_by_side(self) -> Section | None:
        """The checks as rows, where there are several."""
        if len(self.names) < 2:
            return None
        keys = ["flagged", "expected_false_positives", "false_positives", "caught", "auroc"]
        keys = [k for k in keys if f"{self.names[0]}.{k}" in self.measures]
        rows = []
        for name in self.names:
            found = [self.measures[f"{name}.{k}"] for k in keys]
            units = [metric_names.label_and_unit(k)[1] for k in keys]
            rows.append(
                [
                    name,
                    *(
                        f"{metric_names.format_value(m.value, u)} [{metric_names.format_interval(m, u)}]"
                        for m, u in zip(found, units, strict=True)
                    ),
                ]
            )
        return Section(
            "Side by side",
            [
                Table(
                    ["Check", *(metric_names.label_and_unit(k)[0] for k in keys)],
                    rows,
                    range(1, len(keys) + 1),
                )
            ],
        )

    def scores_of_all_images(self) -> Section | None:
        """A histogram a check."""
        figures = []
        for at, name in enumerate(self.names):
            series = [Series("clean images", self.clean[name], "good")]
            values = self.scores[name]
            if self.truth is None:
                series.append(Series("images checked", values, "clean"))
            else:
                series.append(Series("without trigger", values[~self.truth], "clean"))
                series.append(Series("with trigger", values[self.truth], "bad"))
            cut = self.measures[f"{name}.threshold"].value
            svg = charts.draw_histogram(series, "score", f"scores{at}", (cut, "threshold"))
            figures.append(
                Figure(
                    svg,
                    name,
                    "Higher is more suspicious; what lies right of the threshold is flagged.",
                )
            )
        return Section("Scores", [Figures(figures)]) if figures else None

    def most_suspicious(self, name: str) -> Section | None:
        """The images that a check scores highest."""
        from safetensors.torch import load_file

        images = load_file(self.run.file(PICTURES_FILE))[str(self.names.index(name))]
        return Section(f"Most suspicious to {name}", [self.tiles(name, images)])

    def tiles(self, name: str, images: torch.Tensor) -> Gallery:
        """The highest first, with the window that the check accuses framed."""
        values, flagged = self.scores[name], self.scores[f"{name}.flagged"]
        order = sorted(range(len(values)), key=lambda i: (-values[i], self.scores["id"][i]))[
            : len(images)
        ]
        boxes = {row["id"]: row["box"] for row in self.json(FLAGGED_FILE)[name] if "box" in row}
        shown, cells = [], []
        for rank, (i, picture) in enumerate(zip(order, images, strict=True)):
            key = str(self.scores["id"][i])
            lines, look = (
                [
                    Line(
                        "flagged" if flagged[i] else "not flagged",
                        "mark" if flagged[i] else "muted",
                    )
                ],
                "",
            )
            if self.truth is not None:
                look = "bad" if self.truth[i] else "good"
                lines.append(Line("trigger" if self.truth[i] else "no trigger", look))
            lines += [
                Line(f"score {values[i]:.3g}"),
                Line(pictures.shorten(self.scores["class"][i] or key, 40), "muted"),
            ]
            shown.append(Tile((rank,), lines, look, f"{rank + 1}"))
            cells.append(
                draw_frame(picture, self.scaled(boxes[key], picture)) if key in boxes else picture
            )
        note = "Framed: the window whose masking moves the embedding most." if boxes else ""
        return pictures.contact_sheet(torch.stack(cells), shown, 104, note=note)

    def scaled(self, box: list[int], picture: torch.Tensor) -> tuple[int, int, int, int]:
        """A window of the image in pixels of its stored picture."""
        shrink = picture.shape[-2] / max(1, int(self.notes.get("side", picture.shape[-2])))
        top, left, height, width = (round(n * shrink) for n in box)
        return top, left, height, width

    def flagged(self) -> Section | None:
        """The flagged images by name."""
        rows: list[list[str]] = []
        total = 0
        for name in self.names:
            found: list[dict[str, Any]] = self.json(FLAGGED_FILE)[name]
            total += len(found)
            rows += [
                [pictures.shorten(row["id"], 80), name, f"{row['score']:.4g}"]
                for row in found[:FEW]
            ]
        if not rows:
            return Section("Flagged images", lead="None.")
        note = (
            f"{total:,} in all; every image's scores are in {SCORES_FILE}."
            if total > len(rows)
            else f"All scores are in {SCORES_FILE}."
        )
        return Section("Flagged images", [Table(["Image", "check", "score"], rows, [2], note)])


def columns(path: Any) -> dict[str, np.ndarray]:
    """A Parquet file's columns by name."""
    import pyarrow.parquet as pq

    found = pq.read_table(path)
    return {name: found.column(name).to_numpy(zero_copy_only=False) for name in found.column_names}
