"""Table: what a paper's table or figure asks, declared: rows of cells read from runs, beside what was printed, and claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bezoar.errors import UserError
from bezoar.evaluation import dose_response, stats
from bezoar.evaluation.dose_response import Contrast, DoseResponse
from bezoar.evaluation.scores import Measure, proportion
from bezoar.runs.run import Run
from bezoar.runs.sweep import Trial


@dataclass(frozen=True)
class TableOptions:
    """What a paper's tables are asked at: a scale, and the user's own data in its place; specs, and a folder of sets."""

    scale: str
    data: str = ""
    test: str = ""
    root: str = ""


SURE, OFTEN = (
    1.96,
    0.84,
)  # normal quantiles of a 95 % interval, and of an effect that is found 4 times in 5
Reading = tuple[Trial, str]  # a trial, and the name of a metric of its run
Comparison = Callable[[Sequence[float], Sequence[float]], Measure]


@dataclass(frozen=True)
class Cell:
    """One number: a metric read from several trials, and what the paper printed for it.

    compare: makes one number of the readings' values and those of `against`, in place of their mean.
    """

    name: str
    readings: tuple[Reading, ...]
    published_value: float | None = None
    against: tuple[Reading, ...] = ()
    compare: Comparison | None = None


@dataclass(frozen=True)
class Row:
    """Cells at one point. x: its place on the axis, where the axis is a quantity. curve: which line it belongs to."""

    name: str
    cells: tuple[Cell, ...]
    x: float | None = None
    curve: str = ""


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper and the comparison that tests it.

    source: where the sentence is known from (`abstract`, `printed in ...`, `recalled`: a direction, never a target).
    expected: '+' the contrast is positive, '-' negative, 'same' within +-margin.
    """

    text: str
    source: str
    expected: str
    contrast: Callable[[Results], Contrast]
    margin: float = 0.0


@dataclass(frozen=True)
class Table:
    """paper: what the paper shows. laws: cells whose success is fitted against log dose, for every curve. grid: a cell that is
    drawn as a map of rows by curves, in place of a chart a cell.
    """

    title: str
    paper_finding: str
    axis: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    dose_response_cells: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unit: str = "poisons"  # of the axis, in a law's sentence
    grid: str = ""

    @property
    def trials(self) -> list[Trial]:
        """Every trial that a cell reads, once."""
        cells = [cell for row in self.rows for cell in row.cells]
        return list(dict.fromkeys(t for cell in cells for t, _ in (*cell.readings, *cell.against)))

    @property
    def curves(self) -> list[str]:
        """Names of the lines, in order."""
        return list(dict.fromkeys(row.curve for row in self.rows))

    @property
    def cells(self) -> list[str]:
        """Names of the columns, in order."""
        return list(dict.fromkeys(cell.name for row in self.rows for cell in row.cells))


@dataclass(frozen=True)
class Results:
    """A table with the runs that answer it."""

    table: Table
    runs: dict[Trial, Run]

    def cell(self, row: str, cell: str, curve: str | None = None) -> Cell:
        """A cell by the names of its row and column. Raises UserError when there is none."""
        for r in self.table.rows:
            if r.name == row and (curve is None or r.curve == curve):
                for c in r.cells:
                    if c.name == cell:
                        return c
        raise UserError(f"table {self.table.title!r} has no cell {cell!r} in row {row!r}")

    def measures(self, cell: Cell) -> list[Measure]:
        """What each reading of a cell found."""
        return [self.runs[t].metric(name) for t, name in cell.readings]

    def point(self, cell: Cell) -> Measure:
        """All readings of a cell as one number with its interval."""
        measures = self.measures(cell)
        if cell.compare is not None:
            others = [self.runs[t].metric(name).value for t, name in cell.against]
            return cell.compare([m.value for m in measures], others)
        return dose_response.pool_readings(measures, measures[0].how, is_rate(cell))

    def values(self, row: str, cell: str, curve: str | None = None) -> list[float]:
        """What each reading of a named cell found, as numbers."""
        return [m.value for m in self.measures(self.cell(row, cell, curve))]

    def compare_rows(
        self, cell: str, to: str, since: str, curve: str | None = None, paired: bool = False
    ) -> Contrast:
        """A column in one row less the same in another, over readings."""
        high, low = self.cell(to, cell, curve), self.cell(since, cell, curve)
        return self.compare_cells(high, low, paired)

    def compare_cells(
        self, a: Cell | Sequence[Cell], b: Cell | Sequence[Cell], paired: bool = False
    ) -> Contrast:
        """One cell, or all of several, less another, over readings; shares are never surer than their trials allow."""
        left, right = ([c] if isinstance(c, Cell) else list(c) for c in (a, b))
        first, second = ([m for c in cells for m in self.measures(c)] for cells in (left, right))
        trials = min(m.n for m in (*first, *second)) if is_rate(left[0]) else None
        return dose_response.difference(
            [m.value for m in first], [m.value for m in second], paired, trials
        )

    def compare_with_bound(self, cell: Cell, bound: float) -> Contrast:
        """A cell less a number, by the cell's own interval."""
        m = self.point(cell)
        error = (m.high - m.low) / (2 * SURE)
        return Contrast(
            m.value - bound,
            m.low - bound,
            m.high - bound,
            len(cell.readings),
            (SURE + OFTEN) * error,
            m.how,
        )

    def trend(self, cell: str, curve: str = "") -> Contrast:
        """Change of a column per doubling of x along a curve, over readings."""
        of = [
            (r.x, self.cell(r.name, cell, curve))
            for r in self.table.rows
            if r.curve == curve and r.x
        ]
        units = [(x, m) for x, c in of for m in self.measures(c)]
        trials = min(m.n for _, m in units) if is_rate(of[0][1]) else None
        return dose_response.trend([x for x, _ in units], [m.value for _, m in units], trials)

    def dose_readings(
        self, cell: str, curve: str = ""
    ) -> tuple[list[float], list[float], list[int]]:
        """Every reading along a curve: its x, its rate, and how many trials that is of; a law is fitted to these."""
        units: list[tuple[float, Measure]] = []
        for row in self.table.rows:
            if row.curve == curve and row.x is not None and cell in [c.name for c in row.cells]:
                units += [(row.x, m) for m in self.measures(self.cell(row.name, cell, curve))]
        return [x for x, _ in units], [m.value for _, m in units], [m.n for _, m in units]

    def fit_dose_response(self, cell: str, curve: str = "") -> DoseResponse:
        """Success against log dose over the rows of a curve; a row at dose zero gives the floor."""
        return dose_response.fit_dose_response(*self.dose_readings(cell, curve))

    def points(self) -> Iterator[tuple[Row, Cell, Measure]]:
        """Every cell with its number."""
        for row in self.table.rows:
            for cell in row.cells:
                yield row, cell, self.point(cell)


def share_above_threshold(share: float) -> Comparison:
    """How many values lie above a threshold that others set: the conformal quantile at a false-positive rate of `share`."""

    def compare(values: Sequence[float], others: Sequence[float]) -> Measure:
        place = stats.conformal_rank(len(others), share)
        threshold = math.inf if place is None else sorted(others)[place - 1]
        how = f"encoders above the threshold that {len(others)} others set at a false-positive rate of {share:g}"
        return proportion(sum(v > threshold for v in values), len(values), how)

    return compare


def is_rate(cell: Cell) -> bool:
    """Whether a cell is a share in 0..1, by its metric."""
    if cell.compare is not None:
        return True
    name = cell.readings[0][1].rpartition(".")[2]
    return not name.startswith(
        ("z_", "target_rank", "targeted_rank", "similarity", "seconds", "anomaly", "value")
    )


def readings(trials: Sequence[Trial], *metrics: str) -> tuple[Reading, ...]:
    """The same metrics of several trials."""
    return tuple((t, m) for t in trials for m in metrics)
