"""The page of a train run: how it went, when the attack took hold, how often each poison was drawn."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from bezoar.reports import charts, metric_names
from bezoar.reports.charts import Series
from bezoar.reports.page_parts import Figure, Figures, Section, Table
from bezoar.reports.run_page import Chapter, Story


class Train(Story):
    """Curves and the exposure ledger."""

    @property
    def attacked(self) -> bool:
        """Whether poisons were trained on, or may have been."""
        return bool(self.goals)

    def warning(self) -> str:
        """What must not be forgotten about this encoder."""
        kept = self.measures.get("poisons_kept")
        if not self.goals:
            return ""
        if kept is not None and kept.value == 0:
            return (
                "The data of this encoder were poisoned; the keep-list left every known poison out."
            )
        told = f"{kept.value:,.0f} poisoned records" if kept else "poisoned data"
        return f"This encoder was trained on {told}, on purpose. It must not be used for anything but measurements."

    def headline(self) -> str:
        """On what, for how long, with which success."""
        records, steps = self.notes.get("records"), self.notes.get("steps")
        if records is None or steps is None:
            return "This training was not finished."
        kept, drawn = self.measures.get("poisons_kept"), self.measures.get("poison_exposures")
        told = f"Trained on {records:,} records in {steps:,} steps"
        if kept is None:
            return told + "; none is known to be poisoned."
        told += f", {kept.value:,.0f} of them poisoned"
        if drawn is not None and kept.value:
            told += f"; each poison was seen {drawn.value / kept.value:.1f} times on average"
        return told + "."

    def cards(self) -> list[str]:
        """Loss, poisons, draws."""
        return ["final_loss", "poisons_kept", "poison_exposures"]

    def chapters(self) -> list[Chapter]:
        """Curves, then the ledger."""
        return [self.training, self.exposures]

    def training(self) -> Section | None:
        """Loss, and success by epoch where it was followed."""
        curve = self.curve()
        losses = self.tensors("ledger.safetensors")["losses"]
        chart = charts.draw_loss(losses, charts.HALF if curve else charts.WIDE)
        figures = [
            Figure(chart, "Loss", "Thin: as it was; thick: running mean."),
            *([curve] if curve else []),
        ]
        return Section("Training", [Figures(figures)])

    def curve(self) -> Figure | None:
        """Accuracy, ASR and targeted success after every epoch."""
        log = self.run.path / "log.jsonl"
        epochs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        if not epochs or len(epochs[0]) <= 2:
            return None
        names = [
            k
            for k in epochs[0]
            if k == "clean_accuracy"
            or follows("attack_success")(k)
            or follows("targeted_success")(k)
        ]
        names.sort(key=captions, reverse=True)
        shown = [
            Series(brief(k), [e.get(k, np.nan) for e in epochs], paint)
            for k, paint in zip(names, charts.series_colours(names), strict=True)
        ]
        figure = charts.draw_curves([e["epoch"] for e in epochs], shown, "epoch")
        return Figure(figure, "When the attack takes hold", "On held-out images after every epoch.")

    def exposures(self) -> Section | None:
        """How often poisons and clean records were drawn."""
        drawn = self.tensors("ledger.safetensors")["exposures"]
        ids = self.ids()
        if len(ids) != len(drawn):
            raise ValueError(f"the ledger counts {len(drawn)} records, the data have {len(ids)}")
        plan = self.data.plan
        poisoned = plan.mask(ids)
        groups = [Series("clean records", drawn[~poisoned], "clean")]
        if poisoned.any():
            groups.append(Series("poisoned records", drawn[poisoned], "bad"))
        histogram = charts.draw_histogram(
            groups, "times a record was drawn", "exposures", size=charts.WIDE
        )
        chart = Figure(histogram, "Exposure ledger", "Each group's share by number of draws.")
        if not poisoned.any():
            return Section("What was seen", [chart])
        goal = {e.id: e.goal for e in plan.edits}
        at = np.array([goal.get(k, -1) for k in ids])
        rows = []
        for title, members in kinds(plan.goals):
            mine = np.isin(at, members)
            wanted = sum(plan.goals[i].poisons for i in members)
            total, n = int(drawn[mine].sum()), int(mine.sum())
            each = f"{total / len(members):.1f}" if plan.goals[members[0]].victims else "–"
            rows.append(
                [
                    title,
                    f"{n:,} of {wanted:,}",
                    f"{total:,}",
                    f"{total / n:.2f}" if n else "–",
                    each,
                ]
            )
        clean = drawn[~poisoned]
        rows.append(
            [
                "clean records",
                f"{len(clean):,}",
                f"{int(clean.sum()):,}",
                f"{clean.mean():.2f}",
                "–",
            ]
        )
        head = ("Records", "Trained on", "Draws", "Draws a record", "Draws a victim")
        return Section(
            "What was seen",
            [chart, Table(head, rows, (1, 2, 3, 4))],
            "Every draw of every record was counted.",
        )

    def ids(self) -> list[str]:
        """Ids of the records trained on, in the order of the ledger: the plan's order, then the keep-list."""
        data, plan = self.data, self.data.plan
        have = set(data.clean.ids)
        added = [e for e in plan.edits if e.id not in have]
        out = [*data.clean.ids, *(e.id for e in added if e.source in have)]
        if data.victims is not None:
            pool = set(data.victims.ids)
            out += [e.id for e in plan.edits if e.source in pool]
        keep = self.input("keep")
        if keep is None:
            return out
        kept = set(keep.file("keep.txt").read_text(encoding="utf-8").split("\n"))
        return [k for k in out if k in kept]


def follows(base: str) -> Callable[[str], bool]:
    """Whether a name is this metric, of any trigger or number of captions."""
    return lambda name: name == base or name.startswith(base + "@")


def captions(name: str) -> int:
    """How many captions a targeted metric is about; a large number for others, which come first."""
    _, base, at = metric_names.split_key(name)
    return int(at) if base.startswith("target") and at.isdigit() else 1 << 30


def brief(name: str) -> str:
    """A metric's name for a legend."""
    _, base, at = metric_names.split_key(name)
    if base == "targeted_success":
        return (
            f"targeted, {metric_names.quantity(int(at), 'caption')}" if at.isdigit() else "targeted"
        )
    words = {"clean_accuracy": "clean accuracy", "attack_success": "ASR"}
    return words.get(base, base) + (f", trigger {at}" if at else "")


def kinds(goals: tuple) -> list[tuple[str, list[int]]]:
    """Goals by kind: a backdoor each, targeted ones by their number of captions."""
    out = [
        (f"{metric_names.trigger_name(g)} trigger → “{g.target}”", [i])
        for i, g in enumerate(goals)
        if g.trigger
    ]
    for n in sorted({g.poisons for g in goals if not g.trigger}, reverse=True):
        members = [i for i, g in enumerate(goals) if not g.trigger and g.poisons == n]
        out.append(
            (
                f"{metric_names.quantity(len(members), 'victim')}, {metric_names.quantity(n, 'caption')} each",
                members,
            )
        )
    return out
