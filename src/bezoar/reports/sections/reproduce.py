"""The page of a reproduction: claims with verdicts, then tables with charts and runs."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from bezoar import registry
from bezoar.evaluation.dose_response import fit_dose_response
from bezoar.evaluation.scores import Measure
from bezoar.reports import charts, dose_charts, heat_maps
from bezoar.reports.charts import IntervalRow
from bezoar.reports.metric_names import PLAIN, RATE, format_interval, format_value, quantity
from bezoar.reports.page_parts import Figure, Line, Links, Part, Section, Step, Table, Text
from bezoar.reports.run_page import Page, RunView
from bezoar.reports.shell_commands import shell_command
from bezoar.runs.run import Run

VERDICTS = ("confirmed", "contradicted", "undecided")
LOOKS = dict(zip(VERDICTS, ("good", "bad", "warn"), strict=True))
MAX_LEVELS = 8  # groups whose names fit below an axis
UNBOUNDED = 1e6  # effects at least this large are not bounded by the readings
WARNING = "The encoders behind these figures were poisoned on purpose."

# Objects of tables.json: a table has rows, a row has cells, a cell has a measure over readings.
TableJson = Mapping[str, Any]
RowJson = Mapping[str, Any]
CellJson = Mapping[str, Any]


class ReproduceView(RunView):
    """A reproduce run, or a dose run, which is one table without claims."""

    @functools.cached_property
    def tables(self) -> list[TableJson]:
        """The tables."""
        tables: list[TableJson] = self.read_json("tables.json")
        return tables


def build_page(run: Run) -> Page:
    """Return the page of a reproduction."""
    view = ReproduceView(run)
    if view.manifest["status"] != "done":
        text = "This reproduction was not finished; the same command goes on with it."
        return Page(text, warning=WARNING, poisoned=bool(view.goals))
    trainings = quantity(int(view.notes.get("trainings", 0)), "training")
    title = headline(view)
    is_smoke = view.notes.get("scale") == "smoke" and "mean nothing" not in title
    meaning = ", whose numbers mean nothing" if is_smoke else ""
    return Page(
        title,
        f"Scale {view.notes.get('scale')}{meaning}; {quantity(len(view.tables), 'table')} from "
        f"{trainings}.",
        WARNING,
        sections={"Claims": partial(claims_section, view), **table_sections(view)},
        poisoned=bool(view.goals),
        lines=[line for table in view.tables for line in map(claim_line, table["claims"])],
        steps=next_steps(view),
    )


def next_steps(view: ReproduceView) -> list[Step]:
    """List the next steps after a reproduction."""
    scale = view.notes.get("scale")
    if view.run.verb != "reproduce":
        return []
    if scale == "smoke":
        text = "This scale only shows that the table runs. For numbers, take the next one, `small`."
        return [Step(text, shell_command(view.run, seeded=False, scale="small"))]
    steps = []
    undecided = [c for table in view.tables for c in table["claims"] if c["verdict"] == "undecided"]
    if undecided:
        text = (
            f"{quantity(len(undecided), 'claim')} could not be decided by so few readings; "
            "`detectable` below says what could have been. Another seed, or a larger scale, adds "
            "readings."
        )
        seed = view.manifest.get("ask", {}).get("seed", 0)
        other = seed + 1 if isinstance(seed, int) else 1  # the file may be a stranger's
        steps.append(Step(text, shell_command(view.run, seed=other)))
    if not view.manifest.get("typed", {}).get("add") and (kind := added_kind(view)):
        tables = view.input_text("paper")
        command = view.command(f"reproduce {tables} --scale {scale} --add {kind} ./mine.py")
        steps.append(Step("A method of your own joins with the same sets and seeds.", command))
    steps.append(
        Step("`tables.csv`, `tables.tex` and `charts/` hold the same for a paper of yours.")
    )
    return steps


def added_kind(view: ReproduceView) -> str:
    """A kind of method that the user can add to all of the tables; "" if there is none."""
    names = [str(table.get("name")) for table in view.tables]
    if not set(names) <= set(registry.method_names("paper")):  # a table of the user's own
        return ""
    kinds = [getattr(registry.find_method("paper", name), "takes", ()) for name in names]
    return next((kind for kind in kinds[0] if all(kind in k for k in kinds)), "") if kinds else ""


def claim_line(claim: Mapping[str, Any]) -> str:
    """Return a claim as a line: its verdict, its text and the effect."""
    _, _, verdict, effect, expected, _, n = claim_cells(claim)
    return f"{verdict}: {claim['text']} (effect {effect}, expected {expected}, n = {n})"


def headline(view: ReproduceView) -> str:
    """Count the claims of the table or paper by verdict; without claims, describe the numbers."""
    verdicts = [claim["verdict"] for table in view.tables for claim in table["claims"]]
    if not verdicts and view.notes.get("scale") == "smoke":
        return (
            f"{quantity(len(view.tables), 'table')} of scale smoke ran; the numbers mean nothing."
        )
    if not verdicts:
        return " ".join(map(table_finding, view.tables))
    present = [v for v in VERDICTS if v in verdicts]
    counts = [f"{verdicts.count(v)} {v}" for v in present]
    counts[0] = f"{verdicts.count(present[0])} of {quantity(len(verdicts), 'claim')} {present[0]}"
    tables = {table["name"] for table in view.tables}
    papers = {name.partition("/")[0] for name in tables}
    names = tables if len(tables) == 1 else papers if len(papers) == 1 else set()
    return "".join(f"{name}: " for name in names) + f"{', '.join(counts)}."


def table_finding(table: TableJson) -> str:
    """State the range of a table's first column, or the best row of each curve of a grid."""
    title = table["title"].partition(": ")[2] or table["title"]
    column = table.get("grid") or next(iter(column_names(table)), "")
    named = [(row, c) for row in table["rows"] for c in row["cells"] if c["name"] == column]
    if not named:
        return f"{title}: nothing was measured."
    ranked = sorted(named, key=lambda pair: pair[1]["measure"]["value"])
    if table.get("grid"):
        return f"{title}: {describe_best_rows(column, named)}."
    (low_row, low), (high_row, high) = ranked[0], ranked[-1]
    low_text = f"{format_value_of(low)} ({low_row['name']})"
    if len(ranked) == 1:
        return f"{title}: {column} {low_text}."
    return f"{title}: {column} from {low_text} to {format_value_of(high)} ({high_row['name']})."


def describe_best_rows(column: str, named: Sequence[tuple[RowJson, CellJson]]) -> str:
    """Name the best row of each curve: the lowest success of an attack, the highest of all else."""
    best: dict[str, tuple[RowJson, CellJson]] = {}
    sign = -1 if column.startswith("ASR") else 1
    for row, cell in named:
        curve = row["curve"]
        value, before = cell["measure"]["value"], best.get(curve)
        if before is None or sign * value >= sign * before[1]["measure"]["value"]:
            best[curve] = (row, cell)
    attacks = {curve: f" for {curve}" if curve else "" for curve in best}
    values = {curve: format_value_of(cell) for curve, (_, cell) in best.items()}
    if len({row["name"] for row, _ in named}) == 1:  # there is nothing to choose from
        return f"{column} {', '.join(f'{values[c]}{attacks[c]}' for c in best)}"
    phrases = [f"{row['name']}{attacks[c]} ({values[c]})" for c, (row, _) in best.items()]
    return f"{'lowest' if sign < 0 else 'highest'} {column} by {'; '.join(phrases)}"


def format_value_of(cell: CellJson) -> str:
    """The value of a cell, without its interval."""
    return format_value(Measure(**cell["measure"]).value, RATE if cell["rate"] else PLAIN)


def claims_section(view: ReproduceView) -> Section | None:
    """List the claims with verdict, effect, and the least effect that could be detected."""
    several = len(view.tables) > 1
    rows = []
    for table in view.tables:
        title = table["title"].partition(": ")[2] or table["title"]
        for claim in table["claims"]:
            text, source, verdict, *numbers_of = claim_cells(claim)
            cells: list[str | Line] = [text, source, Line(verdict, LOOKS[verdict]), *numbers_of]
            rows.append([title, *cells] if several else cells)
    if not rows:
        return None
    head = (
        "claim",
        "known from",
        "verdict",
        "effect (95 % interval)",
        "expected",
        "detectable",
        "n",
    )
    numbers = range(2 + several, len(head) + several)
    note = (
        "Effects are differences of rates (1 = all) or of z-scores over readings. Detectable: the "
        "least effect that this many readings would find 4 times in 5. Recalled claims are "
        "directions that were tested, not printed numbers."
    )
    return Section([Table(("table", *head) if several else head, rows, numbers, note)])


def claim_cells(claim: Mapping[str, Any]) -> list[str]:
    """Return the cells of a claim as texts."""
    value, low, high, least = (float(claim[k]) for k in ("value", "low", "high", "detectable"))
    expected = {"+": "> 0", "-": "< 0", "same": f"within ±{claim['margin']:g}"}
    return [
        claim["text"],
        claim["source"],
        claim["verdict"],
        f"{format_effect(value)} ({format_effect(low)} .. {format_effect(high)})",
        expected[claim["expected"]],
        format_value(least) if least < UNBOUNDED else "unbounded",
        str(claim["n"]),
    ]


def format_effect(value: float) -> str:
    """Return a difference with its sign."""
    if abs(value) < UNBOUNDED:
        return f"{value:+.3f}"
    return "−∞" if value < 0 else "∞"


def table_sections(view: ReproduceView) -> dict[str, Callable[[], Section]]:
    """Return a section for each table, by its title."""
    sections: dict[str, Callable[[], Section]] = {}
    for table in view.tables:
        title = table["title"]
        while title in sections:
            title += " (again)"
        sections[title] = partial(table_section, table)
    return sections


def table_section(table: TableJson) -> Section:
    """Show a table with its charts, fitted dose-responses and notes."""
    figures = (
        [grid_figure(table)]  # one heat map of rows by curves
        if table.get("grid")
        else [column_figure(table, column) for column in column_names(table)]
    )
    parts: list[Part] = [*sorted(figures, key=lambda figure: figure.is_wide)]
    for fit in table["laws"]:
        curve = f", {fit['curve']}" if fit["curve"] else ""
        parts.append(Text(f"{fit['cell']}{curve}: {fit['text']}."))
    parts += [cell_table(table), *(Text(note) for note in table["notes"])]
    return Section(parts, table["paper"])


def column_names(table: TableJson) -> list[str]:
    """Return the names of a table's cells in order."""
    return list(dict.fromkeys(cell["name"] for row in table["rows"] for cell in row["cells"]))


def column_figure(table: TableJson, column: str) -> Figure:
    """Draw a column, over the axis of the table if that is a quantity, else side by side."""
    curves: dict[str, list[tuple[RowJson, CellJson]]] = {}
    for row in table["rows"]:
        for cell in row["cells"]:
            if cell["name"] == column:
                curves.setdefault(row["curve"], []).append((row, cell))
    measures = {
        curve: [Measure(**cell["measure"]) for _, cell in points]
        for curve, points in curves.items()
    }
    colours = dict(zip(curves, itertools.cycle(charts.SERIES_COLOURS), strict=False))
    is_share = all(cell["rate"] for points in curves.values() for _, cell in points)
    if all(row["x"] is not None for points in curves.values() for row, _ in points):
        fits = {
            fit["curve"]: fit_dose_response(*fit["units"])
            for fit in table["laws"]
            if fit["cell"] == column
        }
        lines = [
            dose_charts.Curve(
                curve or column,
                [row["x"] for row, _ in points],
                measures[curve],
                colours[curve],
                fits.get(curve),
            )
            for curve, points in curves.items()
        ]
        svg = dose_charts.draw_dose_response(lines, table["axis"], column, is_share, table["unit"])
        return Figure(svg, column)
    groups = [row["name"] for row, _ in next(iter(curves.values()))]
    if is_share and len(curves) == 1 and len(groups) > MAX_LEVELS:
        (points,) = measures.values()
        rows = [IntervalRow(g, m) for g, m in zip(groups, points, strict=True)]
        return Figure(charts.draw_intervals(rows), column)
    series = [(curve or column, colours[curve], points) for curve, points in measures.items()]
    return Figure(dose_charts.draw_levels(groups, series, column, is_share), column)


def grid_figure(table: TableJson) -> Figure:
    """Draw one column of a table as a heat map of its rows by its curves."""
    rows = list(dict.fromkeys(row["name"] for row in table["rows"]))
    curves = list(dict.fromkeys(row["curve"] for row in table["rows"]))
    values = np.full((len(rows), len(curves)), np.nan)
    for row in table["rows"]:
        for cell in row["cells"]:
            if cell["name"] == table["grid"]:
                place = rows.index(row["name"]), curves.index(row["curve"])
                values[place] = cell["measure"]["value"]
    size = (2.2 + 0.95 * len(curves), 0.8 + 0.3 * len(rows))
    svg = heat_maps.draw_heat_map(rows, curves, values, (table["axis"], "attack"), size=size)
    return Figure(svg, f"{table['grid']}, percent", heat_maps.LEGEND)


def cell_table(table: TableJson) -> Table:
    """Return the table, with the runs of each row."""
    columns = column_names(table)
    has_curves = any(row["curve"] for row in table["rows"])
    head = [table["axis"] or "row", *columns, "runs"]
    if has_curves:
        head.insert(0, "attack" if table.get("grid") else "curve")
    rows: list[Sequence[str | Links]] = []
    for row in table["rows"]:
        cells = {cell["name"]: format_cell(cell) for cell in row["cells"]}
        runs = dict.fromkeys(run for cell in row["cells"] for run in cell["runs"])
        names = [row["curve"], row["name"]] if has_curves else [row["name"]]
        rows.append([*names, *(cells.get(c, "") for c in columns), Links(list(runs))])
    note = (
        "Mean over readings with its 95 % interval; in brackets, the number of readings. A reading "
        "is one trigger or group of victims in one training."
    )
    return Table(head, rows, range(1 + has_curves, len(head) - 1), note)


def format_cell(cell: CellJson) -> str:
    """Return a number with its interval, the number of readings, and the published number."""
    measure, unit = Measure(**cell["measure"]), RATE if cell["rate"] else PLAIN
    text = format_value(measure.value, unit)
    if measure.low < measure.high:
        text += f" ({format_interval(measure, unit)})"
    text += f" [{len(cell['values'])}]"
    if cell["printed"] is not None:
        text += f", paper {format_value(cell['printed'], unit)}"
    return text
