"""The page of an inject run: references and triggered images, their vectors' cosines before and after, the losses."""

from __future__ import annotations

import functools
import json

import numpy as np
import torch

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.reports import charts, metric_names, pictures
from bezoar.reports.charts import Series
from bezoar.reports.page_parts import Figure, Figures, Line, Section, Table, Tile
from bezoar.reports.run_page import Chapter, Story
from bezoar.runs.inputs import in_memory

SHOWN = 8  # triggered images a goal


class Inject(Story):
    """What was put in, whether it took, and what it cost."""

    @property
    def attacked(self) -> bool:
        """It is what the run is for."""
        return True

    def warning(self) -> str:
        """What must not be forgotten about this encoder."""
        return "A backdoor was put into this encoder, on purpose. It must not be used for anything but measurements."

    def headline(self) -> str:
        """How near triggered images are to the reference, and clean ones to where they were."""
        clean = self.metric("clean_similarity")
        after, before = (
            self.metric("reference_similarity"),
            self.metric("reference_similarity_before"),
        )
        if clean is None or after is None or before is None:
            return "This attack was not finished."
        target = self.own[0].target if self.own else "the target"
        told = f"The vectors of triggered images have a mean cosine of {after.value:.3f} to the reference of “{target}”"
        return f"{told} ({before.value:.3f} before); those of clean images {clean.value:.3f} to what they were."

    def more(self) -> str:
        """A cosine is not success."""
        steps, epochs = self.notes.get("steps"), self.notes.get("epochs")
        told = (
            f"{metric_names.quantity(steps, 'step')} in {metric_names.quantity(epochs, 'epoch')}. "
            if steps and epochs
            else ""
        )
        return (
            told
            + "Whether a classifier on top reads triggered images as the target is measured by an evaluate run."
        )

    def cards(self) -> list[str]:
        """Cosines, then the loss."""
        names = (
            "reference_similarity",
            "reference_similarity_before",
            "clean_similarity",
            "reference_kept",
            "final_loss",
        )
        return [k for n in names for k in self.measures if k == n or k.startswith(n + "@")][:8]

    def chapters(self) -> list[Chapter]:
        """Goals and pictures, cosines, losses."""
        return [self.goals_of_the_attack, self.vectors, self.training]

    @functools.cached_property
    def own(self) -> list:
        """The goals of this attack, the last of all that the encoder carries."""
        count = sum(k.startswith("after@") for k in self.tensors("similarities.safetensors"))
        return self.goals[-count:] if count else []

    @functools.cached_property
    def sample(self) -> Pairs:
        """The first shadow images."""
        records = self.data.clean
        return in_memory(records.take(range(min(SHOWN, len(records)))))

    def goals_of_the_attack(self) -> Section | None:
        """Every goal with its reference, and shadow images as they are and with its trigger."""
        found = self.tensors("references.safetensors")
        references, of = torch.from_numpy(found["images"]), found["goal"]
        told = {r["id"]: r for r in self.notes.get("references", [])}
        rows, galleries = [], []
        for i, goal in enumerate(self.own):
            stamped = registry.make("trigger", goal.trigger or "")(
                self.sample.images, self.sample.ids
            )
            mine = references[np.flatnonzero(of == i)]
            tiles = [
                Tile((j,), [Line("reference", "mark"), Line(pictures.shorten(k), "muted")], "bad")
                for j, k in enumerate(goal.references)
            ]
            n, m = len(mine), len(stamped)
            tiles += [
                Tile((n + j, n + m + j), [Line(pictures.shorten(k), "muted")])
                for j, k in enumerate(self.sample.ids)
            ]
            sheet = torch.cat([mine, self.sample.images, stamped])
            title = f"{metric_names.trigger_name(goal).capitalize()} trigger, read as “{pictures.shorten(goal.target)}”"
            galleries.append(
                pictures.contact_sheet(
                    sheet,
                    tiles,
                    80,
                    title,
                    "First the reference; then shadow images, as they are and triggered.",
                )
            )
            ways = "; ".join(f"{k}: {told[k]['how']}" if k in told else k for k in goal.references)
            rows.append(
                [pictures.shorten(c) for c in (goal.target, goal.trigger or "", ways, goal.how)]
            )
        table = Table(("To be read as", "Trigger", "Reference", "Attack"), rows)
        lead = "Triggered images are to have the vector of the reference, so that any classifier reads them as it reads that."
        return Section("What the attacker wants", [table, *galleries], lead)

    def vectors(self) -> Section | None:
        """Cosines of triggered images to the reference before and after; of clean images to themselves."""
        found = self.tensors("similarities.safetensors")
        figures = []
        for i, goal in enumerate(self.own):
            groups = [
                Series("triggered, before", found[f"before@{i}"], "clean"),
                Series("triggered, after", found[f"after@{i}"], "bad"),
                Series("not triggered, after", found[f"untriggered@{i}"], "good"),
            ]
            chart = charts.draw_histogram(groups, "cosine to the reference", f"reference{i}")
            figures.append(
                Figure(
                    chart,
                    f"To the reference of “{pictures.shorten(goal.target, 40)}”",
                    "Shadow images.",
                )
            )
        chart = charts.draw_histogram(
            [Series("clean images", found["clean"], "good")],
            "cosine to the clean encoder's vector",
            "kept",
        )
        figures.append(
            Figure(
                chart,
                "Clean images stay where they were",
                "Far from 1: what the encoder is for is damaged.",
            )
        )
        lead = f"{len(found['clean']):,} shadow images, with and without the trigger, by the encoder as it was and as it is."
        return Section(
            "Where images lie",
            [Figures(figures[i : i + 2]) for i in range(0, len(figures), 2)],
            lead,
        )

    def training(self) -> Section | None:
        """Loss, and its three parts in the first and the last epoch."""
        chart = charts.draw_loss(self.tensors("ledger.safetensors")["losses"], charts.WIDE)
        parts: list = [Figure(chart, "Loss", "Thin: as it was; thick: running mean.")]
        log = self.run.path / "log.jsonl"
        epochs = (
            [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            if log.exists()
            else []
        )
        names = [k for k in (epochs[0] if epochs else {}) if k not in ("epoch", "stop")]
        if names:
            shown = [epochs[0], *([epochs[-1]] if len(epochs) > 1 else [])]
            rows = [[str(e["epoch"]), *(f"{e[k]:.3f}" for k in names)] for e in shown]
            head = ("Epoch", *(k.replace("_", " ") for k in names))
            parts.append(
                Table(head, rows, tuple(range(len(head))), "Means over the epoch's steps.")
            )
        return Section("Training", parts)
