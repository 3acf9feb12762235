"""The page of a reproduction: claims and their verdicts, then every table with its chart, laws and runs."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from bezoar.evaluation import dose_response
from bezoar.evaluation.scores import Measure
from bezoar.reports import charts, dose_charts, heat_maps, metric_names
from bezoar.reports.page_parts import Figure, Figures, Links, Part, Section, Table, Text
from bezoar.reports.run_page import Chapter, Story

VERDICTS = ("confirmed", "contradicted", "undecided")
MANY = 8  # rows that still fit side by side


class Reproduce(Story):
    """Tables of a paper, as `tables.json` holds them."""

    @functools.cached_property
    def tables(self) -> list[dict[str, Any]]:
        """Everything that was asked, found, fitted and judged."""
        return self.json("tables.json")

    @property
    def claims(self) -> list[dict[str, Any]]:
        """The claims of all tables."""
        return [claim for table in self.tables for claim in table["claims"]]

    def headline(self) -> str:
        """How the claims fared."""
        if self.manifest["status"] != "done":
            return "This reproduction was not finished; the same command goes on with it."
        if not self.claims:
            return f"{', '.join(table['title'] for table in self.tables)}."
        told = [f"{n} {v}" for v in VERDICTS if (n := sum(c["verdict"] == v for c in self.claims))]
        return f"Of {metric_names.quantity(len(self.claims), 'claim')}: {', '.join(told)}."

    def more(self) -> str:
        """The scale, and on how much it stands."""
        trainings = metric_names.quantity(int(self.notes.get("trainings", 0)), "training")
        return f"Scale {self.notes.get('scale')}; {metric_names.quantity(len(self.tables), 'table')} from {trainings}."

    def warning(self) -> str:
        """What these encoders are."""
        return "The encoders behind these figures were poisoned on purpose."

    def cards(self) -> list[str]:
        """None: the claims are the summary."""
        return []

    def chapters(self) -> list[Chapter]:
        """The claims, then a chapter a table."""
        return [self.all_claims, *(chapter(table, i) for i, table in enumerate(self.tables))]

    def all_claims(self) -> Section | None:
        """Every claim with its verdict, the effect, its interval and what could have been detected."""
        if not self.claims:
            return None
        rows, several = [], len(self.tables) > 1
        for table, c in ((t, c) for t in self.tables for c in t["claims"]):
            unit, title = metric_names.PLAIN, table["title"]
            value, low, high, least = (float(c[k]) for k in ("value", "low", "high", "detectable"))
            effect = f"{signed(value)} ({signed(low)} .. {signed(high)})"
            expected = {"+": "> 0", "-": "< 0", "same": f"within ±{c['margin']:g}"}[c["expected"]]
            detectable = metric_names.format_value(least, unit) if least < 1e6 else "unbounded"
            line = (c["text"], c["source"], c["verdict"], effect, expected, detectable, str(c["n"]))
            rows.append((title.partition(": ")[2] or title, *line) if several else line)
        head = (
            "claim",
            "known from",
            "verdict",
            "effect (95 % interval)",
            "expected",
            "detectable",
            "n",
        )
        numbers = tuple(range(2 + several, len(head) + several))
        note = (
            "Effects are differences of rates (1 = all) or of z-scores, over readings; detectable: the least effect that this "
            "many readings find 4 times in 5. Recalled claims are directions that were tested, not printed numbers."
        )
        return Section(
            "Claims", [Table(("table", *head) if several else head, rows, numbers, note)]
        )


def chapter(table: dict[str, Any], place: int) -> Chapter:
    """A table as a chapter: chart, laws, cells beside what was printed, notes."""

    def tell() -> Section:
        drawn = figures(table, place)
        parts: list[Part] = (
            [Figures(narrow)]
            if (narrow := [f for f in drawn if 'class="wide"' not in f.svg])
            else []
        )
        parts += [f for f in drawn if f not in narrow]
        parts += [
            Text(f"{law['cell']}{', ' + law['curve'] if law['curve'] else ''}: {law['text']}.")
            for law in table["laws"]
        ]
        parts += [cells(table), *(Text(note) for note in table["notes"])]
        return Section(table["title"], parts, table["paper"])

    tell.__name__ = table["title"]
    return tell


def columns(table: dict[str, Any]) -> list[str]:
    """Names of a table's cells, in order."""
    return list(dict.fromkeys(c["name"] for row in table["rows"] for c in row["cells"]))


def figures(table: dict[str, Any], place: int) -> list[Figure]:
    """A chart a column: over the axis where it is a quantity, else side by side; or one map of rows by curves."""
    if table.get("grid"):
        return [grid(table, f"table{place}")]
    out = []
    for i, column in enumerate(columns(table)):
        lines: dict[str, list[tuple[dict, dict]]] = {}
        for row in table["rows"]:
            for c in row["cells"]:
                if c["name"] == column:
                    lines.setdefault(row["curve"], []).append((row, c))
        fitted = {
            law["curve"]: dose_response.fit_dose_response(*law["units"])
            for law in table["laws"]
            if law["cell"] == column
        }
        share = all(c["rate"] for of in lines.values() for _, c in of)
        name, paints = f"table{place}-{i}", charts.series_colours(list(lines))
        if all(row["x"] is not None for of in lines.values() for row, _ in of):
            drawn = [
                dose_charts.Curve(
                    curve or column, [r["x"] for r, _ in of], points(of), paint, fitted.get(curve)
                )
                for (curve, of), paint in zip(lines.items(), paints, strict=True)
            ]
            svg = dose_charts.draw_dose_response(
                drawn, table["axis"], name, column, share, table["unit"]
            )
        else:
            groups = [row["name"] for row, _ in next(iter(lines.values()))]
            if (
                share and len(lines) == 1 and len(groups) > MANY
            ):  # their names would not fit below an axis
                rows = [
                    (g, m, paints[0])
                    for g, m in zip(groups, points(next(iter(lines.values()))), strict=True)
                ]
                out.append(Figure(charts.draw_intervals(rows, name), column))
                continue
            bars = [
                (curve or column, paint, points(of))
                for (curve, of), paint in zip(lines.items(), paints, strict=True)
            ]
            svg = dose_charts.draw_levels(groups, bars, name, column, share)
        out.append(Figure(svg, column))
    return out


def grid(table: dict[str, Any], name: str) -> Figure:
    """One column of a table as a map: its rows by its curves."""
    names, lines = (
        list(dict.fromkeys(row[key] for row in table["rows"])) for key in ("name", "curve")
    )
    values = np.full((len(names), len(lines)), np.nan)
    for row in table["rows"]:
        for c in row["cells"]:
            if c["name"] == table["grid"]:
                values[names.index(row["name"]), lines.index(row["curve"])] = c["measure"]["value"]
    size = (2.2 + 0.95 * len(lines), 0.8 + 0.3 * len(names))
    return Figure(
        heat_maps.draw_heat_map(names, lines, values, name, (table["axis"], "attack"), size=size),
        f"{table['grid']}, percent",
    )


def points(of: list[tuple[dict, dict]]) -> list[Measure]:
    """The measures of a line."""
    return [Measure(**c["measure"]) for _, c in of]


def cells(table: dict[str, Any]) -> Table:
    """The table itself: ours with its interval, the printed number where there is one, the runs."""
    names = columns(table)
    several = any(row["curve"] for row in table["rows"])  # a column more of names
    head = [
        *(["attack" if table.get("grid") else "curve"] if several else []),
        table["axis"] or "row",
        *names,
    ]
    rows = []
    for row in table["rows"]:
        found = {c["name"]: c for c in row["cells"]}
        line: list[str | Links] = [*([row["curve"]] if several else []), row["name"]]
        line += [shown(found[name]) if name in found else "" for name in names]
        runs = dict.fromkeys(r for c in row["cells"] for r in c["runs"])
        rows.append([*line, Links(list(runs))])
    numbers = tuple(range(1 + several, len(head)))
    return Table(
        [*head, "runs"],
        rows,
        numbers,
        "Mean over readings, 95 % interval; in brackets, how many. A reading: one trigger or group of victims in one training.",
    )


def shown(cell: dict[str, Any]) -> str:
    """A number, its interval, how many readings it is the mean of, and what the paper printed."""
    m, unit = Measure(**cell["measure"]), metric_names.RATE if cell["rate"] else metric_names.PLAIN
    about = f" ({metric_names.format_interval(m, unit)})" if m.low < m.high else ""
    told = f"{metric_names.format_value(m.value, unit)}{about} [{len(cell['values'])}]"
    return (
        told
        if cell["printed"] is None
        else f"{told}, paper {metric_names.format_value(cell['printed'], unit)}"
    )


def signed(value: float) -> str:
    """A difference."""
    return f"{value:+.3f}" if abs(value) < 1e6 else ("−∞" if value < 0 else "∞")
