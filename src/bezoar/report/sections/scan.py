"""The page of a scan: what was found, how fast a reviewer would find the rest, what the worst records look like."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from bezoar.report import charts, gallery, terms
from bezoar.report.charts import Series
from bezoar.report.parts import Figure, Figures, Gallery, Line, Section, Table, Tile
from bezoar.report.sections.train import kinds
from bezoar.report.story import Chapter, Story
from bezoar.scores import Scores

SHOWN, MISSED = 40, 12


class Scan(Story):
    """Ranking and score charts, the worst records, what the keep-list leaves out."""

    def warning(self) -> str:
        """Where the data are known to be poisoned."""
        return (
            "The data that are scanned here were poisoned on purpose; the truth was read after the ranking."
            if self.goals
            else ""
        )

    def headline(self) -> str:
        """What the keep-list leaves out."""
        records, removed = self.notes.get("records"), self.notes.get("removed")
        if records is None or removed is None:
            return "This scan was not finished."
        share = terms.percent(removed / max(1, records))
        told = f"The keep-list leaves out the {removed:,} most suspicious of {records:,} records ({share})"
        found = self.measures.get("poisons_removed")
        if found is None:
            return told + "; whether they are poisons is not known."
        hits = round(found.value * found.n)
        return f"{told}; among them are {hits:,} of the {found.n:,} poisons: {terms.brief(found)}."

    def cards(self) -> list[str]:
        """Ranking quality, then what was removed."""
        return ["poisons_removed", "auroc", "average_precision", "recall_at_0.01", "precision_at_n", "fpr_at_95_tpr"]

    def chapters(self) -> list[Chapter]:
        """Charts, then pictures."""
        return [self.ranking, self.keep_list, self.most_suspicious_records, self.poisons_missed]

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """Ids of all records scanned."""
        return tuple(self.json("ids.json"))

    @functools.cached_property
    def scores(self) -> dict[str, Scores]:
        """The merged score under '', each detector's under its name."""
        found = self.tensors("scores.safetensors")
        return {
            k.removeprefix("detector.") if k != "score" else "": Scores(self.ids, torch.from_numpy(v)) for k, v in found.items()
        }

    @functools.cached_property
    def truth(self) -> np.ndarray | None:
        """bool (N,): which records are poisons; None where nobody knows."""
        return self.data.plan.mask(self.ids) if self.data.plan.edits else None

    @property
    def removed(self) -> int:
        """How many records the keep-list leaves out."""
        return int(self.notes["removed"])

    def ranking(self) -> Section | None:
        """Poisons found against records reviewed, where the truth is known; the scores of both kinds."""
        merged, truth = self.scores[""], self.truth
        worst = merged.ranked()
        edge = (float(merged.values[worst[self.removed - 1]]), "removed from here up") if self.removed else None
        if truth is None:
            chart = charts.histogram([Series("all records", merged.values.numpy())], "score", "scores", edge)
            return Section(
                "Scores", [Figures([Figure(chart, "Scores of all records")])], "Nothing is known of which records are poisons."
            )
        groups = [
            Series("clean", merged.values.numpy()[~truth], "clean"),
            Series("poison", merged.values.numpy()[truth], "bad"),
        ]
        histogram = charts.histogram(groups, "score", "scores", edge)
        figures = [
            Figure(
                self.curve(), "How fast a reviewer finds the poisons", "Upper left is better; dotted: records in random order."
            ),
            Figure(
                histogram,
                "Scores of clean records and poisons",
                "Each group's share by score; the higher, the more suspicious.",
            ),
        ]
        return Section("Ranking", [Figures(figures)])

    def curve(self) -> Any:
        """Recall against share reviewed, of every detector and of all together."""
        assert self.truth is not None
        single = [k for k in self.scores if k]
        lines = [(Series("all together" if len(single) > 1 else "ranking", self.truth[self.scores[""].ranked()], "bad"), 2)]
        others = [p for p in charts.ORDER if p != "bad"]
        for i, name in enumerate(single if len(single) > 1 else ()):
            lines.append((Series(gallery.short(name, 24), self.truth[self.scores[name].ranked()], others[i % len(others)]), 1))
        return charts.ranking(lines, self.removed / len(self.ids))

    def keep_list(self) -> Section | None:
        """What is removed, of which kind."""
        if self.truth is None:
            return None
        plan = self.data.plan
        gone = {self.ids[i] for i in self.scores[""].ranked()[: self.removed]}
        rows = []
        for title, members in kinds(plan.goals):
            mine = [e.id for e in plan.edits if e.goal in members]
            hit = sum(k in gone for k in mine)
            rows.append([title, f"{len(mine):,}", f"{hit:,}", terms.percent(hit / len(mine)) if mine else "–"])
        clean = int((~self.truth).sum())
        lost = len(gone) - sum(k in plan.ids for k in gone)
        rows.append(["clean records", f"{clean:,}", f"{lost:,}", terms.percent(lost / clean) if clean else "–"])
        return Section(
            "What the keep-list leaves out", [Table(("Records", "In the data", "Left out", "Share"), rows, (1, 2, 3))]
        )

    def most_suspicious_records(self, most: int = SHOWN) -> Section | None:
        """The worst records with their scores."""
        ranked = self.json("ranked.json")[:most]
        if not ranked:
            return None
        told = (
            ""
            if self.truth is None
            else f" {sum(r['id'] in self.data.plan.ids for r in ranked)} of these {len(ranked)} are poisons."
        )
        shown = self.tiles([(i + 1, r) for i, r in enumerate(ranked)])
        return Section("Most suspicious records", [shown], "The higher the score, the more suspicious." + told)

    def tiles(self, ranked: list[tuple[int, dict]]) -> Gallery:
        """Rows of ranked.json with their ranks as pictures."""
        found = gallery.records(self.data, [r["id"] for _, r in ranked])
        row, plan = {k: i for i, k in enumerate(found.ids)}, self.data.plan
        ranked = [(n, r) for n, r in ranked if r["id"] in row]
        tiles = []
        for i, (n, r) in enumerate(ranked):
            poison = r["id"] in plan.ids
            lines = [Line("poison" if poison else "clean", "bad" if poison else "good")] if plan.edits else []
            lines.append(Line(gallery.short(r["caption"] or r["id"])))
            several = r["detectors"] if len(r["detectors"]) > 1 else {}
            lines += [Line(f"{gallery.short(k, 16)} {v:.2f}", "muted") for k, v in {"score": r["score"], **several}.items()]
            tiles.append(Tile((i,), lines, "bad" if poison else "", f"{n}"))
        return gallery.sheet(found.images[[row[r["id"]] for _, r in ranked]], tiles, 104)

    def poisons_missed(self) -> Section | None:
        """Poisons that the ranking puts last: what this scan is blind to."""
        if self.truth is None:
            return None
        order = self.scores[""].ranked()
        last = [(n + 1, i) for n, i in enumerate(order.tolist()) if self.truth[i] and n >= self.removed][::-1]
        if not last:
            return Section("Poisons missed", (), "None: the keep-list leaves out every poison.")
        captions = {e.id: e.caption for e in self.data.plan.edits}
        rows = [(n, self.row(i, captions[self.ids[i]])) for n, i in last[:MISSED]]
        lead = f"{terms.count(len(last), 'poison')} of {int(self.truth.sum()):,} stay in the data; shown are those ranked last."
        return Section("Poisons missed", [self.tiles(rows)], lead)

    def row(self, i: int, caption: str) -> dict:
        """A record as it would stand in ranked.json."""
        each = {k: float(s.values[i]) for k, s in self.scores.items() if k}
        return {"id": self.ids[i], "caption": caption, "score": float(self.scores[""].values[i]), "detectors": each}
