"""Heat maps: a number in every cell, with a deeper colour for a larger one."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.patches import Rectangle

from bezoar.reports.charts import COLOURS, HALF, Floats, Size, house_style, new_figure, svg_markup

LEGEND = "The deeper the colour, the larger the number; a cell without colour was not measured."
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the legend


def depth(value: float) -> float:
    """How deep the colour of a share is, the same on all maps."""
    return 0.06 + 0.72 * min(1.0, max(0.0, value))


@house_style
def draw_heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Floats,
    labels: tuple[str, str],
    size: Size = HALF,
) -> Markup:
    """Draw shares in percent as a heat map.

    Args:
        rows: Names of the R rows.
        columns: Names of the C columns.
        values: Shares (R, C). Colours stop at 0 and 1; the cell of a NaN is empty.
        labels: Titles of the rows' axis and of the columns' axis.
        size: Inches.
    """
    figure, axes = new_figure(size)
    for y, x in np.argwhere(np.isfinite(values)):
        value = float(values[y, x])
        cell = Rectangle(
            (x - 0.47, y - 0.46),
            0.94,
            0.92,
            facecolor=COLOURS["clean"],
            alpha=depth(value),
            linewidth=0,
        )
        axes.add_patch(cell)
        number = f"{round(100 * value)}"
        axes.text(x, y, number, ha="center", va="center", color=COLOURS["ink"])
    axes.set_xlim(-0.55, len(columns) - 0.45)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xticks(range(len(columns)), [c.replace(", ", "\n") for c in columns])
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(length=0, labelcolor=COLOURS["ink"])
    axes.grid(False)
    axes.set_frame_on(False)
    axes.set_ylabel(labels[0])
    axes.set_xlabel(labels[1])
    steps = [
        Rectangle((0, 0), 1, 1, facecolor=COLOURS["clean"], alpha=depth(v), linewidth=0)
        for v in STEPS
    ]
    names = [f"{100 * v:.0f} %" for v in STEPS]
    figure.legend(steps, names, loc="outside upper right", ncols=len(STEPS), handlelength=1.2)
    lines = []
    for row, line in zip(rows, values, strict=True):
        cells = [
            f"{100 * v:.0f} % at {c}" for c, v in zip(columns, line, strict=True) if np.isfinite(v)
        ]
        lines.append(f"{row}: {', '.join(cells)}")
    return svg_markup(figure, f"{labels[0]} by {labels[1]}, percent. {'; '.join(lines)}")
