"""A paper's table or figure as a declaration: cells read from runs, and claims they test.

A table states which trials answer it; `bezoar reproduce` runs them and reads the cells. Nothing
here trains or measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bezoar.errors import UserError
from bezoar.evaluation import dose_response, stats
from bezoar.evaluation.dose_response import Contrast, DoseResponse
from bezoar.evaluation.scores import Measure, proportion
from bezoar.runs.run import Run
from bezoar.runs.verb import Trial

NORMAL_975 = 1.96  # the 97.5 % quantile of the normal distribution: half of a 95 % interval
NORMAL_80 = 0.84  # the 80 % quantile: an effect is detectable when it is detected 4 times in 5
NOT_RATES = (  # beginnings of the names of metrics that are no share in 0..1
    *("value", "runner_up", "grade", "statistic", "anomaly", "least_norm", "patch_pull"),
    *("z_", "target_rank", "targeted_rank", "query_min_rank", "other_min_rank"),
    *("similarity", "reference_similarity", "reference_kept", "clean_similarity", "agreement_"),
    *("pattern_correlation", "shift_cosine", "shift_length", "threshold", "final_loss"),
    *("seconds", "cpu_seconds", "cost_", "poisons_kept", "poison_exposures"),
)

Reading = tuple[Trial, str]  # a trial, and the name of a metric of its run
Comparison = Callable[[Sequence[float], Sequence[float]], Measure]
Expected = Literal["+", "-", "same"]


@dataclass(frozen=True)
class TableOptions:
    """The user's choices when a paper is reproduced."""

    scale: str  # `smoke`, `small`, `gpu` or `paper`
    data: str = ""  # spec of the user's own training data, in place of the scale's
    test: str = ""  # spec of the user's own test data, in place of the scale's
    root: str = ""  # folder that holds the published data sets by name
    added: tuple[tuple[str, str], ...] = ()  # kind and spec of methods beside those of the table

    def added_specs(self, kind: str) -> tuple[str, ...]:
        """The specs of the added methods of a kind."""
        return tuple(spec for added, spec in self.added if added == kind)


@dataclass(frozen=True)
class Cell:
    """One number of a table: the mean of its readings, or the result of `compare`."""

    name: str  # the column's heading; part of the metric's name
    readings: tuple[Reading, ...]  # what is read
    published_value: float | None = None  # the paper's number
    reference_readings: tuple[Reading, ...] = ()  # the second argument of `compare`
    compare: Comparison | None = None  # of the values of readings and reference_readings

    @classmethod
    def mean(
        cls, name: str, trials: Sequence[Trial], *metrics: str, published: float | None = None
    ) -> Cell:
        """The mean of the same metrics over several trials."""
        return cls(name, readings(trials, *metrics), published)


@dataclass(frozen=True)
class Row:
    """The cells at one point."""

    name: str  # the row's heading; part of the metrics' names
    cells: tuple[Cell, ...]  # one a column; a row may lack some columns
    x: float | None = None  # the row's place on the axis, where the axis is a quantity
    curve: str = ""  # the line of the chart that the row belongs to


@dataclass(frozen=True)
class Claim:
    """A statement of the paper and the contrast that tests it.

    The contrast is expected to be positive ("+"), negative ("-"), or within `margin` of 0 ("same").
    """

    text: str  # the statement
    source: str  # `abstract`, `printed in ...`, or `recalled` for a direction without a number
    expected: Expected
    contrast: Callable[[Results], Contrast]  # computes the contrast from the results of the table
    margin: float = 0.0


@dataclass(frozen=True)
class Table:
    """A table or figure."""

    title: str  # the heading of its section on the page
    paper_finding: str = ""  # the paper's result, in a sentence
    axis: str = ""  # the quantity that differs between rows, with its unit
    rows: tuple[Row, ...] = ()  # the rows, in order
    claims: tuple[Claim, ...] = ()  # the statements that are tested
    dose_response_cells: tuple[str, ...] = ()  # columns that are fitted against log dose
    notes: tuple[str, ...] = ()  # sentences below the table
    unit: str = "poisons"  # the unit of the axis, for the sentence that describes a fit
    grid: str = ""  # a column to draw as one map of rows by curves

    @property
    def trials(self) -> list[Trial]:
        """Every trial that a cell reads, once, in the order of the cells."""
        cells = [cell for row in self.rows for cell in row.cells]
        cell_readings = (r for cell in cells for r in (*cell.readings, *cell.reference_readings))
        return list(dict.fromkeys(trial for trial, _ in cell_readings))

    @property
    def curves(self) -> list[str]:
        """Names of the curves, in order."""
        return list(dict.fromkeys(row.curve for row in self.rows))

    @property
    def cells(self) -> list[str]:
        """Names of the columns, in order."""
        return list(dict.fromkeys(cell.name for row in self.rows for cell in row.cells))


@dataclass(frozen=True)
class Results:
    """A table with the runs of its trials."""

    table: Table
    runs: Mapping[Trial, Run]

    def cell(self, row: str, cell: str, curve: str | None = None) -> Cell:
        """The cell with the names of its row and column. Raises UserError when there is none."""
        for candidate in self.table.rows:
            if candidate.name == row and curve in (None, candidate.curve):
                for c in candidate.cells:
                    if c.name == cell:
                        return c
        raise UserError(f"table {self.table.title!r} has no cell {cell!r} in row {row!r}")

    def measures(self, cell: Cell) -> list[Measure]:
        """The measure of every reading of a cell, in order."""
        return [self.runs[trial].metric(metric) for trial, metric in cell.readings]

    def point(self, cell: Cell) -> Measure:
        """All readings of a cell as one number with its interval."""
        measures = self.measures(cell)
        if cell.compare is None:
            return dose_response.pool_readings(measures, measures[0].how, is_rate(cell))
        references = [
            self.runs[trial].metric(name).value for trial, name in cell.reference_readings
        ]
        return cell.compare([m.value for m in measures], references)

    def points(self) -> Iterator[tuple[Row, Cell, Measure]]:
        """Every cell of the table with its row and its number."""
        for row in self.table.rows:
            for cell in row.cells:
                yield row, cell, self.point(cell)

    def values(self, row: str, cell: str) -> list[float]:
        """The value of every reading of a cell, by the names of its row and column."""
        return [m.value for m in self.measures(self.cell(row, cell))]

    def compare_cells(
        self, a: Cell | Sequence[Cell], b: Cell | Sequence[Cell], paired: bool = False
    ) -> Contrast:
        """The mean of `a` minus the mean of `b`, over the readings of all their cells.

        For shares, the interval is at least as wide as the number of trials behind a share
        requires.
        """
        cells = [a] if isinstance(a, Cell) else list(a)
        base_cells = [b] if isinstance(b, Cell) else list(b)
        measures = [m for c in cells for m in self.measures(c)]
        base = [m for c in base_cells for m in self.measures(c)]
        trials = min(m.n for m in (*measures, *base)) if is_rate(cells[0]) else None
        return dose_response.difference(
            [m.value for m in measures], [m.value for m in base], paired, trials
        )

    def compare_with_bound(self, cell: Cell, bound: float) -> Contrast:
        """A cell minus a constant, with the cell's own interval."""
        m = self.point(cell)
        error = (m.high - m.low) / (2 * NORMAL_975)
        return Contrast(
            value=m.value - bound,
            low=m.low - bound,
            high=m.high - bound,
            n=len(cell.readings),
            detectable=(NORMAL_975 + NORMAL_80) * error,
            how=m.how,
        )

    def trend(self, cell: str, curve: str = "") -> Contrast:
        """Change of a column per doubling of x along a curve, over readings at x above 0."""
        rows = [row for row in self.table.rows if row.curve == curve and row.x]
        cells = [(row.x or 0.0, self.cell(row.name, cell, curve)) for row in rows]
        readings = [(x, m) for x, c in cells for m in self.measures(c)]
        trials = min(m.n for _, m in readings) if is_rate(cells[0][1]) else None
        return dose_response.trend([x for x, _ in readings], [m.value for _, m in readings], trials)

    def dose_readings(
        self, cell: str, curve: str = ""
    ) -> tuple[list[float], list[float], list[int]]:
        """Every reading of a column along a curve, for fitting a dose-response curve.

        Returns:
            For each reading: its x, its rate, and the number of trials behind the rate.
        """
        readings: list[tuple[float, Measure]] = []
        for row in self.table.rows:
            if row.curve == curve and row.x is not None and cell in [c.name for c in row.cells]:
                readings += [(row.x, m) for m in self.measures(self.cell(row.name, cell, curve))]
        return [x for x, _ in readings], [m.value for _, m in readings], [m.n for _, m in readings]

    def fit_dose_response(self, cell: str, curve: str = "") -> DoseResponse:
        """Success against log dose over the rows of a curve; a row at dose 0 gives the floor."""
        return dose_response.fit_dose_response(*self.dose_readings(cell, curve))


def readings(trials: Sequence[Trial], *metrics: str) -> tuple[Reading, ...]:
    """The same metrics of several trials, trial by trial."""
    return tuple((trial, metric) for trial in trials for metric in metrics)


def row_difference(
    cell: str, row: str, base_row: str, curve: str | None = None, paired: bool = False
) -> Callable[[Results], Contrast]:
    """A contrast for a claim: a column in one row minus the same column in another.

    curve: of both rows. paired: whether the readings of the two rows correspond one to one.
    """
    return lambda results: results.compare_cells(
        results.cell(row, cell, curve), results.cell(base_row, cell, curve), paired
    )


def mean_cells(trials: Sequence[Trial], columns: Mapping[str, str]) -> tuple[Cell, ...]:
    """A cell a column, the mean of a metric over trials. columns: name -> metric."""
    return tuple(Cell.mean(name, trials, metric) for name, metric in columns.items())


def share_above_threshold(rate: float) -> Comparison:
    """A comparison: the share of values above the threshold that the reference values set.

    Args:
        rate: The false-positive rate, in 0..1. The threshold is the conformal quantile of the
            reference values at it, and infinite where they are too few for that rate.
    """

    def compare(values: Sequence[float], references: Sequence[float]) -> Measure:
        rank = stats.conformal_rank(len(references), rate)
        threshold = math.inf if rank is None else sorted(references)[rank - 1]
        above = sum(value > threshold for value in values)
        how = (
            f"encoders above the threshold that {len(references)} others set "
            f"at a false-positive rate of {rate:g}"
        )
        return proportion(above, len(values), how)

    return compare


def is_rate(cell: Cell) -> bool:
    """Whether a cell is a share in 0..1, according to its metric's name."""
    if cell.compare is not None:
        return True
    return not cell.readings[0][1].rpartition(".")[2].startswith(NOT_RATES)
