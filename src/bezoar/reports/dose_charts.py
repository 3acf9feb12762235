"""Charts of sweeps: success by dose with its law, and any measure by the levels of something. In the style of `charts`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

from bezoar.evaluation.dose_response import DoseResponse
from bezoar.evaluation.scores import Measure
from bezoar.reports.charts import (
    COLOURS,
    HALF,
    WIDE,
    add_legend,
    house_style,
    new_figure,
    set_percent_axis,
    svg_markup,
)

DASHED = (0, (4, 3))
NOTHING = (
    -0.16
)  # where dose 0 stands, on an axis whose least and greatest dose above 0 stand at 0 and 1
APART = 0.09  # least distance of two labelled doses there


@dataclass(frozen=True)
class Curve:
    """One line of a dose chart. doses: >= 0, ascending, one for each point. paint: a name of PAINT. law: fitted to it."""

    name: str
    doses: Sequence[float]
    points: Sequence[Measure]
    colour: str = "clean"
    fit: DoseResponse | None = None


@dataclass(frozen=True)
class _Axis:
    """A logarithmic axis from the least to the greatest dose above 0, with a place for 0 before it."""

    first: float
    last: float

    def __call__(self, doses: ArrayLike) -> np.ndarray:
        x = np.asarray(doses, dtype=float)
        return np.where(
            x > 0,
            np.log(np.where(x > 0, x, 1) / self.first) / math.log(self.last / self.first),
            NOTHING,
        )


@house_style
def draw_dose_response(
    curves: Sequence[Curve],
    axis: str,
    name: str,
    label: str = "success",
    percent: bool = True,
    unit: str = "poisons",
    size: tuple[float, float] = HALF,
) -> Markup:
    """Points with their 95 % intervals over a logarithmic axis of doses, dose 0 at its left; laws as lines with bands.

    axis, label: what the doses and the values are; unit: of the doses, in the legend's sentence. percent: values are
    shares, 0..1; else they are unbounded. Where a law reaches 50 %, a diamond with the dose's interval stands on the line.
    """
    figure, axes = new_figure(size)
    doses = sorted({float(x) for c in curves for x in c.doses})
    above = [x for x in doses if x > 0] or [1.0]
    place = _Axis(above[0], above[-1] if above[-1] > above[0] else 10 * above[0])
    limits = _values(axes, [m for c in curves for m in c.points], label, percent)
    for i, c in enumerate(curves):
        # a little aside, so that intervals at one dose do not hide one another
        at = place(c.doses) + 0.018 * (i - (len(curves) - 1) / 2)
        title = (
            f"{c.name}: {c.fit.describe(unit).partition(', slope')[0].partition(';')[0]}"
            if c.fit
            else c.name
        )
        _points(axes, at, c.points, COLOURS[c.colour], title, limits)
        if c.fit:
            _law(axes, c.fit, COLOURS[c.colour], place)
        else:
            rising = np.asarray(c.doses) > 0
            axes.plot(
                at[rising],
                [m.value for m, r in zip(c.points, rising, strict=True) if r],
                color=COLOURS[c.colour],
            )
    axes.set_xlim((NOTHING if doses[0] == 0 else 0) - 0.05, 1.05)
    shown: list[float] = []
    for x in doses:
        if not shown or place(x) - place(shown[-1]) >= APART:
            shown.append(x)
    axes.set_xticks(place(shown), [f"{x:,g}" for x in shown])
    if doses[0] == 0:
        here = {
            "xycoords": axes.get_xaxis_transform(),
            "ha": "center",
            "va": "center",
            "color": COLOURS["muted"],
        }
        axes.annotate("//", (NOTHING / 2, 0), **here)
    axes.set_xlabel(f"{axis or unit} (log scale)")
    add_legend(
        axes,
        len(curves) + any(c.fit is not None for c in curves),
        columns=1 if any(c.fit for c in curves) else None,
    )
    told = [
        _told(c.name, c.doses, c.points, percent) + (f", {c.fit.describe(unit)}" if c.fit else "")
        for c in curves
    ]
    return svg_markup(figure, name, f"{label} by {axis or unit}. {'; '.join(told)}")


@house_style
def draw_levels(
    groups: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[Measure | None]]],
    name: str,
    label: str = "success",
    percent: bool = True,
    mark: tuple[float, str] | None = None,
) -> Markup:
    """Points with their 95 % intervals for each group. Each series: name, paint, a measure a group. mark: a line across."""
    crowded = len(groups) > 5 or len(groups) * len(series) > 12 or sum(map(len, groups)) > 60
    figure, axes = new_figure(WIDE if crowded else HALF)
    limits = _values(
        axes, [m for _, _, found in series for m in found if m is not None], label, percent
    )
    for i, (title, paint, found) in enumerate(series):
        aside = 0.6 * ((i + 0.5) / len(series) - 0.5)
        held = [g for g, m in enumerate(found) if m is not None]
        _points(
            axes,
            np.array(held) + aside,
            [m for m in found if m is not None],
            COLOURS[paint],
            title,
            limits,
        )
    if mark:
        axes.axhline(mark[0], color=COLOURS["ink"], linewidth=1, linestyle=DASHED, label=mark[1])
    room = max(8, (120 if crowded else 56) // max(1, len(groups)))
    axes.set_xticks(range(len(groups)), [textwrap.fill(g, room, max_lines=3) for g in groups])
    axes.tick_params(axis="x", labelcolor=COLOURS["ink"], length=0)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.grid(False, axis="x")
    add_legend(axes, len(series) + bool(mark))
    return svg_markup(
        figure,
        name,
        f"{label}. {'; '.join(_told(title, groups, found, percent) for title, _, found in series)}",
    )


def _values(axes: Any, points: Sequence[Measure], label: str, percent: bool) -> tuple[float, float]:
    """Set the axis of values; its ends, at which intervals without one are cut."""
    axes.set_ylabel(label)
    if percent:
        axes.set_yticks(np.linspace(0, 1, 6))
        axes.set_ylim(0, 1)
        set_percent_axis(axes.yaxis)
        return 0.0, 1.0
    ends = [v for m in points for v in (m.low, m.value, m.high) if math.isfinite(v)] or [0.0]
    room = 0.06 * (max(ends) - min(ends)) or 1.0
    axes.set_ylim(min(ends) - room, max(ends) + room)
    return min(ends) - room, max(ends) + room


def _points(
    axes: Any,
    at: np.ndarray,
    points: Sequence[Measure],
    colour: str,
    title: str,
    limits: tuple[float, float],
) -> None:
    """Dots with bars, in front of lines and bands."""
    value, low, high = (
        np.array([getattr(m, end) for m in points], dtype=float) for end in ("value", "low", "high")
    )
    bars = np.clip([value - np.clip(low, *limits), np.clip(high, *limits) - value], 0, None)
    drawn = axes.errorbar(
        at,
        value,
        bars,
        fmt="o",
        color=colour,
        markersize=4.5,
        elinewidth=1.3,
        capsize=2.5,
        label=title,
        zorder=3,
    )
    for part in (drawn[0], *drawn[1], *drawn[2]):
        part.set_clip_on(False)


def _law(axes: Any, law: DoseResponse, colour: str, place: _Axis) -> None:
    """The line, its band, and the diamond where half of what poison can add is reached."""
    x = np.geomspace(place.first, place.last, 300)
    value, low, high = law.predict(x)
    axes.fill_between(place(x), low, high, color=colour, alpha=0.14, linewidth=0)
    axes.plot(place(x), value, color=colour)
    found, half = law.x50, law.floor + (1 - law.floor) / 2
    if place.first <= found.value <= place.last:
        ends = place(np.clip([found.low, found.high], place.first, place.last))
        axes.plot(
            ends,
            [half, half],
            color=colour,
            linewidth=5,
            alpha=0.35,
            solid_capstyle="round",
            zorder=3.5,
        )
        axes.plot(
            place([found.value]),
            [half],
            "D",
            color=colour,
            markersize=6,
            markeredgecolor=COLOURS["paper"],
            zorder=4,
        )


def _told(
    title: str, places: Sequence[object], points: Sequence[Measure | None], percent: bool
) -> str:
    """A series for those who do not see it."""
    scale, unit = (100, " %") if percent else (1, "")
    return f"{title}: " + ", ".join(
        f"{scale * m.value:.3g}{unit} ({scale * m.low:.3g} to {scale * m.high:.3g}) at {at}"
        for at, m in zip(places, points, strict=True)
        if m is not None
    )
