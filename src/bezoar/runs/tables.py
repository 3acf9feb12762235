"""Declared tables: rows of cells that are read from runs, beside what a paper printed, and the claims that they test."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from bezoar.errors import UserError
from bezoar.evaluation import dose_response, stats
from bezoar.evaluation.dose_response import Contrast, DoseResponse
from bezoar.evaluation.scores import Measure, proportion
from bezoar.runs.run import Run
from bezoar.runs.verb import Trial

# Normal quantiles: of a 95 % interval, and of an effect that is found 4 times in 5.
Z_INTERVAL, Z_POWER = 1.96, 0.84
# Metrics that are not shares in 0..1, by the start of their names.
NOT_RATES = ("z_", "target_rank", "targeted_rank", "similarity", "seconds", "anomaly", "value")
Reading = tuple[Trial, str]  # a trial, and the name of a metric of its run
Comparison = Callable[[Sequence[float], Sequence[float]], Measure]


@dataclass(frozen=True)
class TableOptions:
    """What a paper's tables are asked for.

    Attributes:
        scale: `smoke`, `small`, `gpu` or `paper`.
        data: spec of training data in place of the scale's; "" for none.
        test: spec of test data in place of the scale's; "" for none.
        root: folder that holds data sets by name; "" for none.
    """

    scale: str
    data: str = ""
    test: str = ""
    root: str = ""


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        name: of its column.
        readings: the metrics that it is the mean of.
        published_value: what the paper printed for it.
        against: readings that it is compared with.
        compare: makes one number of the values of the readings and those of `against`, in place of the mean.
    """

    name: str
    readings: tuple[Reading, ...]
    published_value: float | None = None
    against: tuple[Reading, ...] = ()
    compare: Comparison | None = None


@dataclass(frozen=True)
class Row:
    """Cells at one point. x: its place on the axis, where the axis is a quantity. curve: the line that it belongs to."""

    name: str
    cells: tuple[Cell, ...]
    x: float | None = None
    curve: str = ""


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper and the comparison that tests it.

    Attributes:
        text: the sentence.
        source: where it is known from: `abstract`, `printed in ...`, or `recalled` (a direction, never a target).
        expected: '+' if the contrast is to be positive, '-' if negative, 'same' if within `margin` of zero.
        contrast: computes the contrast.
        margin: see `expected`.
    """

    text: str
    source: str
    expected: Literal["+", "-", "same"]
    contrast: Callable[[Results], Contrast]
    margin: float = 0.0


@dataclass(frozen=True)
class Table:
    """A table or figure of a paper.

    Attributes:
        title: of the table.
        paper_finding: what the paper shows.
        axis: what the rows are points of.
        rows: the rows, in order.
        claims: what the paper says of it.
        dose_response_cells: columns that are fitted against log dose, for every curve.
        notes: sentences that stand below it.
        unit: of the axis, in sentences about the fit.
        grid: a column that is drawn as a map of rows by curves, in place of a chart for each column.
    """

    title: str
    paper_finding: str
    axis: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    dose_response_cells: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unit: str = "poisons"
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
        """A cell by the names of its row and column. Raises UserError where there is none."""
        for r in self.table.rows:
            if r.name == row and (curve is None or r.curve == curve):
                for c in r.cells:
                    if c.name == cell:
                        return c
        raise UserError(f"table {self.table.title!r} has no cell {cell!r} in row {row!r}")

    def measures(self, cell: Cell) -> list[Measure]:
        """The measure of each reading of a cell."""
        return [self.runs[trial].metric(name) for trial, name in cell.readings]

    def values(self, row: str, cell: str, curve: str | None = None) -> list[float]:
        """The value of each reading of a cell, which is named by its row and column."""
        return [m.value for m in self.measures(self.cell(row, cell, curve))]

    def pool(self, cell: Cell) -> Measure:
        """All readings of a cell as one number with its interval."""
        measures = self.measures(cell)
        if cell.compare is not None:
            others = [self.runs[trial].metric(name).value for trial, name in cell.against]
            return cell.compare([m.value for m in measures], others)
        return dose_response.pool_readings(measures, measures[0].how, is_rate(cell))

    def points(self) -> Iterator[tuple[Row, Cell, Measure]]:
        """Every cell with its row and its number."""
        for row in self.table.rows:
            for cell in row.cells:
                yield row, cell, self.pool(cell)

    def compare_rows(
        self, cell: str, to: str, since: str, curve: str | None = None, paired: bool = False
    ) -> Contrast:
        """A column in row `to` less the same column in row `since`, over readings."""
        return self.compare_cells(self.cell(to, cell, curve), self.cell(since, cell, curve), paired)

    def compare_cells(
        self, a: Cell | Sequence[Cell], b: Cell | Sequence[Cell], paired: bool = False
    ) -> Contrast:
        """One cell, or all of several, less another, over readings.

        The interval of a difference of shares is at least that of the binomial error of their trials.
        """
        left = [a] if isinstance(a, Cell) else list(a)
        right = [b] if isinstance(b, Cell) else list(b)
        first = [m for cell in left for m in self.measures(cell)]
        second = [m for cell in right for m in self.measures(cell)]
        trials = min(m.n for m in (*first, *second)) if is_rate(left[0]) else None
        return dose_response.difference(
            [m.value for m in first], [m.value for m in second], paired, trials
        )

    def compare_with_bound(self, cell: Cell, bound: float) -> Contrast:
        """A cell less a number, by the cell's own interval."""
        m = self.pool(cell)
        error = (m.high - m.low) / (2 * Z_INTERVAL)
        return Contrast(
            m.value - bound,
            m.low - bound,
            m.high - bound,
            len(cell.readings),
            (Z_INTERVAL + Z_POWER) * error,
            m.how,
        )

    def trend(self, cell: str, curve: str = "") -> Contrast:
        """Change of a column for each doubling of x along a curve, over readings."""
        rows = [row for row in self.table.rows if row.curve == curve and row.x]
        cells = [self.cell(row.name, cell, curve) for row in rows]
        xs: list[float] = []
        measures: list[Measure] = []
        for row, c in zip(rows, cells, strict=True):
            of_cell = self.measures(c)
            xs += [row.x or 0.0] * len(of_cell)
            measures += of_cell
        trials = min(m.n for m in measures) if is_rate(cells[0]) else None
        return dose_response.trend(xs, [m.value for m in measures], trials)

    def dose_readings(
        self, cell: str, curve: str = ""
    ) -> tuple[list[float], list[float], list[int]]:
        """Of every reading along a curve its x, its rate, and the number of trials that the rate is of."""
        xs: list[float] = []
        measures: list[Measure] = []
        for row in self.table.rows:
            if row.curve == curve and row.x is not None and cell in [c.name for c in row.cells]:
                of_cell = self.measures(self.cell(row.name, cell, curve))
                xs += [row.x] * len(of_cell)
                measures += of_cell
        return xs, [m.value for m in measures], [m.n for m in measures]

    def fit_dose_response(self, cell: str, curve: str = "") -> DoseResponse:
        """Fit success against log dose over the rows of a curve; a row at dose zero gives the floor."""
        return dose_response.fit_dose_response(*self.dose_readings(cell, curve))


def share_above_threshold(share: float) -> Comparison:
    """A comparison: the share of values above the threshold that others set, at a false-positive rate of `share`.

    The threshold is the conformal quantile of the others.
    """

    def compare(values: Sequence[float], others: Sequence[float]) -> Measure:
        rank = stats.conformal_rank(len(others), share)
        threshold = math.inf if rank is None else sorted(others)[rank - 1]
        how = f"encoders above the threshold that {len(others)} others set at a false-positive rate of {share:g}"
        return proportion(sum(v > threshold for v in values), len(values), how)

    return compare


def is_rate(cell: Cell) -> bool:
    """Whether a cell is a share in 0..1, by the name of its metric."""
    if cell.compare is not None:
        return True
    name = cell.readings[0][1].rpartition(".")[2]
    return not name.startswith(NOT_RATES)


def readings(trials: Sequence[Trial], *metrics: str) -> tuple[Reading, ...]:
    """The same metrics of several trials."""
    return tuple((trial, metric) for trial in trials for metric in metrics)
