"""Sections of a scan's page on what its ranking is worth: false discoveries, side channels, the usual filters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
from markupsafe import Markup

from bezoar.detection.reliability import side_channels
from bezoar.evaluation.scores import Measure
from bezoar.reports import metric_names
from bezoar.reports.charts import (
    COLOURS,
    WIDE,
    add_legend,
    house_style,
    new_figure,
    set_percent_axis,
    svg_markup,
)
from bezoar.reports.page_parts import Figure, Section, Table, Text

FILTERS = {  # name -> in words
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


def expected(measures: Mapping[str, Measure]) -> list[tuple[int, Measure]]:
    """n and how many of the worst n are expected to be clean, ascending."""
    found = [(re.fullmatch(r"expected_clean@(\d+)", k), m) for k, m in measures.items()]
    return sorted((int(k[1]), m) for k, m in found if k)


def false_discovery_section(
    measures: Mapping[str, Measure], told: Mapping, truth: np.ndarray | None, removed: int
) -> Section:
    """truth: bool (N,), worst first: is it a poison; None where nobody knows."""
    title = "How many of the worst are false discoveries"
    rows = expected(measures)
    if not rows:
        return Section(title, [Text(f"No estimate: {told.get('why') or 'none was made'}.")])
    at, m = next((r for r in rows if r[0] == removed), rows[-1])
    lead = f"Of the worst {at:,} records, {m.low:,.0f} to {m.high:,.0f} are expected to be clean ones that rank there by chance"
    more = at - math.ceil(m.high)
    lead += (
        f", so at least {more:,} stand out: not like the clean ones."
        if more > 0
        else "; they may all be."
        if m.low > 0
        else ": this cannot be told."
    )
    notes = [str(told.get("assumption", ""))]
    if truth is not None:
        notes.append(f"In truth {int((~truth[:at]).sum()):,} of these {at:,} are clean.")
    return Section(
        title,
        [
            Figure(
                curve(rows, truth),
                "Share of clean records among the worst n",
                " ".join(notes),
            )
        ],
        lead,
    )


@house_style
def curve(rows: list[tuple[int, Measure]], truth: np.ndarray | None) -> Markup:
    """The estimate with its range over n, and the truth where it is known."""
    figure, axes = new_figure((WIDE[0], 3.0))
    n = np.array([at for at, _ in rows], dtype=float)
    value, low, high = (
        np.array([getattr(m, end) for _, m in rows]) / n for end in ("value", "low", "high")
    )
    axes.fill_between(n, low, high, color=COLOURS["clean"], alpha=0.16, linewidth=0, label="range")
    axes.plot(
        n,
        value,
        color=COLOURS["clean"],
        marker="o",
        markersize=4,
        label="expected to be clean",
        clip_on=False,
    )
    if truth is not None:
        every = np.unique(np.geomspace(max(1, n[0]), n[-1], 200).astype(int))
        share = np.cumsum(~truth)[every - 1] / every
        axes.plot(every, share, color=COLOURS["bad"], linewidth=1.4, label="clean in truth")
    axes.set_xscale("log")
    axes.set_xlim(n[0], n[-1] if n[-1] > n[0] else n[0] + 1)
    axes.set_ylim(0, 1.02)
    axes.minorticks_off()
    axes.set_xticks(n, [f"{x:,.0f}" for x in n])
    set_percent_axis(axes.yaxis)
    axes.set_xlabel("the worst n records (log scale)")
    add_legend(axes, 3 if truth is not None else 2)
    told = "; ".join(
        f"{100 * v:.0f} % ({100 * a:.0f} to {100 * b:.0f}) of {x:.0f}"
        for x, v, a, b in zip(n, value, low, high, strict=True)
    )
    return svg_markup(
        figure, "discoveries", f"Share expected to be clean among the worst n: {told}"
    )


def separating_channels(
    measures: Mapping[str, Measure], told: Mapping
) -> list[tuple[str, Measure]]:
    """The side channels that separate, worst first."""
    found = told.get("separates") or []
    return [
        (name, measures[f"leak.{name}.auroc"]) for name in found if f"leak.{name}.auroc" in measures
    ]


def side_channel_section(measures: Mapping[str, Measure], told: Mapping) -> Section | None:
    """Every channel with its AUROC, worst first; what could not be looked at."""
    if not told:
        return None
    bad = separating_channels(measures, told)
    keys = [k for k in measures if k.startswith("leak.") and k.endswith(".auroc")]
    rows = []
    for key in sorted(keys, key=lambda k: -measures[k].value):
        name, m = key[5:-6], measures[key]
        mark = "leak" if name in dict(bad) else ""
        rows.append(
            [
                name.replace("_", " "),
                side_channels.DESCRIPTIONS.get(name, name),
                f"{m.value:.3f}",
                metric_names.format_interval(m, metric_names.SCORE),
                mark,
            ]
        )
    of = told.get("of", "poisons")
    lead = f"What has nothing to do with images and captions tells none of the {of} from the rest."
    if bad:
        names = ", ".join(f"{name.replace('_', ' ')} ({m.value:.2f})" for name, m in bad[:4])
        lead = f"{of.capitalize()} can be told from the rest without a detector: {names}. Detector figures here say less."
    absent = [
        f"{', '.join(x.replace('_', ' ') for x in names)}: {why}"
        for why, names in metric_names.as_dict(told.get("not_applicable")).items()
    ]
    note = (
        "AUROC of one channel alone, direction chosen on half of the records, measured on the other; a leak is above "
        f"{side_channels.SEPARATES} with chance ruled out over all channels. "
        + (f"Not looked at: {'; '.join(absent)}." if absent else "")
    )
    parts = (
        [Table(("Channel", "What it is", "AUROC", "95 % interval", ""), rows, (2, 3), note)]
        if rows
        else [Text(note)]
    )
    return Section(
        "Side channels",
        parts,
        lead if rows else "Nothing could be measured: too few records on one side.",
    )


def filter_section(measures: Mapping[str, Measure], told: Mapping) -> Section | None:
    """The usual filters: clean records kept, poisons that pass."""
    rows = []
    for name, text in FILTERS.items():
        kept, passed = (
            measures.get(f"filter.{name}.clean_kept"),
            measures.get(f"filter.{name}.poisons_pass"),
        )
        if kept is not None and passed is not None:
            rows.append([text, metric_names.format_rate(kept), metric_names.format_rate(passed)])
    if not rows:
        return None
    absent = "; ".join(f"{FILTERS.get(k, k)}: {why}" for k, why in told.items())
    note = "In brackets, 95 % intervals." + (f" Not applied: {absent}." if absent else "")
    lead = "What web corpora are cleaned with anyway. A filter helps where it keeps clean records and few poisons pass."
    return Section(
        "What today's cleaning lets through",
        [Table(("Filter", "Clean kept", "Poisons that pass"), rows, (1, 2), note)],
        lead,
    )
