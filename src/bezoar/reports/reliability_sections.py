"""Sections of a scan's page on how far its ranking can be trusted."""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from bezoar.data.files.tables import read_rows
from bezoar.detection.reliability import integrity, side_channels
from bezoar.evaluation.scores import Measure
from bezoar.reports import metric_names
from bezoar.reports.charts import (
    COLOURS,
    WIDE,
    Style,
    add_legend,
    house_style,
    new_figure,
    set_percent_axis,
    svg_markup,
)
from bezoar.reports.metric_names import SCORE, format_interval
from bezoar.reports.page_parts import Figure, Line, Section, Table, Text
from bezoar.reports.pictures import shorten
from bezoar.reports.shared_parts import measure_table
from bezoar.runs.run import Run

SHOWN_DOMAINS = 20

FILTERS = {
    "clip_score_30": "agreement of image and caption: the best 30 % (DataComp)",
    "clip_score_10": "agreement of image and caption: the best 10 % (LAION)",
    "image_duplicates": "each picture once",
    "resolution": "smaller side over 200 pixels",
    "aspect": "sides under 3 to 1",
    "caption_duplicates": "each caption once",
    "caption_length": "captions over 2 words and 5 characters",
    "language": "English, by letters and commonest words",
    "datacomp_basic": "DataComp's basic filter, as far as it applies",
    "all": "all together, agreement at 30 %",
}


def false_discovery_section(
    measures: Mapping[str, Measure],
    notes: Mapping[str, Any],
    truth: NDArray[np.bool_] | None,
    removed: int,
) -> Section | None:
    """Show how many of the worst records are expected to be clean, by a reference sample.

    Args:
        notes: Its notes on false discoveries; empty if none were estimated.
        truth: For each record, worst first, whether it is a poison; None if that is unknown.
        removed: How many records the keep-list leaves out.
    """
    matches = {re.fullmatch(r"expected_clean@(\d+)", key): m for key, m in measures.items()}
    estimates = {int(match[1]): m for match, m in matches.items() if match}
    if not estimates:
        return Section([Text(f"No estimate: {notes['why']}.")]) if notes.get("why") else None
    worst = removed if removed in estimates else max(estimates)
    measure = estimates[worst]
    lead = (
        f"Of the worst {worst:,} records, {measure.low:,.0f} to {measure.high:,.0f} are expected "
        "to be clean ones that rank there by chance"
    )
    surplus = worst - math.ceil(measure.high)
    if surplus > 0:
        lead += f", so at least {surplus:,} stand out: they are not like the clean ones."
    else:
        lead += "; they may all be." if measure.low > 0 else ": this cannot be told."
    note = str(notes.get("assumption", ""))
    if truth is not None:
        note += f" In truth {int((~truth[:worst]).sum()):,} of these {worst:,} are clean."
    svg = draw_false_discoveries(dict(sorted(estimates.items())), truth)
    return Section([Figure(svg, "Share of clean records among the worst n", note.strip())], lead)


@house_style
def draw_false_discoveries(
    estimates: Mapping[int, Measure], truth: NDArray[np.bool_] | None
) -> Markup:
    """Draw the expected share of clean records over the worst n, and the true one if known."""
    figure, axes = new_figure((WIDE[0], 3.0))
    n = np.array(list(estimates), dtype=float)
    value, low, high = (
        np.array([getattr(m, end) for m in estimates.values()]) / n
        for end in ("value", "low", "high")
    )
    blue = COLOURS["clean"]
    axes.fill_between(n, low, high, color=blue, alpha=0.16, linewidth=0, label="range")
    style: Style = {"marker": "o", "markersize": 4, "clip_on": False}
    axes.plot(n, value, color=blue, label="expected to be clean", **style)
    if truth is not None:
        counts = np.unique(np.geomspace(max(1, n[0]), n[-1], 200).astype(int))
        share = np.cumsum(~truth)[counts - 1] / counts
        axes.plot(counts, share, color=COLOURS["bad"], linewidth=1.4, label="clean in truth")
    axes.set_xscale("log")
    axes.set_xlim(n[0], n[-1] if n[-1] > n[0] else n[0] + 1)
    axes.set_ylim(0, 1.02)
    axes.minorticks_off()
    axes.set_xticks(n, [f"{x:,.0f}" for x in n])
    set_percent_axis(axes.yaxis)
    axes.set_xlabel("the worst n records (log scale)")
    add_legend(figure, 3 if truth is not None else 2)
    phrases = [
        f"{100 * v:.0f} % ({100 * a:.0f} to {100 * b:.0f}) of {x:.0f}"
        for x, v, a, b in zip(n, value, low, high, strict=True)
    ]
    description = f"Share expected to be clean among the worst n: {'; '.join(phrases)}"
    return svg_markup(figure, description)


def integrity_section(run: Run, notes: Mapping[str, Any]) -> Section | None:
    """Show the domains whose files differ from the recorded ones; None if nothing was compared."""
    path = run.path / integrity.DOMAINS_CSV
    if not notes or not path.exists():
        return None
    rows = [
        [str(cell or "") for cell in row.values()]
        for _, row in itertools.islice(read_rows(path), SHOWN_DOMAINS)
        if isinstance(row, dict)
    ]
    head = (
        *("Domain", "Records", "With a hash", "Same bytes", "Sizes alone fit"),
        *("Same picture, recoded", "Another picture", "Cannot tell"),
        *("Share of another, from", "to"),
    )
    note = (
        "95 % intervals, of the records with a hash. A mismatch is told apart by a recorded "
        "perceptual hash, or by how well the caption fits under an encoder that was not trained on "
        "these records; an attacker whose picture fits its caption passes the latter. "
        "mismatches.csv has the records."
    )
    shown = [[shorten(cell, 60) for cell in row] for row in rows]
    return Section([Table(head, shown, tuple(range(1, 10)), note)], f"{notes.get('sentence', '')}.")


def separating_channels(
    measures: Mapping[str, Measure], notes: Mapping[str, Any]
) -> list[tuple[str, Measure]]:
    """Return the side channels that separate poisons from other records, worst first."""
    names = notes.get("separates") or []
    keys = {name: f"leak.{name}.auroc" for name in names}
    return [(name, measures[key]) for name, key in keys.items() if key in measures]


def side_channel_section(
    measures: Mapping[str, Measure], notes: Mapping[str, Any]
) -> Section | None:
    """Show the AUROC of every side channel, worst first, and the unmeasured channels."""
    if not notes:
        return None
    separating = separating_channels(measures, notes)
    channels = {
        key.removeprefix("leak.").removesuffix(".auroc"): m
        for key, m in measures.items()
        if key.startswith("leak.") and key.endswith(".auroc")
    }
    rows: list[list[str | Line]] = [
        [
            name.replace("_", " "),
            side_channels.DESCRIPTIONS.get(name, name),
            f"{m.value:.3f}",
            format_interval(m, SCORE),
            Line("separates" if name in dict(separating) else "", "bad"),
        ]
        for name, m in sorted(channels.items(), key=lambda item: -item[1].value)
    ]
    poisons = notes.get("of", "poisons")
    lead = f"Nothing beside images and captions tells the {poisons} from the rest."
    if separating:
        names = [f"{name.replace('_', ' ')} ({m.value:.2f})" for name, m in separating[:4]]
        lead = (
            f"{poisons.capitalize()} can be told from the rest without a detector, by "
            f"{', '.join(names)}. The detectors' figures here say less."
        )
    note = (
        "AUROC of one channel alone. Its direction is chosen on half of the records, and it is "
        "measured on the other half. A channel separates if its AUROC is above "
        f"{side_channels.SEPARATES} with chance ruled out over all channels."
    )
    absent = [
        f"{', '.join(x.replace('_', ' ') for x in names)}: {why}"
        for why, names in metric_names.as_dict(notes.get("not_applicable")).items()
    ]
    if absent:
        note += f" Not measured: {'; '.join(absent)}."
    if not rows:
        return Section([Text(note)], "Nothing could be measured: too few records on one side.")
    head = ("Channel", "What it is", "AUROC", "95 % interval", "")
    return Section([Table(head, rows, (2, 3), note)], lead)


def filter_section(measures: Mapping[str, Measure], notes: Mapping[str, str]) -> Section | None:
    """Show for each usual filter which clean records it keeps and which poisons pass it.

    Args:
        notes: For each filter that was not applied, the reason.
    """
    note = "In brackets, 95 % intervals."
    if notes:
        absent = [f"{FILTERS.get(name, name)}: {why}" for name, why in notes.items()]
        note += f" Not applied: {'; '.join(absent)}."
    lead = (
        "Filters that web corpora are cleaned with anyway. A filter helps if it keeps clean "
        "records and few poisons pass."
    )
    rows = {description: [name] for name, description in FILTERS.items()}
    columns = {
        "Clean kept": "filter.{}.clean_kept",
        "Poisons that pass": "filter.{}.poisons_pass",
    }
    table = measure_table(measures, "Filter", rows, columns, note)
    return Section([table], lead) if table else None
