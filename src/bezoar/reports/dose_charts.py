"""Charts of sweeps: values by dose, with a fitted dose-response, and values by group."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from bezoar.evaluation.dose_response import DoseResponse
from bezoar.evaluation.scores import Measure
from bezoar.reports.charts import (
    COLOURS,
    HALF,
    WIDE,
    Floats,
    Size,
    Style,
    add_legend,
    house_style,
    new_figure,
    set_percent_axis,
    svg_markup,
)

# The axis of doses runs from 0 (the smallest dose above 0) to 1 (the largest); dose 0 is here.
ZERO_DOSE = -0.16
MIN_DISTANCE = 0.09  # of two labelled doses on that axis
LevelSeries = tuple[str, str, Sequence[Measure | None]]  # name, colour, a measure for each group


@dataclass(frozen=True)
class Curve:
    """One line of a dose chart."""

    name: str  # its name in the legend
    doses: Sequence[float]  # ascending doses >= 0
    points: Sequence[Measure]  # the measure at each dose
    colour: str = "clean"  # A name of COLOURS
    fit: DoseResponse | None = None  # the dose-response that was fitted to the points


@dataclass(frozen=True)
class DoseAxis:
    """A logarithmic axis of doses above 0, with a place for 0 before them."""

    least: float
    greatest: float

    def place(self, doses: ArrayLike) -> Floats:
        """Return the places of doses on the axis."""
        x = np.asarray(doses, dtype=float)
        positive = np.where(x > 0, x, self.least)
        logarithmic = np.log(positive / self.least) / math.log(self.greatest / self.least)
        return np.where(x > 0, logarithmic, ZERO_DOSE)


@house_style
def draw_dose_response(
    curves: Sequence[Curve],
    axis: str,
    label: str = "success",
    percent: bool = True,
    unit: str = "poisons",
    size: Size = HALF,
) -> Markup:
    """Draw points with their 95 % intervals over a logarithmic axis of doses, dose 0 at its left.

    A fitted dose-response is a line with a band. A diamond marks the dose with half of the possible
    success, with the interval of that dose.

    Args:
        axis: The quantity of the doses.
        label: The quantity of the values.
        percent: Whether the values are shares from 0 to 1; others are unbounded.
        unit: The unit of the doses, for the legend.
        size: Inches.
    """
    figure, axes = new_figure(size)
    doses = sorted({float(x) for c in curves for x in c.doses})
    positive = [x for x in doses if x > 0] or [1.0]
    greatest = positive[-1] if positive[-1] > positive[0] else 10 * positive[0]
    dose_axis = DoseAxis(positive[0], greatest)
    _set_value_axis(axes, [m for c in curves for m in c.points], label, percent)
    for i, curve in enumerate(curves):
        # Curves are moved a little sideways, so that intervals do not cover one another.
        _draw_curve(axes, curve, dose_axis, 0.018 * (i - (len(curves) - 1) / 2), unit)
    _label_doses(axes, doses, dose_axis)
    axes.set_xlabel(f"{axis or unit} (log scale)")
    fitted = any(c.fit for c in curves)
    add_legend(figure, len(curves) + fitted, columns=1 if fitted else None)
    descriptions = []
    for c in curves:
        fit = f", {c.fit.describe(unit)}" if c.fit else ""
        descriptions.append(_describe(c.name, c.doses, c.points, percent) + fit)
    return svg_markup(figure, f"{label} by {axis or unit}. {'; '.join(descriptions)}")


def _draw_curve(axes: Axes, curve: Curve, dose_axis: DoseAxis, offset: float, unit: str) -> None:
    """Draw the points of a curve, with its fit or with a line through the doses above 0."""
    x = dose_axis.place(curve.doses) + offset
    colour = COLOURS[curve.colour]
    if curve.fit:
        summary = curve.fit.describe(unit).partition(", slope")[0].partition(";")[0]
        _draw_points(axes, x, curve.points, colour, f"{curve.name}: {summary}")
        _draw_fit(axes, curve.fit, colour, dose_axis)
        return
    _draw_points(axes, x, curve.points, colour, curve.name)
    positive = np.asarray(curve.doses) > 0
    values = np.array([m.value for m in curve.points])
    axes.plot(x[positive], values[positive], color=colour)


def _label_doses(axes: Axes, doses: Sequence[float], dose_axis: DoseAxis) -> None:
    """Label doses that are far enough apart, and mark the gap after dose 0."""
    labelled: list[float] = []
    for x in doses:
        if not labelled or dose_axis.place(x) - dose_axis.place(labelled[-1]) >= MIN_DISTANCE:
            labelled.append(x)
    axes.set_xticks(dose_axis.place(labelled), [f"{x:,g}" for x in labelled])
    axes.set_xlim((ZERO_DOSE if doses[0] == 0 else 0) - 0.05, 1.05)
    if doses[0] == 0:
        at_axis = axes.get_xaxis_transform()
        axes.text(ZERO_DOSE / 2, 0, "//", transform=at_axis, ha="center", va="center")


@house_style
def draw_levels(
    groups: Sequence[str],
    series: Sequence[LevelSeries],
    label: str = "success",
    percent: bool = True,
    size: Size | None = None,
) -> Markup:
    """Draw points with their 95 % intervals for each group; see `draw_dose_response`."""
    crowded = len(groups) > 5 or len(groups) * len(series) > 12 or sum(map(len, groups)) > 60
    figure, axes = new_figure(size or (WIDE if crowded else HALF))
    everything = [m for _, _, measures in series for m in measures if m is not None]
    _set_value_axis(axes, everything, label, percent)
    for i, (title, colour, measures) in enumerate(series):
        offset = 0.6 * ((i + 0.5) / len(series) - 0.5)
        x = np.array([g + offset for g, m in enumerate(measures) if m is not None])
        points = [m for m in measures if m is not None]
        _draw_points(axes, x, points, COLOURS[colour], title)
    width = max(8, (120 if crowded else 56) // max(1, len(groups)))  # characters
    axes.set_xticks(range(len(groups)), [textwrap.fill(g, width, max_lines=3) for g in groups])
    axes.tick_params(axis="x", labelcolor=COLOURS["ink"], length=0)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.grid(False, axis="x")
    add_legend(figure, len(series))
    descriptions = [_describe(title, groups, measures, percent) for title, _, measures in series]
    return svg_markup(figure, f"{label}. {'; '.join(descriptions)}")


def _set_value_axis(axes: Axes, points: Sequence[Measure], label: str, percent: bool) -> None:
    """Set up the axis of values."""
    axes.set_ylabel(label)
    if percent:
        axes.set_yticks(np.linspace(0, 1, 6))
        axes.set_ylim(0, 1)
        set_percent_axis(axes.yaxis)
        return
    values = [v for m in points for v in (m.low, m.value, m.high) if math.isfinite(v)] or [0.0]
    margin = 0.06 * (max(values) - min(values)) or 1.0
    axes.set_ylim(min(values) - margin, max(values) + margin)


def _draw_points(axes: Axes, x: Floats, points: Sequence[Measure], colour: str, title: str) -> None:
    """Draw dots with error bars in front of the rest; open intervals end with the axis."""
    value = np.array([m.value for m in points], dtype=float)
    low = np.clip([m.low for m in points], *axes.get_ylim())
    high = np.clip([m.high for m in points], *axes.get_ylim())
    errors = np.clip([value - low, high - value], 0, None)  # (2, N)
    style: Style = {"fmt": "o", "markersize": 4.5, "elinewidth": 1.3, "capsize": 2.5, "zorder": 3}
    dots, caps, bars = axes.errorbar(x, value, errors, color=colour, label=title, **style)
    for artist in (dots, *caps, *bars):
        artist.set_clip_on(False)


def _draw_fit(axes: Axes, fit: DoseResponse, colour: str, dose_axis: DoseAxis) -> None:
    """Draw the line, the band and the diamond of a dose-response."""
    doses = np.geomspace(dose_axis.least, dose_axis.greatest, 300)
    value, low, high = fit.predict(doses)
    x = dose_axis.place(doses)
    axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
    axes.plot(x, value, color=colour)
    x50 = fit.x50
    if not dose_axis.least <= x50.value <= dose_axis.greatest:
        return
    half = fit.floor + (1 - fit.floor) / 2
    ends = dose_axis.place(np.clip([x50.low, x50.high], dose_axis.least, dose_axis.greatest))
    axes.plot(ends, [half, half], color=colour, linewidth=5, alpha=0.35, zorder=3.5)
    diamond: Style = {
        "marker": "D",
        "markersize": 6,
        "markeredgecolor": COLOURS["paper"],
        "zorder": 4,
    }
    axes.plot(dose_axis.place([x50.value]), [half], color=colour, **diamond)


def _describe(
    title: str, places: Sequence[object], points: Sequence[Measure | None], percent: bool
) -> str:
    """Return a series in words, for those who cannot see the chart."""
    scale, unit = (100, " %") if percent else (1, "")
    phrases = [
        f"{scale * m.value:.3g}{unit} ({scale * m.low:.3g} to {scale * m.high:.3g}) at {place}"
        for place, m in zip(places, points, strict=True)
        if m is not None
    ]
    return f"{title}: {', '.join(phrases)}"
