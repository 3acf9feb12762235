"""Charts as inline SVG in one style.

Text stays text. Colours are CSS variables of the page, so that charts follow its light or dark
theme.

Sizes are in inches. A colour is a name of COLOURS.
"""

import functools
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike, NDArray

from bezoar.evaluation.scores import Measure

Floats = NDArray[np.float64]
Size = tuple[float, float]  # inches
Style = dict[str, Any]  # options of matplotlib
P = ParamSpec("P")

# Placeholder colours for matplotlib; `svg_markup` replaces each by the CSS variable of that name.
COLOURS = {
    "ink": "#010101",
    "muted": "#010102",
    "line": "#010103",
    "clean": "#010104",
    "bad": "#010105",
    "good": "#010106",
    "warn": "#010107",
    "other": "#010108",
    "paper": "#010109",
}
SERIES_COLOURS = ("clean", "bad", "good", "warn", "other")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bezoar",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.labelsize": 9,
    "axes.edgecolor": COLOURS["line"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
HALF: Size = (5.4, 2.9)  # a chart beside another one
WIDE: Size = (10.8, 2.7)  # a chart as wide as the page
DASHED = (0, (4, 3))
DOTTED = (0, (1, 2))
MAX_POINTS = 500  # of a line


@dataclass(frozen=True)
class Series:
    """One line, histogram or row of dots."""

    name: str
    values: ArrayLike
    colour: str = "clean"


@dataclass(frozen=True)
class IntervalRow:
    """A row of `draw_intervals`: a rate with its 95 % interval."""

    label: str
    measure: Measure
    colour: str = "clean"


@dataclass(frozen=True)
class Mark:
    """A vertical line at a value, with its name for the legend."""

    value: float
    label: str
    colour: str = "ink"
    is_dashed: bool = True

    def draw(self, axes: Axes) -> None:
        """Draw the line."""
        style = DASHED if self.is_dashed else "solid"
        colour = COLOURS[self.colour]
        axes.axvline(self.value, color=colour, linewidth=1.2, linestyle=style, label=self.label)


def new_figure(size: Size) -> tuple[Figure, Axes]:
    """Return an empty figure and its axes."""
    figure = Figure(size, layout="constrained")
    return figure, figure.add_subplot()


def svg_markup(figure: Figure, description: str) -> Markup:
    """Return a figure as markup. `description` is for those who cannot see the chart."""
    out = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=metadata)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    size = "wide" if figure.get_figwidth() > HALF[0] else "half"
    svg = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg class="{size}" viewBox="\1">', svg)
    # Ids are unique on a page of several charts, and the same whenever the chart is.
    prefix = "c" + hashlib.sha256(f"{description}{svg}".encode()).hexdigest()[:10]
    svg = re.sub(r'(\bid="|href="#|url\(#)', lambda match: f"{match[1]}{prefix}-", svg)
    for colour, placeholder in COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{colour})")
    svg = svg.replace("'DejaVu Sans'", "var(--font)")
    label = Markup('role="img" aria-label="{}"').format(description)
    return Markup(svg.replace("<svg ", f"<svg {label} ", 1))


def house_style(draw: Callable[P, Markup]) -> Callable[P, Markup]:
    """Decorate a function so that it draws in STYLE."""

    @functools.wraps(draw)
    def draw_in_style(*args: P.args, **options: P.kwargs) -> Markup:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return draw_in_style


def set_percent_axis(axis: Axis) -> None:
    """Label an axis of shares in percent."""
    axis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))


def add_legend(figure: Figure, entries: int, columns: int | None = None) -> None:
    """Add a legend above the axes if there is more than one series."""
    columns = columns or (2 if entries == 4 else min(entries, 3))
    if entries > 1:
        figure.legend(loc="outside upper left", ncols=columns, handlelength=1.2, columnspacing=1.4)


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Turn the vertical axis into labelled rows, the first one on top."""
    axes.set_yticks(range(len(labels)), list(labels))
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"], length=0)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


@house_style
def draw_loss(losses: Floats, size: Size = HALF) -> Markup:
    """Draw the loss of every step, averaged over blocks of steps, and its running mean."""
    figure, axes = new_figure(size)
    step, loss = block_means(np.arange(1.0, len(losses) + 1), losses)
    axes.plot(step, loss, color=COLOURS["clean"], alpha=0.35, linewidth=1)
    window = max(1, len(loss) // 20)
    if window > 1:
        smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
        axes.plot(step[window // 2 :][: len(smooth)], smooth, color=COLOURS["clean"])
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.margins(x=0.01)
    return svg_markup(figure, f"Training loss over {len(losses)} steps")


def block_means(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Average x and y over blocks of equal length, so that at most MAX_POINTS points are left."""
    width = -(-len(y) // MAX_POINTS)
    if width <= 1:
        return x, y
    starts = np.arange(0, len(y), width)
    sizes = np.diff(np.append(starts, len(y)))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


@house_style
def draw_curves(x: Sequence[float], series: Sequence[Series], label: str) -> Markup:
    """Draw rates as lines over x, such as epochs. `label`: the quantity x."""
    figure, axes = new_figure(HALF)
    for s in series:
        colour = COLOURS[s.colour]
        axes.plot(x, s.values, "o-", color=colour, markersize=4, label=s.name, clip_on=False)
    set_percent_axis(axes.yaxis)
    axes.set_ylim(0, 1)
    if len(x) <= 12:
        axes.set_xticks(list(x))
    axes.set_xlabel(label)
    add_legend(figure, len(series))
    return svg_markup(figure, f"{', '.join(s.name for s in series)} by {label}")


@house_style
def draw_histogram(
    series: Sequence[Series], label: str, mark: Mark | None = None, size: Size = HALF
) -> Markup:
    """Draw a histogram of each group. `label`: the quantity."""
    figure, axes = new_figure(size)
    groups = [np.asarray(s.values, dtype=float) for s in series]
    edges, are_whole = bin_edges(np.concatenate(groups))
    for i, (s, values) in enumerate(zip(series, groups, strict=True)):
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        share = counts / max(1, len(values))
        if are_whole:
            width = 0.8 / len(series)
            centres = (edges[:-1] + 0.5) + (i - (len(series) - 1) / 2) * width
            axes.bar(centres, share, width * 0.94, color=COLOURS[s.colour], label=s.name)
        else:
            axes.stairs(share, edges, fill=True, color=COLOURS[s.colour], alpha=0.28)
            axes.stairs(share, edges, color=COLOURS[s.colour], linewidth=1.5, label=s.name)
    if are_whole:
        axes.grid(False, axis="x")
        axes.set_xticks((edges[:-1] + 0.5).round())
    if mark:
        mark.draw(axes)
    set_percent_axis(axes.yaxis)
    axes.set_xlabel(label)
    axes.set_ylabel("share of the group")
    add_legend(figure, len(series) + bool(mark))
    return svg_markup(figure, f"Histogram of {label}: {', '.join(s.name for s in series)}")


def bin_edges(values: Floats, bins: int = 40) -> tuple[Floats, bool]:
    """Return the edges of bins, and whether the values are whole numbers with a bin each.

    Of more than 2,000 values the outermost thousandths are to be drawn into the outermost bins.
    """
    if not len(values):
        return np.array([0.0, 1.0]), False
    low, high = values.min(), values.max()
    if high - low <= 15 and np.all(values == np.round(values)):
        return np.arange(low - 0.5, high + 1), True
    inner = np.quantile(values, [0.001, 0.999]) if len(values) > 2000 else (low, high)
    low, high = inner if inner[1] > inner[0] else (low - 0.5, high + 0.5)
    return np.linspace(low, high, bins + 1), False


@house_style
def draw_ranking(rankings: Sequence[Series], removed: float | None) -> Markup:
    """Draw the share of the poisons found against the share of records reviewed.

    Args:
        rankings: For each ranking whether its records are poisons, most suspicious first. The first
            one is drawn bold.
        removed: The share of the records that is removed, for a vertical line.
    """
    figure, axes = new_figure(HALF)
    for i, ranking in enumerate(rankings):
        hits = np.cumsum(np.asarray(ranking.values, dtype=float))
        counts = np.unique(np.geomspace(1, len(hits), 300).astype(int))
        x, recall = counts / len(hits), hits[counts - 1] / hits[-1]
        style: Style = {
            "color": COLOURS[ranking.colour],
            "linewidth": 1 if i else 2,
            "clip_on": False,
        }
        axes.plot(x, recall, label=ranking.name, **style)
    first = 1 / max(len(np.asarray(r.values)) for r in rankings)
    x = np.geomspace(first, 1, 100)
    axes.plot(x, x, color=COLOURS["muted"], linewidth=1, linestyle=DOTTED, label="by chance")
    if removed:
        Mark(removed, "removed").draw(axes)
    axes.set_xscale("log")
    axes.set_xlim(first, 1)
    axes.set_ylim(0, 1.01)
    axes.minorticks_off()
    set_percent_axis(axes.yaxis)
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes.set_xlabel("share of the records reviewed, most suspicious first (log scale)")
    axes.set_ylabel("poisons found")
    add_legend(figure, len(rankings) + 1 + bool(removed))
    return svg_markup(figure, "Poisons found against records reviewed")


@house_style
def draw_intervals(rows: Sequence[IntervalRow]) -> Markup:
    """Draw rates as dots with their 95 % intervals, one below another."""
    figure, axes = new_figure((WIDE[0], 0.55 + 0.29 * len(rows)))
    for y, row in enumerate(rows):
        m, colour = row.measure, COLOURS[row.colour]
        ends = [m.low, m.high]
        axes.plot(ends, [y, y], color=colour, linewidth=6, alpha=0.3)
        axes.plot([m.value], [y], "o", color=colour, markersize=6, clip_on=False)
    label_rows(axes, [row.label for row in rows])
    axes.set_xlim(-0.02, 1.02)
    set_percent_axis(axes.xaxis)
    description = "; ".join(f"{row.label}: {row.measure.value:.3f}" for row in rows)
    return svg_markup(figure, description)


@house_style
def draw_strips(rows: Sequence[Series], marks: Sequence[Mark], label: str) -> Markup:
    """Draw every value as a dot, one group below another. `label`: the quantity."""
    figure, axes = new_figure((WIDE[0], 0.95 + 0.42 * len(rows)))
    for y, row in enumerate(rows):
        # Dots are drawn on three levels in turn, so that close values do not overlap.
        values = np.sort(np.asarray(row.values, dtype=float))
        heights = y + 0.16 * (np.arange(len(values)) % 3 - 1)
        style: Style = {
            "color": COLOURS[row.colour],
            "alpha": 0.65,
            "markersize": 6,
            "markeredgewidth": 0,
        }
        axes.plot(values, heights, "o", **style)
    for mark in marks:
        mark.draw(axes)
    label_rows(axes, [row.name for row in rows])
    axes.set_xlabel(label)
    axes.margins(x=0.04)
    if marks:
        add_legend(figure, len(marks) + 1, columns=len(marks))
    return svg_markup(figure, f"{label} by group: {', '.join(row.name for row in rows)}")
