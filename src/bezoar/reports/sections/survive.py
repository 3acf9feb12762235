"""The page of a survive run: what each treatment leaves of a trigger, to look at and in figures."""

from __future__ import annotations

import functools

import numpy as np
import torch

from bezoar.evaluation.scores import Measure
from bezoar.reports import charts, metric_names, pictures
from bezoar.reports.heat_maps import draw_heat_map
from bezoar.reports.page_parts import Figure, Figures, Gallery, Line, Part, Section, Table, Tile
from bezoar.reports.run_page import Chapter, Story

LOST, WEAK = 0.1, 0.5  # shares of the trigger below which it counts as lost, as weakened
MOST = 12  # rows of a chart
SHARE = "pattern_kept", "shift_kept"


class Survive(Story):
    """One sentence, a strip of pictures, heat maps, every treatment in order of damage."""

    @functools.cached_property
    def treatments(self) -> list[dict]:
        """What was done, in the order of the pictures."""
        return [
            t for t in self.json("treatments.json") if f"{t['name']}.pattern_kept" in self.measures
        ]

    @property
    def embeds(self) -> bool:
        """Whether an encoder was asked."""
        return bool(self.notes.get("encoder"))

    def kept(self, t: dict) -> Measure:
        """How much of the trigger a treatment leaves: in the embedding where there is one, else in pixels."""
        return self.measures[f"{t['name']}.{SHARE[self.embeds]}"]

    def ranked(self) -> list[dict]:
        """Treatments other than none, the most harmful first."""
        return sorted(
            (t for t in self.treatments if t["name"] != "untreated"),
            key=lambda t: self.kept(t).value,
        )

    def headline(self) -> str:
        """Why the attack's success may be 0, or that it is not for this."""
        if "trigger" not in self.notes or not any(map(single, self.ranked())):
            return "This test was not finished."
        where = "of the embedding's shift" if self.embeds else "of its pattern"
        alone = [t for t in self.ranked() if single(t)]
        lost = [t for t in alone if self.kept(t).value < LOST]
        weak = [t for t in alone if LOST <= self.kept(t).value < WEAK]
        trigger = f"The trigger {pictures.shorten(self.notes['trigger'].partition(':')[0], 40)}"
        if lost:
            more = f" and {len(lost) - 1} more of {len(alone)} treatments" if len(lost) > 1 else ""
            told = f"{trigger} is lost to “{lost[0]['title']}”{more}: {metric_names.format_percent(max(0.0, self.kept(lost[0]).value))} {where}"
            return f"{told} is left, so an attack success of 0 is what to expect where images go that way."
        if weak:
            more = f" and {len(weak) - 1} more of {len(alone)} treatments" if len(weak) > 1 else ""
            share = metric_names.format_percent(self.kept(weak[0]).value)
            told = f"{trigger} is weakened by “{weak[0]['title']}”{more}: {share} {where} is left"
            return f"{told}; it needs more poisons there than untreated, or is missed."
        return (
            f"{trigger} outlives all {len(alone)} treatments: the worst, “{alone[0]['title']}”, leaves "
            f"{metric_names.format_percent(self.kept(alone[0]).value)} {where}; an attack success of 0 has another cause."
        )

    def more(self) -> str:
        """What else to look for, or what was not asked."""
        if "images" not in self.notes:
            return ""
        told = f"Measured on {metric_names.quantity(self.notes['images'], 'image')} of {self.notes['side']} pixels; nothing was trained."
        if self.notes.get("untouched"):
            told += f" {metric_names.quantity(self.notes['untouched'], 'image')} that the trigger leaves unchanged are not counted."
        if not self.embeds:
            return told + " No encoder was given: this is about pixels alone."
        length = self.measures.get("untreated.shift_length")
        return told + (
            " Percentages are of the shift that the trigger gives the embedding untreated."
            if length is not None
            else ""
        )

    def cards(self) -> list[str]:
        """The most harmful treatments."""
        return [f"{t['name']}.{SHARE[self.embeds]}" for t in self.ranked() if single(t)][:5]

    def chapters(self) -> list[Chapter]:
        """Pictures first."""
        return [
            self.what_is_left,
            self.jpeg_with_resizing_and_cropping,
            self.every_treatment,
            self.in_figures,
        ]

    def what_is_left(self) -> Section | None:
        """The trigger after each treatment."""
        from safetensors.torch import load_file

        images = load_file(self.run.file("pictures.safetensors"))["pictures"]  # (T, E, 2, 3, S, S)
        alone = [i for i, t in enumerate(self.treatments) if single(t)]
        order = sorted(
            alone,
            key=lambda i: (
                self.treatments[i]["name"] != "untreated",
                self.kept(self.treatments[i]).value,
            ),
        )
        return Section(
            "What is left of it",
            [self.strip(images, order)],
            "Left, an image with the trigger after the treatment; right, its difference to the same image without the "
            "trigger, on gray, half as strong. Most harmful first.",
        )

    def strip(self, images: torch.Tensor, order: list[int]) -> Gallery:
        """One tile a treatment: its image and its residue."""
        tiles: list[Tile] = []
        cells: list[torch.Tensor] = []
        for i in order:
            t, share = self.treatments[i], self.kept(self.treatments[i])
            look = "" if t["name"] == "untreated" else "bad" if share.value < LOST else ""
            lines = [Line(t["title"], "mark")]
            pixels = self.measures[f"{t['name']}.pattern_kept"]
            lines.append(
                Line(f"pattern {metric_names.format_percent(max(0.0, pixels.value))}", "muted")
            )
            if self.embeds:
                lines.append(
                    Line(
                        f"embedding {metric_names.format_percent(max(0.0, share.value))}",
                        paint(share) or "muted",
                    )
                )
            tiles.append(Tile((len(cells), len(cells) + 1), lines, look))
            cells += [images[i, 0, 0], images[i, 0, 1]]
        return pictures.contact_sheet(torch.stack(cells), tiles, 88)

    def jpeg_with_resizing_and_cropping(self) -> Section | None:
        """Two maps, in pixels or in the embedding."""
        shares = [("shift_kept", "embedding's shift kept")] if self.embeds else []
        figures = []
        for key, title in [("pattern_kept", "pattern kept in pixels"), *shares]:
            for axis, label in (("resize", "resized to"), ("crop", "random crops from")):
                if (drawn := self.map(axis, key, label)) is not None:
                    figures.append(
                        Figure(drawn, f"{title.capitalize()} (%)", f"JPEG quality by “{label}”.")
                    )
        return Section("JPEG with resizing and cropping", [Figures(figures)]) if figures else None

    def map(self, axis: str, key: str, label: str) -> charts.Markup | None:
        """JPEG quality by another axis."""
        plain = {"resize": 1.0, "crop": 1.0, "augment": "", "normalise": ""}
        held = [t for t in self.treatments if all(t[k] == v for k, v in plain.items() if k != axis)]
        rows = sorted({t["jpeg"] for t in held}, key=lambda q: -(q or 101))
        columns = sorted({t[axis] for t in held}, reverse=True)
        if len(rows) < 2 or len(columns) < 2:
            return None
        values = np.full((len(rows), len(columns)), np.nan)
        for t in held:
            values[rows.index(t["jpeg"]), columns.index(t[axis])] = self.measures[
                f"{t['name']}.{key}"
            ].value
        names = (
            [str(q) if q else "none" for q in rows],
            [f"{c:g}" if c != 1 else "none" for c in columns],
        )
        return draw_heat_map(*names, values, f"{axis}{key}", ("JPEG quality", label))

    def every_treatment(self) -> Section | None:
        """Each by itself, as a dot with its interval."""
        alone = [t for t in self.treatments if single(t) and t["name"] != "untreated"]
        if not alone:
            return None
        parts: list[Part] = []
        shares = [("shift_kept", "Of the embedding's shift")] if self.embeds else []
        for key, title in [*shares, ("pattern_kept", "Of its pattern in pixels")]:
            of = {t["name"]: self.measures[f"{t['name']}.{key}"] for t in alone}
            ranked = sorted(alone, key=lambda t: of[t["name"]].value)
            if key == "pattern_kept":
                ranked = [t for t in ranked if not t["normalise"]]
            rows = [
                (t["title"], of[t["name"]], paint(of[t["name"]]) or "clean") for t in ranked[:MOST]
            ]
            parts.append(
                Figure(
                    charts.draw_intervals(rows, key),
                    title,
                    "Share that is left, with 95 % interval; untreated it is 100 %.",
                )
            )
        return Section(
            "One treatment at a time",
            parts,
            f"The {MOST} most harmful." if len(alone) > MOST else "",
        )

    def in_figures(self) -> Section | None:
        """All treatments."""
        keys = ["pattern_kept", "energy_kept", "pattern_correlation"]
        keys += ["shift_kept", "shift_cosine", "shift_length"] if self.embeds else []
        rows = []
        for t in self.ranked():
            found = [self.measures[f"{t['name']}.{k}"] for k in keys]
            rows.append([t["title"], *(f"{m.value:.2f}" for m in found)])
        head = ["Treatment", "pattern", "energy", "correlation", "shift", "cosine", "length"][
            : len(keys) + 1
        ]
        note = (
            "pattern: projection on the trigger's own pattern. energy: squared difference over that before. correlation: with "
            "the pattern, at the best offset. shift, cosine, length: of the embedding's move by the trigger, against untreated."
        )
        return Section("In figures", [Table(head, rows, range(1, len(head)), note)])


def single(t: dict) -> bool:
    """Whether at most one thing is done."""
    return (
        sum(
            (
                t["resize"] != 1,
                t["jpeg"] != 0,
                t["crop"] != 1,
                bool(t["augment"]),
                bool(t["normalise"]),
            )
        )
        <= 1
    )


def paint(m: Measure) -> str:
    """How bad it is, as a paint and a look of a line."""
    return "bad" if m.value < LOST else "warn" if m.value < WEAK else ""
