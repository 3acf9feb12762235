"""The page of a scan: findings, the worst records, and how far the ranking can be trusted."""

import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray

from bezoar.detection import merging
from bezoar.detection.corpus.corpus import Corpus, ScanScores, load_scores, reopen_corpus
from bezoar.detection.reliability import read_windows
from bezoar.reports import charts, pictures, record_tiles, similar_records
from bezoar.reports.charts import Mark, Series
from bezoar.reports.metric_names import as_dict, format_measure, format_percent, quantity
from bezoar.reports.page_parts import Figure, Part, Section, Step, Table, Text
from bezoar.reports.record_tiles import FULL_SCALE, Box, RankedRecord
from bezoar.reports.reliability_sections import (
    false_discovery_section,
    filter_section,
    integrity_section,
    separating_channels,
    side_channel_section,
)
from bezoar.reports.run_page import Page, RunView, as_list, as_sentences
from bezoar.reports.shared_parts import group_goals
from bezoar.reports.shell_commands import shell_command
from bezoar.reports.source_sections import source_section
from bezoar.runs.run import Run

WORST = 40  # records that are shown as the most suspicious
MISSED = 12  # poisons that are shown as missed
WITH_NEIGHBOURS = 8  # records that are shown beside their neighbours
GROUPED = 300  # of the worst records, how many are grouped
GROUPS = 6  # groups that are shown
GROUP_MEMBERS = 8  # records that are shown of each


class ScanView(RunView):
    """A scan with its scores, records and, if they are known, the poisons."""

    @functools.cached_property
    def scores(self) -> ScanScores:
        """Scores, captions and places of all records."""
        return load_scores(self.run.path)

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The same records with their vectors, and their images if there are any."""
        return reopen_corpus(self.run)

    @property
    def has_images(self) -> bool:
        """Whether there are images to show."""
        return self.corpus.source.has_images

    @functools.cached_property
    def order(self) -> NDArray[np.int64]:
        """Rows of all records, most suspicious first."""
        leaving = self.notes.get("leaving", list(self.scores.detectors))
        scores = [s for name, s in self.scores.detectors.items() if name in leaving]
        raised = merging.raised_rows(scores, len(self.scores))
        return merging.order_records(self.scores.merged, raised)

    @functools.cached_property
    def is_poison(self) -> NDArray[np.bool_] | None:
        """For each row whether the record is a poison; None if that is unknown."""
        return self.data.plan.mask(self.scores.ids) if self.data.plan.edits else None

    @functools.cached_property
    def windows(self) -> dict[str, Box]:
        """The windows of images that a detector found to carry the caption, by id."""
        return read_windows(self.run.path)

    @functools.cached_property
    def copies(self) -> dict[int, int]:
        """The rows of copies of a picture, each with the row of another copy."""
        pairs = {r["id"]: r.get("copy_of") for r in self.read_json("ranked.json")}
        row_of = self.find_rows({key for pair in pairs.items() for key in pair if pair[1]})
        return {
            row_of[key]: row_of[copy]
            for key, copy in pairs.items()
            if key in row_of and copy in row_of
        }

    @property
    def removed(self) -> int:
        """How many records the keep-list leaves out."""
        return int(self.notes["removed"])

    def find_rows(self, ids: Collection[str]) -> dict[str, int]:
        """The rows of those of the ids that are among the records."""
        return {key: row for row, key in enumerate(self.scores.ids) if key in ids} if ids else {}

    @property
    def clearest(self) -> list[list[str]]:
        """For each trigger that a detector found the ids of those that show it most clearly."""
        named = [
            [key for key in as_list(as_dict(trigger).get("clearest")) if isinstance(key, str)]
            for note in self.note_dict("detector_notes").values()
            for name in ("causes", "triggers")
            for trigger in as_list(as_dict(note).get(name))
        ]
        return [ids for ids in named if ids]

    def worst(self, count: int) -> list[RankedRecord]:
        """Return the most suspicious records, by their rank; those of several triggers in turn."""
        rows = self.order[:count].tolist()
        if len(self.clearest) > 1:
            row_of = self.find_rows(set(itertools.chain(*self.clearest)))
            in_turn = itertools.chain(*itertools.zip_longest(*self.clearest))
            rows = [row_of[key] for key in in_turn if key in row_of] + rows
        ranks = np.empty_like(self.order)
        ranks[self.order] = np.arange(1, len(ranks) + 1)
        return [RankedRecord(int(ranks[row]), row) for row in list(dict.fromkeys(rows))[:count]]


def build_page(run: Run) -> Page:
    """Return the page of a scan."""
    view = ScanView(run)
    findings = [f for f in (trigger_finding(view), keep_list_finding(view)) if f]
    untrained = as_sentences([line for line in [view.notes.get("untrained")] if line])
    leaks, filters = view.note_dict("leaks"), view.note_dict("filters")
    return Page(
        findings[0],
        " ".join([*findings[1:], untrained, view.incomplete]).strip(),
        warning(view),
        [
            "poisons_removed",
            *(key for key in view.measures if key.endswith(".raised")),
            "auroc",
            "average_precision",
            "recall_at_0.01",
            "precision_at_n",
        ],
        {
            "How many of the worst are false discoveries": partial(discovery_section, view),
            "Sources": partial(source_section, run, view.note_dict("sources")),
            "Ranking": partial(ranking_section, view),
            "What the keep-list leaves out": partial(keep_list_section, view),
            "Most suspicious records": partial(worst_section, view),
            "What the worst resemble": partial(neighbour_section, view),
            "Groups among the worst": partial(group_section, view),
            "Poisons missed": partial(missed_section, view),
            "What each detector adds": partial(contribution_section, view),
            "What today's cleaning lets through": partial(filter_section, view.measures, filters),
            "Recorded hashes and sizes": partial(
                integrity_section, run, view.note_dict("integrity")
            ),
            "Side channels": partial(side_channel_section, view.measures, leaks),
        },
        bool(view.goals),
        look="bad" if raised_names(view) else "",
        steps=next_steps(view),
    )


def raised_names(view: ScanView) -> list[str]:
    """The detectors that raised records."""
    raised = [key for key, m in view.measures.items() if key.endswith(".raised") and m.value]
    return [key.removesuffix(".raised") for key in raised]


def next_steps(view: ScanView) -> list[Step]:
    """List the next steps after a scan."""
    if "removed" not in view.notes:
        return []
    name, data = view.run.name, view.input_text("data")
    names = raised_names(view)
    steps = [
        Step(
            f"Look at the records that {' and '.join(names)} raised, below; `removed.csv` names "
            "them."
        )
        if names
        else Step(
            "Look at the worst records below. Nothing was raised, which is no proof: they are only "
            "the most suspicious of these."
        )
    ]
    if view.notes.get("untrained"):
        text = "Scan with a model that learnt these data; a trigger shows in no other."
        steps.append(Step(text, view.command(f"scan {data} --fail-on trigger")))
    train = view.command(f"train {data} --keep {name}")
    steps.append(Step("Train without what the keep-list leaves out.", train))
    if "written" in view.notes:
        steps.append(Step("`shards` holds a copy of the data without them."))
    else:
        write = shell_command(view.run, seeded=False, write="shards")
        steps.append(Step("Or write a copy without them; nothing is embedded again.", write))
    return steps


def warning(view: ScanView) -> str:
    """State that the data were poisoned, and whether side channels reveal the poisons."""
    if not view.goals:
        return ""
    text = (
        "The data that were scanned had been poisoned on purpose; the truth was read after the "
        "ranking was made."
    )
    channels = separating_channels(view.measures, view.note_dict("leaks"))
    if channels:
        name, measure = channels[0]
        text += (
            f" {quantity(len(channels), 'side channel')} (such as {name.replace('_', ' ')}, AUROC "
            f"{measure.value:.2f}) can tell the poisons from other records without a detector. "
            "Every detector's figures here carry that doubt."
        )
    return text


def trigger_finding(view: ScanView) -> str:
    """State in how many records detectors found a trigger; empty if no detector decides that."""
    suffix = ".raised"
    counts = {
        key.removesuffix(suffix): (round(m.value * m.n), m.n)
        for key, m in view.measures.items()
        if key.endswith(suffix)
    }
    hits = [
        f"{name} found a trigger in {n:,} of {total:,} records"
        for name, (n, total) in counts.items()
        if n
    ]
    if hits:
        return "; ".join(hits) + "."
    return as_sentences([str(line) for line in view.notes.get("decided") or ()])


def keep_list_finding(view: ScanView) -> str:
    """State how many records the keep-list leaves out, and how many poisons are among them."""
    records, removed = view.notes.get("records"), view.notes.get("removed")
    if records is None or removed is None:
        return "This scan was not finished."
    share = format_percent(removed / max(1, records))
    sentence = (
        f"The keep-list leaves out the {removed:,} most suspicious of {records:,} records ({share})"
    )
    poisons = view.measures.get("poisons_removed")
    if poisons is None:
        return f"{sentence}; whether they are poisons is not known."
    hits = round(poisons.value * poisons.n)
    return (
        f"{sentence}; among them are {hits:,} of the {poisons.n:,} poisons: "
        f"{format_measure(poisons)}."
    )


def discovery_section(view: ScanView) -> Section | None:
    """Show how many of the worst records are expected to be there by chance."""
    truth = None if view.is_poison is None else view.is_poison[view.order]
    notes = view.note_dict("discovery")
    return false_discovery_section(view.measures, notes, truth, view.removed)


def ranking_section(view: ScanView) -> Section:
    """Show the scores, and how fast a reviewer finds the poisons if they are known."""
    values = view.scores.merged.values.numpy()
    edge = None
    if view.removed:
        edge = Mark(float(values[view.order[view.removed - 1]]), "removed from here on")
    if view.is_poison is None:
        svg = charts.draw_histogram([Series("all records", values)], "score", edge)
        lead = "It is not known which records are poisons."
        return Section([Figure(svg, "Scores of all records")], lead)
    groups = [
        Series("clean", values[~view.is_poison], "clean"),
        Series("poison", values[view.is_poison], "bad"),
    ]
    histogram = charts.draw_histogram(groups, "score", edge)
    informative = informative_rankings(view)
    if not informative:
        return Section([Text("No ranking differs from chance: every interval of AUROC holds .5.")])
    silent = []
    if len(informative) > 1:
        silent = [name for name in view.scores.detectors if name not in informative]
    note = "Closer to the upper left is better. Dotted: records in random order."
    if silent:
        note += f" Not drawn, as they cannot be told from chance: {', '.join(silent)}."
    figures = [
        Figure(
            ranking_curves(view, view.is_poison, informative),
            "How fast a reviewer finds the poisons",
            note,
        ),
        Figure(
            histogram,
            "Scores of clean records and poisons",
            "The share of each group by score; higher is more suspicious.",
        ),
    ]
    return Section(figures)


def informative_rankings(view: ScanView) -> list[str]:
    """The rankings that differ from chance; "" is the one of all detectors together."""
    keys = {"": "auroc", **{name: f"{name}.auroc" for name in view.scores.detectors}}
    measures = {name: view.measures.get(key) for name, key in keys.items()}
    return [name for name, m in measures.items() if m is not None and not m.low <= 0.5 <= m.high]


def ranking_curves(view: ScanView, is_poison: NDArray[np.bool_], names: Sequence[str]) -> Markup:
    """Draw recall against the share of records reviewed, for the named rankings."""
    several = len(view.scores.detectors) > 1
    detectors = {n: s for n, s in view.scores.detectors.items() if several and n in names}
    name = "all together" if several else "ranking"
    rankings = [Series(name, is_poison[view.order], "bad")]
    colours = [c for c in charts.SERIES_COLOURS if c != "bad"]
    for i, (name, scores) in enumerate(detectors.items()):
        colour = colours[i % len(colours)]
        rankings.append(Series(pictures.shorten(name, 24), is_poison[scores.ranking()], colour))
    return charts.draw_ranking(rankings, view.removed / len(is_poison))


def keep_list_section(view: ScanView) -> Section | None:
    """Show the records that the keep-list leaves out, by kind."""
    if view.is_poison is None:
        return None
    plan = view.data.plan
    removed_ids = {view.scores.ids[row] for row in view.order[: view.removed].tolist()}
    counts = []
    for group in group_goals(plan.goals):
        ids = [e.id for e in plan.edits if e.goal in group.members]
        counts.append((group.title, len(ids), sum(k in removed_ids for k in ids)))
    clean_removed = len(removed_ids - plan.ids)
    counts.append(("clean records", int((~view.is_poison).sum()), clean_removed))
    rows = [
        [title, f"{total:,}", f"{removed:,}", format_percent(removed / total) if total else "–"]
        for title, total, removed in counts
    ]
    return Section([Table(("Records", "In the data", "Left out", "Share"), rows, (1, 2, 3))])


def worst_section(view: ScanView) -> Section | None:
    """Show the worst records with their scores."""
    ranked = view.worst(WORST)
    if not ranked:
        return None
    lead = "The higher the score, the more suspicious."
    if view.is_poison is not None:
        poisons = sum(bool(view.is_poison[r.row]) for r in ranked)
        lead += f" {poisons} of these {len(ranked)} are poisons."
    if len(view.clearest) > 1:
        lead += " Those of each trigger that was found are shown in turn, with their ranks."
    if view.windows:
        lead += (
            " Framed: the window that, pasted into other images, draws them most towards this "
            "caption, be it a trigger or the object that the caption names."
        )
    copied = [r for r in ranked if r.row in view.copies] if view.has_images else []
    others = [r for r in ranked if r not in copied]
    parts = [record_part(view, others)] if others else []
    if copied:
        title = "Copies of one picture, each beside another with its caption"
        parts.append(record_part(view, copied, title, copies=view.copies))
    return Section(parts, lead)


def record_part(
    view: ScanView,
    ranked: list[RankedRecord],
    title: str = "",
    scale: int = FULL_SCALE,
    copies: Mapping[int, int] | None = None,
) -> Part:
    """Show records as pictures, or as a table if there are no images."""
    scores = view.scores
    if view.has_images:
        poisons = None if view.is_poison is None else view.data.plan.ids
        return record_tiles.record_gallery(
            view.corpus, scores, ranked, poisons, view.windows, scale, title, copies
        )
    rows = [
        [
            scores.ids[r.row],
            f"{r.rank}",
            pictures.shorten(record_tiles.caption_or_id(scores, r.row)),
            f"{float(scores.merged.values[r.row]):.3f}",
            pictures.shorten(scores.places[r.row], 80),
        ]
        for r in ranked
    ]
    return Table(("Key", "Rank", "Caption", "Score", "Place"), rows, (1, 3), title)


def neighbour_section(view: ScanView) -> Section | None:
    """Show the very worst records beside their nearest neighbours."""
    if not view.has_images:
        return None
    gallery = record_tiles.neighbour_gallery(view.corpus, view.scores, view.worst(WITH_NEIGHBOURS))
    lead = (
        "Each of the worst records beside those of the corpus that the encoder finds most like it, "
        "with the cosine."
    )
    return Section([gallery], lead) if gallery else None


def group_section(view: ScanView) -> Section | None:
    """Show groups of similar records among the worst, as the poisons of one attack are."""
    rows = view.order[: min(GROUPED, max(view.removed, WORST))]
    vectors = view.corpus.embedded.images[torch.from_numpy(rows.copy())]
    captions = list(view.scores.captions.take(rows))
    shares = similar_records.word_shares(view.scores.captions)
    parts = []
    for number, group in enumerate(
        similar_records.group_records(vectors, captions, shares)[:GROUPS], 1
    ):
        members = rows[group.members].tolist()
        title = f"{number}: {len(members)} records"
        if group.words:
            title += f", “{' '.join(group.words)}”"
        if view.is_poison is not None:
            title += f", {int(view.is_poison[members].sum())} of them poisons"
        ranked = [
            RankedRecord(place + 1, row) for place, row in zip(group.members, members, strict=True)
        ]
        parts.append(record_part(view, ranked[:GROUP_MEMBERS], title, 80))
    lead = (
        f"The worst {len(rows)} records, grouped by their vectors and by the rarer words that "
        "their captions share. A backdoor shows as a group with one target and many subjects. A "
        "group with one subject is a rare or repeated one."
    )
    return Section(parts, lead) if parts else None


def missed_section(view: ScanView) -> Section | None:
    """Show the poisons that the ranking puts last."""
    if view.is_poison is None:
        return None
    missed = [
        RankedRecord(i + 1, row)
        for i, row in enumerate(view.order.tolist())
        if view.is_poison[row] and i >= view.removed
    ]
    if not missed:
        return Section((), "None: the keep-list leaves out every poison.")
    lead = (
        f"{quantity(len(missed), 'poison')} of {int(view.is_poison.sum()):,} stay in the data. "
        "Shown are those ranked last."
    )
    return Section([record_part(view, missed[::-1][:MISSED])], lead)


def contribution_section(view: ScanView) -> Section | None:
    """Show which of the removed records would not be removed without a detector."""
    if len(view.scores.detectors) < 2 or not view.removed:
        return None
    seconds = view.note_dict("seconds")
    rows = []
    for name, share in merging.measure_contributions(view.scores.detectors, view.removed).items():
        correlations = [
            f"{pictures.shorten(other, 24)} {value:+.2f}"
            for other, value in share.correlation.items()
        ]
        rows.append(
            [
                pictures.shorten(name, 40),
                f"{share.in_worst:,}",
                f"{share.unique:,}",
                f"{seconds[name]:,.0f}" if name in seconds else "–",
                ", ".join(correlations),
            ]
        )
    head = (
        "Detector",
        "Among its own worst",
        "Found by it alone",
        "Seconds",
        "Rank correlation with",
    )
    lead = (
        f"Of the {view.removed:,} records that are removed. Work that several detectors share "
        "counts among the seconds of the first."
    )
    return Section([Table(head, rows, (1, 2, 3))], lead)
