"""The page of a scan: what was found, how fast a reviewer would find the rest, what the worst records look like."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from bezoar.data.embeddings import EmbeddingSource
from bezoar.detection import merging
from bezoar.detection.corpus import corpus
from bezoar.detection.reliability import read_windows
from bezoar.evaluation.scores import Scores
from bezoar.reports import (
    charts,
    metric_names,
    pictures,
    record_tiles,
    reliability_sections,
    similar_records,
)
from bezoar.reports.charts import Series
from bezoar.reports.page_parts import Figure, Figures, Part, Section, Table
from bezoar.reports.record_tiles import Box
from bezoar.reports.run_page import Chapter, Story
from bezoar.reports.sections.train import kinds

SHOWN, MISSED, BESIDE = 40, 12, 8
GROUPED, GROUPS, EACH = (
    300,
    6,
    8,
)  # worst records that are grouped; groups that are shown, and records of each


class Scan(Story):
    """Ranking and score charts, the worst records, what the keep-list leaves out."""

    def warning(self) -> str:
        """Where the data are known to be poisoned, and where something else than a detector would tell."""
        if not self.goals:
            return ""
        told = "The data that are scanned here were poisoned on purpose; the truth was read after the ranking."
        bad = reliability_sections.separating_channels(
            self.measures, metric_names.as_dict(self.notes.get("leaks"))
        )
        if bad:
            name, m = bad[0]
            told += (
                f" {metric_names.quantity(len(bad), 'side channel')} (such as {name.replace('_', ' ')}, AUROC {m.value:.2f}) "
                "can tell its poisons without a detector: every detector's figure here carries that doubt."
            )
        return told

    def headline(self) -> str:
        """What the keep-list leaves out."""
        records, removed = self.notes.get("records"), self.notes.get("removed")
        if records is None or removed is None:
            return "This scan was not finished."
        share = metric_names.format_percent(removed / max(1, records))
        told = f"The keep-list leaves out the {removed:,} most suspicious of {records:,} records ({share})"
        found = self.measures.get("poisons_removed")
        if found is None:
            return told + "; whether they are poisons is not known."
        hits = round(found.value * found.n)
        return f"{told}; among them are {hits:,} of the {found.n:,} poisons: {metric_names.format_rate(found)}."

    def more(self) -> str:
        """What detectors decided, records that could not be read, and detectors that could not work."""
        told = [f"{line}." for line in map(str, self.notes.get("decided") or ())]
        return " ".join([*told, self.undone()]).strip()

    def cards(self) -> list[str]:
        """Ranking quality, then what was removed."""
        return ["poisons_removed", "auroc", "average_precision", "recall_at_0.01", "precision_at_n"]

    def chapters(self) -> list[Chapter]:
        """Charts, then pictures."""
        return [
            self.false_discoveries,
            self.ranking,
            self.keep_list,
            self.most_suspicious_records,
            self.what_they_resemble,
            self.groups_among_the_worst,
            self.poisons_missed,
            self.what_each_detector_adds,
            self.todays_cleaning,
            self.side_channels,
        ]

    @functools.cached_property
    def scored(self) -> corpus.ScanScores:
        """Every record that was scanned."""
        return corpus.load_scores(self.run.path)

    @functools.cached_property
    def corpus(self) -> corpus.Corpus:
        """The same records with images, where there are any, and vectors."""
        return corpus.reopen_corpus(self.run)

    @property
    def pictures(self) -> bool:
        """Whether there are images to show."""
        return not isinstance(self.corpus.source, EmbeddingSource)

    @property
    def ids(self) -> Any:
        """Ids of all records scanned."""
        return self.scored.ids

    @functools.cached_property
    def order(self) -> np.ndarray:
        """Rows, the worst first."""
        return self.scores[""].ranking()

    @functools.cached_property
    def poisons(self) -> frozenset[str] | None:
        """Ids of the poisons; None where nobody knows."""
        return self.data.plan.ids if self.data.plan.edits else None

    def worst(self, count: int) -> list[tuple[int, int]]:
        """Rank from 1, and row."""
        return [(n + 1, i) for n, i in enumerate(self.order[:count].tolist())]

    @functools.cached_property
    def scores(self) -> dict[str, Scores]:
        """The merged score under '', each detector's under its name."""
        return {"": self.scored.merged, **self.scored.detectors}

    @functools.cached_property
    def truth(self) -> np.ndarray | None:
        """bool (N,): which records are poisons; None where nobody knows."""
        return self.data.plan.mask(self.ids) if self.data.plan.edits else None

    @property
    def removed(self) -> int:
        """How many records the keep-list leaves out."""
        return int(self.notes["removed"])

    def false_discoveries(self) -> Section | None:
        """How many of the worst are expected to be there by chance."""
        truth = None if self.truth is None else self.truth[self.order]
        told = metric_names.as_dict(self.notes.get("discovery"))
        return (
            reliability_sections.false_discovery_section(self.measures, told, truth, self.removed)
            if told
            else None
        )

    def ranking(self) -> Section | None:
        """Poisons found against records reviewed, where the truth is known; the scores of both kinds."""
        merged, truth = self.scores[""], self.truth
        edge = (
            (float(merged.values[self.order[self.removed - 1]]), "removed from here up")
            if self.removed
            else None
        )
        if truth is None:
            chart = charts.draw_histogram(
                [Series("all records", merged.values.numpy())], "score", "scores", edge
            )
            return Section(
                "Scores",
                [Figures([Figure(chart, "Scores of all records")])],
                "Nothing is known of which records are poisons.",
            )
        groups = [
            Series("clean", merged.values.numpy()[~truth], "clean"),
            Series("poison", merged.values.numpy()[truth], "bad"),
        ]
        histogram = charts.draw_histogram(groups, "score", "scores", edge)
        figures = [
            Figure(
                self.curve(),
                "How fast a reviewer finds the poisons",
                "Upper left is better; dotted: records in random order.",
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
        lines = [
            (
                Series(
                    "all together" if len(single) > 1 else "ranking", self.truth[self.order], "bad"
                ),
                2,
            )
        ]
        others = [p for p in charts.SERIES_COLOURS if p != "bad"]
        for i, name in enumerate(single if len(single) > 1 else ()):
            lines.append(
                (
                    Series(
                        pictures.shorten(name, 24),
                        self.truth[self.scores[name].ranking()],
                        others[i % len(others)],
                    ),
                    1,
                )
            )
        return charts.draw_ranking(lines, self.removed / len(self.ids))

    def keep_list(self) -> Section | None:
        """What is removed, of which kind."""
        if self.truth is None:
            return None
        plan = self.data.plan
        gone = {self.ids[i] for i in self.order[: self.removed].tolist()}
        rows = []
        for title, members in kinds(plan.goals):
            mine = [e.id for e in plan.edits if e.goal in members]
            hit = sum(k in gone for k in mine)
            rows.append(
                [
                    title,
                    f"{len(mine):,}",
                    f"{hit:,}",
                    metric_names.format_percent(hit / len(mine)) if mine else "–",
                ]
            )
        clean = int((~self.truth).sum())
        lost = len(gone) - sum(k in plan.ids for k in gone)
        rows.append(
            [
                "clean records",
                f"{clean:,}",
                f"{lost:,}",
                metric_names.format_percent(lost / clean) if clean else "–",
            ]
        )
        return Section(
            "What the keep-list leaves out",
            [Table(("Records", "In the data", "Left out", "Share"), rows, (1, 2, 3))],
        )

    def most_suspicious_records(self, most: int = SHOWN) -> Section | None:
        """The worst records with their scores."""
        ranked = self.worst(most)
        if not ranked:
            return None
        told = "The higher the score, the more suspicious."
        if self.poisons is not None:
            told += f" {sum(self.ids[i] in self.poisons for _, i in ranked)} of these {len(ranked)} are poisons."
        if self.windows:
            told += " Framed: the part of the image that carries the caption."
        return Section("Most suspicious records", [self.shown(ranked)], told)

    @functools.cached_property
    def windows(self) -> dict[str, Box]:
        """The window of an image that a detector has found to carry its caption."""
        return read_windows(self.run.path)

    def shown(self, ranked: list[tuple[int, int]], title: str = "", scale: int = 104) -> Part:
        """Records as pictures; as a table where there are no images."""
        if self.pictures:
            return record_tiles.record_gallery(
                self.corpus, self.scored, ranked, self.poisons, self.windows, scale, title
            )
        held = self.scored
        rows = [
            [
                f"{n}",
                pictures.shorten(held.captions[i] or held.ids[i]),
                f"{float(held.merged.values[i]):.3f}",
            ]
            for n, i in ranked
        ]
        rows = [
            [*row, pictures.shorten(held.places[i], 80)]
            for row, (_, i) in zip(rows, ranked, strict=True)
        ]
        return Table(("Rank", "Record", "Score", "Place"), rows, (0, 2), title)

    def what_they_resemble(self) -> Section | None:
        """The very worst beside their nearest neighbours."""
        beside = (
            record_tiles.neighbour_gallery(self.corpus, self.scored, self.worst(BESIDE))
            if self.pictures
            else None
        )
        if beside is None:
            return None
        lead = "Each of the worst, and the records of the corpus that the encoder finds most like it, with the cosine."
        return Section("What the worst resemble", [beside], lead)

    def groups_among_the_worst(self) -> Section | None:
        """Records of one kind among the worst: what a campaign looks like."""
        rows = self.order[: min(GROUPED, max(self.removed, SHOWN))]
        vectors = self.corpus.embedded.images[torch.from_numpy(rows.copy())]
        captions = list(self.scored.captions.take(rows))
        found = similar_records.group_records(
            vectors, captions, similar_records.word_shares(self.scored.captions)
        )[:GROUPS]
        if not found:
            return None
        parts = []
        for i, group in enumerate(found, 1):
            mine = rows[group.members].tolist()
            title = f"{i}: {len(mine)} records" + (
                f", “{' '.join(group.words)}”" if group.words else ""
            )
            if self.poisons is not None:
                title += f", {sum(self.ids[r] in self.poisons for r in mine)} of them poisons"
            parts.append(
                self.shown(
                    [(group.members[j] + 1, r) for j, r in enumerate(mine[:EACH])], title, 80
                )
            )
        lead = (
            f"The worst {len(rows)}, grouped by their vectors and by the rarer words that their captions share. "
            "A group of one target and many subjects is what a backdoor looks like; one subject, a rare or repeated one."
        )
        return Section("Groups among the worst", parts, lead)

    def what_each_detector_adds(self) -> Section | None:
        """Of the records that are removed, which would not be without it."""
        if len(self.scored.detectors) < 2 or not self.removed:
            return None
        found, seconds = (
            merging.measure_contributions(self.scored.detectors, self.removed),
            metric_names.as_dict(self.notes.get("seconds")),
        )
        rows = []
        for name, share in found.items():
            alike = ", ".join(
                f"{pictures.shorten(k, 24)} {v:+.2f}" for k, v in share.correlation.items()
            )
            took = f"{seconds[name]:,.0f}" if name in seconds else "–"
            rows.append(
                [
                    pictures.shorten(name, 40),
                    f"{share.in_worst:,}",
                    f"{share.unique:,}",
                    took,
                    alike,
                ]
            )
        head = (
            "Detector",
            "Of its own worst",
            "It alone brings",
            "Seconds",
            "Rank correlation with",
        )
        lead = f"Of the {self.removed:,} records that are removed. What several share is in the seconds of the first."
        return Section("What each detector adds", [Table(head, rows, (1, 2, 3))], lead)

    def todays_cleaning(self) -> Section | None:
        """Which poisons pass the filters that people use."""
        return reliability_sections.filter_section(
            self.measures, metric_names.as_dict(self.notes.get("filters"))
        )

    def side_channels(self) -> Section | None:
        """What tells poisons without looking at them."""
        return reliability_sections.side_channel_section(
            self.measures, metric_names.as_dict(self.notes.get("leaks"))
        )

    def poisons_missed(self) -> Section | None:
        """Poisons that the ranking puts last: what this scan is blind to."""
        if self.truth is None:
            return None
        last = [
            (n + 1, i)
            for n, i in enumerate(self.order.tolist())
            if self.truth[i] and n >= self.removed
        ][::-1]
        if not last:
            return Section("Poisons missed", (), "None: the keep-list leaves out every poison.")
        lead = f"{metric_names.quantity(len(last), 'poison')} of {int(self.truth.sum()):,} stay in the data; shown are those ranked last."
        return Section("Poisons missed", [self.shown(last[:MISSED])], lead)
