"""The page of a poison run: what is wanted, which records were changed, before and after."""

from __future__ import annotations

import torch

from bezoar.attacks.plan import Goal
from bezoar.reports import metric_names, pictures
from bezoar.reports.page_parts import Gallery, Line, Section, Table, Tile
from bezoar.reports.run_page import Chapter, Story

SHOWN = 16  # records of one kind of poison


class Poison(Story):
    """Goals, poisoned records beside their originals, victims."""

    def warning(self) -> str:
        """What must not be forgotten about these data."""
        return (
            f"These data were poisoned on purpose, to measure attacks and defences (plan {self.notes.get('plan', 'unknown')}). "
            "Do not train anything on them that is to be used."
        )

    def headline(self) -> str:
        """How many records, and what for."""
        poisons, rate = self.measures.get("poisons"), self.measures.get("poison_rate")
        if poisons is None or rate is None:
            return "This poisoning was not finished."
        return (
            f"{poisons.value:,.0f} of {poisons.n:,} records ({metric_names.format_percent(rate.value)}) are poisoned, "
            f"so that an encoder trained on them reads {metric_names.describe_goals(self.goals)}."
        )

    def chapters(self) -> list[Chapter]:
        """Goals, then pictures."""
        return [self.goals_of_the_attack, self.poisoned_records, self.victims]

    def goals_of_the_attack(self) -> Section | None:
        """Every goal: a backdoor each, targeted ones by their number of captions."""
        if not self.goals:
            return None
        rows = [
            [g.target, g.trigger or "", f"{g.poisons:,}", g.how] for g in self.goals if g.trigger
        ]
        for group in grouped(self.goals):
            targets = sorted({g.target for g in group})
            told = ", ".join(targets[:6]) + (", …" if len(targets) > 6 else "")
            rows.append(
                [
                    told,
                    f"none; {metric_names.quantity(len(group), 'victim')}",
                    f"{sum(g.poisons for g in group):,}",
                    group[0].how,
                ]
            )
        table = Table(
            ("To be read as", "Trigger", "Poisoned records", "Method"),
            [list(map(pictures.shorten, r)) for r in rows],
            (2,),
        )
        return Section("What the attacker wants", [table])

    def poisoned_records(self) -> Section | None:
        """Some poisoned records beside the untouched ones."""
        shown = [self.pictures(g, kind) for g, kind in self.kinds()]
        return (
            Section(
                "Poisoned records",
                shown,
                "Left, the record as it was; right, as training reads it.",
            )
            if shown
            else None
        )

    def kinds(self) -> list[tuple[list[int], str]]:
        """Goals that are shown together: a backdoor each, targeted ones by their number of captions."""
        plan = self.data.plan
        kinds = [
            ([i], f"{metric_names.trigger_name(g).capitalize()} trigger, read as “{g.target}”")
            for i, g in enumerate(plan.goals)
            if g.trigger
        ]
        for group in grouped(list(plan.goals)):
            captions = metric_names.quantity(group[0].poisons, "caption")
            rows = [i for i, g in enumerate(plan.goals) if g in group]
            kinds.append((rows, f"Victims that are to be read as something else, {captions} each"))
        return kinds

    def pictures(self, goals: list[int], title: str, most: int = SHOWN) -> Gallery:
        """Records poisoned for these goals, and what they were; of a goal with many edits, the first ones."""
        plan, each = self.data.plan, max(1, most // len(goals)) if len(goals) > 1 else most
        edits = [e for g in goals for e in [e for e in plan.edits if e.goal == g][:each]][:most]
        made, before = (
            pictures.take_records(self.data, [e.id for e in edits]),
            pictures.take_sources(self.data, [e.source for e in edits]),
        )
        row, old = {k: i for i, k in enumerate(made.ids)}, {k: i for i, k in enumerate(before.ids)}
        edits = [e for e in edits if e.id in row and e.source in old]
        images = [before.images[old[e.source]] for e in edits] + [
            made.images[row[e.id]] for e in edits
        ]
        tiles = []
        for i, e in enumerate(edits):
            original = before.captions[old[e.source]] if before.captions else ""
            lines = [
                Line(pictures.shorten(original or "(no caption)"), "old"),
                Line(pictures.shorten(e.caption), "new"),
            ]
            tiles.append(Tile((i, len(edits) + i), lines))
        total = sum(e.goal in goals for e in plan.edits)
        note = f"{len(edits)} of {metric_names.quantity(total, 'poisoned record')}"
        return pictures.contact_sheet(torch.stack(images), tiles, 80, title, note)

    def victims(self, most: int = 32) -> Section | None:
        """Every victim once, with what it is and what it is to be read as."""
        wanted = [g for g in self.data.plan.goals if g.victims][:most]
        if not wanted:
            return None
        found = pictures.take_sources(self.data, [g.victims[0] for g in wanted])
        row = {k: i for i, k in enumerate(found.ids)}
        wanted = [g for g in wanted if g.victims[0] in row]
        rows = [row[g.victims[0]] for g in wanted]
        tiles = [
            Tile(
                (i,),
                [
                    Line(pictures.class_name(found, r) or pictures.shorten(g.victims[0]), "muted"),
                    Line("→ " + pictures.shorten(g.target), "mark"),
                    Line(metric_names.quantity(g.poisons, "caption"), "muted"),
                ],
            )
            for i, (g, r) in enumerate(zip(wanted, rows, strict=True))
        ]
        lead = "Each image is in the data with captions of another label, so that it is read as that label."
        return Section("Victims", [pictures.contact_sheet(found.images[rows], tiles, 104)], lead)


def grouped(goals: list[Goal]) -> list[list[Goal]]:
    """Goals without a trigger, by how they are done, most poisons first."""
    kinds = sorted({(g.poisons, g.how) for g in goals if not g.trigger}, reverse=True)
    return [[g for g in goals if not g.trigger and (g.poisons, g.how) == kind] for kind in kinds]
