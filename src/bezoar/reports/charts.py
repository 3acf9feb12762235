"""Charts as inline SVG: one look, no colour of its own (CSS variables), text as text, ids that do not clash on a page."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from bezoar.evaluation.scores import Measure

# matplotlib paints in stand-ins, which become CSS variables: the page's theme, light or dark, colours the charts
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
STYLE: Any = {
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
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
HALF, WIDE, MAX_POINTS = (
    (5.4, 2.9),
    (10.8, 2.7),
    500,
)  # inches: half a page, a whole one; points of a line


@dataclass(frozen=True)
class Series:
    """One line, histogram or set of bars. paint: a name of PAINT."""

    name: str
    values: Sequence[float] | np.ndarray
    colour: str = "clean"


def new_figure(size: tuple[float, float]) -> tuple[Any, Any]:
    """An empty figure of a size in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    return figure, figure.add_subplot()


def svg_markup(figure: Any, name: str, alternative: str) -> Markup:
    """The figure as markup for a page: sized by it, coloured by it, named for those who do not see it."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(
        out, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = out.getvalue()
    size = "wide" if figure.get_figwidth() > HALF[0] else "half"
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->",
        "",
        text[text.index("<svg") :],
        flags=re.DOTALL,
    )
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(
        r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg class="{size}" viewBox="\1">', text
    )
    prefix = re.sub(r"\W", "", name)
    text = re.sub(r'(\bid="|href="#|url\(#)', lambda m: f"{m[1]}{prefix}-", text)
    for paint, stand_in in COLOURS.items():
        text = text.replace(stand_in, f"var(--{paint})")
    text = text.replace("'DejaVu Sans'", "var(--font)")
    label = Markup('role="img" aria-label="{}"').format(alternative)
    return Markup(text.replace("<svg ", f"<svg {label} ", 1))


def house_style(draw: Any) -> Any:
    """Decorator: draw in the house's style."""
    import functools

    @functools.wraps(draw)
    def inside(*args: Any, **options: Any) -> Markup:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return inside


def set_percent_axis(axis: Any) -> None:
    """Label an axis of shares in percent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))


def add_legend(axes: Any, entries: int, columns: int | None = None) -> None:
    """Above the axes, where there is more than one thing to tell apart."""
    columns = columns or (2 if entries == 4 else min(entries, 3))
    if entries > 1:
        axes.figure.legend(
            loc="outside upper left", ncols=columns, handlelength=1.2, columnspacing=1.4
        )


@house_style
def draw_loss(losses: np.ndarray, size: tuple[float, float] = HALF) -> Markup:
    """The loss of every step, in blocks of equal length, and its running mean."""
    figure, axes = new_figure(size)
    steps = np.arange(1, len(losses) + 1)
    step, value = block_means(steps, losses)
    axes.plot(step, value, color=COLOURS["clean"], alpha=0.35, linewidth=1)
    window = max(1, len(value) // 20)
    if window > 1:
        smooth = np.convolve(value, np.full(window, 1 / window), mode="valid")
        axes.plot(step[window // 2 :][: len(smooth)], smooth, color=COLOURS["clean"])
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.margins(x=0.01)
    return svg_markup(figure, "loss", f"Training loss over {len(losses)} steps")


def block_means(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over blocks, so that at most POINTS points are drawn."""
    width = -(-len(y) // MAX_POINTS)
    if width <= 1:
        return x, y
    cuts = np.arange(0, len(y), width)
    sizes = np.diff(np.append(cuts, len(y)))
    return np.add.reduceat(x, cuts) / sizes, np.add.reduceat(y, cuts) / sizes


@house_style
def draw_curves(
    x: Sequence[float], series: Sequence[Series], label: str, name: str = "curves"
) -> Markup:
    """Rates over epochs, or the like."""
    figure, axes = new_figure(HALF)
    for s in series:
        axes.plot(
            x,
            s.values,
            color=COLOURS[s.colour],
            marker="o",
            markersize=4,
            label=s.name,
            clip_on=False,
        )
    set_percent_axis(axes.yaxis)
    axes.set_ylim(0, 1)
    if len(x) <= 12:
        axes.set_xticks(list(x))
    axes.set_xlabel(label)
    add_legend(axes, len(series))
    return svg_markup(figure, name, f"{', '.join(s.name for s in series)} by {label}")


@house_style
def draw_histogram(
    series: Sequence[Series],
    label: str,
    name: str,
    mark: tuple[float, str] | None = None,
    size: tuple[float, float] = HALF,
) -> Markup:
    """Each group's share by value, over common bins; whole numbers get a bar each."""
    figure, axes = new_figure(size)
    every = np.concatenate([np.asarray(s.values, dtype=float) for s in series])
    edges, whole = bin_edges(every)
    for i, s in enumerate(series):
        values = np.clip(np.asarray(s.values, dtype=float), edges[0], edges[-1])
        share = np.histogram(values, edges)[0] / max(1, len(values))
        if whole:
            width = 0.8 / len(series)
            at = (edges[:-1] + 0.5) + (i - (len(series) - 1) / 2) * width
            axes.bar(at, share, width * 0.94, color=COLOURS[s.colour], label=s.name)
        else:
            axes.stairs(share, edges, fill=True, color=COLOURS[s.colour], alpha=0.28)
            axes.stairs(share, edges, color=COLOURS[s.colour], linewidth=1.5, label=s.name)
    if whole:
        axes.grid(False, axis="x")
        axes.set_xticks((edges[:-1] + 0.5).round())
    if mark:
        axes.axvline(
            mark[0], color=COLOURS["ink"], linewidth=1, linestyle=(0, (4, 3)), label=mark[1]
        )
    set_percent_axis(axes.yaxis)
    axes.set_xlabel(label)
    axes.set_ylabel("share of the group")
    add_legend(axes, len(series) + bool(mark))
    return svg_markup(figure, name, f"Histogram of {label}: {', '.join(s.name for s in series)}")


def bin_edges(values: np.ndarray, most: int = 40) -> tuple[np.ndarray, bool]:
    """Edges over all values (the outermost thousandths are drawn into the last bars); whether they are whole numbers."""
    if not len(values):
        return np.array([0.0, 1.0]), False
    low, high = values.min(), values.max()
    if high - low <= 15 and np.all(values == np.round(values)):
        return np.arange(low - 0.5, high + 1), True
    inner = np.quantile(values, [0.001, 0.999]) if len(values) > 2000 else (low, high)
    low, high = (inner[0], inner[1]) if inner[1] > inner[0] else (low - 0.5, high + 0.5)
    return np.linspace(low, high, most + 1), False


@house_style
def draw_ranking(truth: Sequence[tuple[Series, int]], removed: float | None) -> Markup:
    """Share of the poisons found against the share of records reviewed. Each series: is the record poisoned, worst first."""
    figure, axes = new_figure(HALF)
    n = max(len(s.values) for s, _ in truth)
    start = 1 / n
    for s, width in truth:
        found = np.cumsum(np.asarray(s.values, dtype=float))
        rows = np.unique(np.geomspace(1, len(found), 300).astype(int))
        axes.plot(
            rows / len(found),
            found[rows - 1] / found[-1],
            color=COLOURS[s.colour],
            label=s.name,
            linewidth=width,
            clip_on=False,
        )
    x = np.geomspace(start, 1, 100)
    axes.plot(x, x, color=COLOURS["muted"], linewidth=1, linestyle=(0, (1, 2)), label="by chance")
    if removed:
        axes.axvline(
            removed, color=COLOURS["ink"], linewidth=1, linestyle=(0, (4, 3)), label="removed"
        )
    axes.set_xscale("log")
    axes.set_xlim(start, 1)
    axes.set_ylim(0, 1.01)
    axes.minorticks_off()
    set_percent_axis(axes.yaxis)
    axes.xaxis.set_major_formatter(lambda v, _: f"{100 * v:g} %")
    axes.set_xlabel("share of the records reviewed, most suspicious first (log scale)")
    axes.set_ylabel("poisons found")
    add_legend(axes, len(truth) + 1 + bool(removed))
    return svg_markup(figure, "ranking", "Poisons found against records reviewed")


@house_style
def draw_intervals(rows: Sequence[tuple[str, Measure, str]], name: str = "intervals") -> Markup:
    """Rates as dots with their 95 % intervals, one above another. Each row: label, measure, paint."""
    figure, axes = new_figure((WIDE[0], 0.55 + 0.29 * len(rows)))
    for y, (_, m, paint) in enumerate(rows):
        axes.plot(
            [m.low, m.high],
            [y, y],
            color=COLOURS[paint],
            linewidth=6,
            alpha=0.3,
            solid_capstyle="round",
        )
        axes.plot([m.value], [y], "o", color=COLOURS[paint], markersize=6, clip_on=False)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"], length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    set_percent_axis(axes.xaxis)
    return svg_markup(figure, name, "; ".join(f"{label}: {m.value:.3f}" for label, m, _ in rows))


@house_style
def draw_strips(
    rows: Sequence[tuple[str, Sequence[float], str]],
    marks: Sequence[tuple[float, str, str]],
    label: str,
    name: str = "strips",
) -> Markup:
    """Every value a dot, groups one above another. Each row: label, values, paint. marks: value, label, paint of a line."""
    figure, axes = new_figure((WIDE[0], 0.95 + 0.42 * len(rows)))
    for y, (_, values, paint) in enumerate(rows):
        lift = [
            0.16 * ((i % 3) - 1) for i in range(len(values))
        ]  # so that near ones are told apart
        at = [y + up for up in lift]
        axes.plot(
            sorted(values),
            at,
            "o",
            color=COLOURS[paint],
            alpha=0.65,
            markersize=6,
            markeredgewidth=0,
        )
    for value, told, paint in marks:
        dashes = "solid" if paint == "ink" else (0, (4, 3))
        axes.axvline(value, color=COLOURS[paint], linewidth=1.6, linestyle=dashes, label=told)
    axes.set_yticks(range(len(rows)), [told for told, _, _ in rows])
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"], length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(label)
    axes.margins(x=0.04)
    if marks:
        figure.legend(
            loc="outside upper left", ncols=len(marks), handlelength=1.6, columnspacing=1.4
        )
    return svg_markup(figure, name, f"{label} by group: {', '.join(told for told, _, _ in rows)}")


@house_style
def draw_bars(
    groups: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[Measure | None]]],
    name: str = "bars",
) -> Markup:
    """Rates with 95 % intervals, grouped. Each series: name, paint, a measure a group."""
    figure, axes = new_figure((WIDE[0], 3.2))
    width = 0.8 / len(series)
    for i, (label, paint, found) in enumerate(series):
        shown = [
            (g + (i - (len(series) - 1) / 2) * width, m)
            for g, m in enumerate(found)
            if m is not None
        ]
        if not shown:
            continue
        x, y = [at for at, _ in shown], [m.value for _, m in shown]
        error = [[m.value - m.low for _, m in shown], [m.high - m.value for _, m in shown]]
        axes.bar(x, y, width * 0.9, color=COLOURS[paint], label=label)
        axes.errorbar(
            x,
            y,
            np.clip(error, 0, 1),
            fmt="none",
            ecolor=COLOURS["ink"],
            elinewidth=1.1,
            capsize=2.5,
        )
        for at, m in shown:
            axes.annotate(
                f"{100 * m.value:.0f}",
                (at, m.high),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axes.set_xticks(range(len(groups)), list(groups))
    axes.tick_params(axis="x", labelcolor=COLOURS["ink"], length=0)
    axes.grid(False, axis="x")
    axes.set_ylim(0, 1.06)
    axes.set_yticks(np.linspace(0, 1, 6))
    set_percent_axis(axes.yaxis)
    add_legend(axes, len(series))
    return svg_markup(figure, name, f"{', '.join(s[0] for s in series)}: {', '.join(groups)}")


def series_colours(names: Sequence[str]) -> list[str]:
    """A paint for each of several series, the same for the same place."""
    return [paint for _, paint in zip(names, itertools.cycle(SERIES_COLOURS), strict=False)]
