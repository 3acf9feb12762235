"""The page of an audit: the verdict, each value beside the bank's, what was inverted and what it does, what was not tested."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bezoar.evaluation.scores import Measure
from bezoar.evaluation.verdict import Inversion
from bezoar.reports import charts, metric_names, pictures
from bezoar.reports.page_parts import Figure, Line, Part, Section, Table, Text, Tile
from bezoar.reports.run_page import Chapter, Story

SHOWN, STAMPED = 3, 6  # inversions of an audit; clean images that each is shown on


class Audit(Story):
    """Verdict, audits, inverted triggers, limits."""

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """Everything the audits said."""
        return self.json("verdict.json")

    @property
    def attacked(self) -> bool:
        """The artefact is a verdict."""
        return False

    def warning(self) -> str:
        """Where the truth is known."""
        if not self.goals:
            return ""
        told = metric_names.describe_goals(self.goals)
        return f"The encoder that is audited here was attacked on purpose: {told}. The audits were not told."

    def headline(self) -> str:
        """The verdict."""
        return str(self.notes.get("verdict") or "This audit was not finished.")

    def more(self) -> str:
        """On what it stands."""
        if not (self.run.path / "verdict.json").exists():
            return ""
        sample, family = self.facts["sample"], self.facts["family"]
        told = f"{self.facts['encoder']} ({family['network'].partition(':')[0]}, {family['size']} px), looked at with "
        told += f"{metric_names.quantity(sample['images'], 'clean image')}. No verdict says that an encoder is clean."
        return f"{told} {self.facts['few']}." if self.facts["few"] else told

    def cards(self) -> list[str]:
        """Each audit's p-value, then its value."""
        return [
            n
            for k in ("p_value", "sensitivity", "value")
            for n in self.measures
            if n.endswith(f".{k}")
        ][:8]

    def chapters(self) -> list[Chapter]:
        """Audits, triggers, limits."""
        return [self.audits, self.inverted_triggers, self.what_was_not_tested]

    def audits(self) -> Section | None:
        """A row an audit, and its value beside those of the bank."""
        rows: list[list[str]] = []
        parts: list[Part] = []
        for i, a in enumerate(self.facts["audits"]):
            chance = Measure(**a["false_positives"]) if a["false_positives"] else None
            rows.append(
                [
                    a["name"],
                    a["words"],
                    f"{a['value']:.4g}",
                    "–" if a["threshold"] is None else f"{a['threshold']:.4g}",
                    "–" if a["p"] is None else f"{a['p']:.2g}",
                    "–"
                    if chance is None
                    else f"{metric_names.format_percent(chance.value)} ({metric_names.format_interval(chance, metric_names.RATE)})",
                    f"{a['seconds']:.1f} s",
                ]
            )
            parts += [Text(f"{a['name']}: {a['sentence']}"), *strip(a, i)]
        head = (
            "Audit",
            "Verdict",
            "Value",
            "Threshold",
            "p",
            "False positives of this threshold",
            "Took",
        )
        note = "Higher values are more suspicious; what lies above the threshold is evidence. Ranges are 95 % intervals."
        return Section("What each audit says", [Table(head, rows, (2, 3, 4, 5, 6), note), *parts])

    def inverted_triggers(self) -> Section | None:
        """What was inverted, as a picture, on clean images, and what it turns them into."""
        if not self.facts["inversions"]:
            return None
        tensors, images = (
            self.tensors("inversions.safetensors"),
            self.tensors("examples.safetensors")["images"],
        )
        parts: list[Part] = []
        seen: Counter[str] = Counter()
        for i, told in enumerate(self.facts["inversions"]):
            seen[told["audit"]] += 1
            if seen[told["audit"]] > SHOWN:
                continue
            mask, pattern = (
                torch.from_numpy(tensors[f"mask@{i}"]),
                torch.from_numpy(tensors[f"pattern@{i}"]),
            )
            inversion = Inversion(mask, pattern, told["target"], told["norm"], told["success"])
            parts.append(pictured(inversion, told, torch.from_numpy(images)[:STAMPED]))
        lead = (
            "A trigger that an audit came up with moves clean images as a backdoor would; every encoder has some. It is a "
            "finding where it is far smaller than those of clean encoders, which is what the values above say."
        )
        return Section("Inverted triggers", parts, lead)

    def what_was_not_tested(self) -> Section | None:
        """What the verdict must not be taken to cover."""
        rows = [[line] for line in self.facts["not_tested"]]
        return Section("What was not tested", [Table(("This verdict says nothing of",), rows)])


def strip(a: Mapping[str, Any], number: int) -> list[Figure]:
    """An audit's value beside the clean and the attacked encoders of the bank."""
    clean, attacked = a["bank"]["clean"], a["bank"]["attacked"]
    if not clean:
        return []
    marks = [(a["value"], "this encoder", "ink")]
    if a["threshold"] is not None:
        marks.append((a["threshold"], f"threshold at false-positive rate {a['rate']:g}", "muted"))
    svg = charts.draw_strips(
        strip_rows(clean, attacked), marks, f"value of {a['name']}", f"strip{number}"
    )
    return [Figure(svg, f"{a['name']}: this encoder among those of the bank", "A dot an encoder.")]


def strip_rows(clean: list[float], attacked: list[Any]) -> list[tuple[str, list[float], str]]:
    """Clean encoders, then attacked ones by attack, as a chart's rows."""
    rows: list[tuple[str, list[float], str]] = [(f"clean ({len(clean)})", list(clean), "clean")]
    for attack in sorted({name for name, _ in attacked}):
        own = [v for name, v in attacked if name == attack]
        rows.append((f"{pictures.shorten(attack, 32)} ({len(own)})", own, "bad"))
    return rows


def pictured(inversion: Inversion, told: Mapping[str, Any], images: Tensor) -> Part:
    """Mask, pattern and both, then clean images with and without the trigger, and what they are read as."""
    mask = (inversion.mask.clamp(0, 1) * 255).byte().expand(3, -1, -1)
    pattern = (inversion.pattern.clamp(0, 1) * 255).byte()
    both = ((inversion.mask * inversion.pattern).clamp(0, 1) * 255).byte()
    n, stamped = len(images), inversion(images)
    tiles = [
        Tile((0,), [Line("mask", "mark"), Line(f"norm {told['norm']:.1f} px", "muted")]),
        Tile((1,), [Line("pattern", "mark")]),
        Tile((2,), [Line("mask x pattern", "mark")]),
    ]
    before, after = told.get("before", []), told.get("after", [])
    for j in range(n):
        lines = (
            [Line(before[j], "muted"), Line(after[j], "bad" if after[j] != before[j] else "muted")]
            if before
            else []
        )
        tiles.append(Tile((3 + j, 3 + n + j), lines))
    sheet = torch.cat([torch.stack([mask, pattern, both]), images, stamped])
    title = told["audit"] + (
        f", towards “{pictures.shorten(told['target'], 40)}”" if told["target"] else ""
    )
    note = ""
    if told.get("turns_into"):
        into = ", ".join(
            f"{metric_names.format_percent(s)} as “{c}” ({metric_names.format_percent(b)} before)"
            for c, s, b in told["turns_into"]
        )
        note = f"Of all stamped images a classifier ({told['reader']}) reads {into}."
    return pictures.contact_sheet(sheet, tiles, 72, title, note)
