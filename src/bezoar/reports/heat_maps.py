"""Heat maps in the style of `charts`: a number in every cell, the deeper the colour the more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from bezoar.reports.charts import COLOURS, HALF, house_style, new_figure, svg_markup


@house_style
def draw_heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: np.ndarray,
    name: str,
    labels: tuple[str, str],
    paint: str = "clean",
    size: tuple[float, float] = HALF,
) -> Markup:
    """values: (R, C), shares 0..1 (drawn cut off there); NaN: an empty cell. labels: what the rows and the columns are."""
    from matplotlib.patches import Rectangle

    figure, axes = new_figure(size)
    for y, x in np.ndindex(values.shape):
        if not np.isfinite(values[y, x]):
            continue
        depth = float(np.clip(values[y, x], 0, 1))
        axes.add_patch(
            Rectangle(
                (x - 0.47, y - 0.46),
                0.94,
                0.92,
                facecolor=COLOURS[paint],
                alpha=0.06 + 0.72 * depth,
                linewidth=0,
            )
        )
        axes.text(
            x,
            y,
            f"{round(100 * float(values[y, x]))}",
            ha="center",
            va="center",
            color=COLOURS["ink"],
        )
    axes.set_xlim(-0.55, len(columns) - 0.45)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xticks(range(len(columns)), [c.replace(", ", "\n") for c in columns])
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(length=0, labelcolor=COLOURS["ink"])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_ylabel(labels[0])
    axes.set_xlabel(labels[1])
    told = "; ".join(
        f"{r}: "
        + ", ".join(
            f"{100 * v:.0f} % at {c}" for c, v in zip(columns, line, strict=True) if np.isfinite(v)
        )
        for r, line in zip(rows, values, strict=True)
    )
    return svg_markup(figure, name, f"{labels[0]} by {labels[1]}, percent. {told}")
