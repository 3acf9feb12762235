"""Writes the tables of a reproduction for use in a paper: CSV with a line a cell, and LaTeX."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bezoar.data.files.writing import whole_file, write_whole

CSV, LATEX = "tables.csv", "tables.tex"
COLUMNS = ("table", "curve", "row", "x", "cell", "value", "low", "high", "n", "printed", "runs")
SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
TableJson = Mapping[str, Any]  # as tables.json holds it


def write_table_files(folder: Path, tables: Sequence[TableJson]) -> None:
    """Write tables.csv and tables.tex."""
    with whole_file(folder / CSV, "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(COLUMNS)
        for table in tables:
            for row in table["rows"]:
                for cell in row["cells"]:
                    out.writerow(csv_line(table, row, cell))
    write_whole(folder / LATEX, "\n\n".join(map(latex_table, tables)) + "\n")


def csv_line(table: TableJson, row: Mapping[str, Any], cell: Mapping[str, Any]) -> list[Any]:
    """A cell as a line of tables.csv; unknown values are empty."""
    measure = cell["measure"]
    numbers = [measure[key] for key in ("value", "low", "high", "n")]
    place = [table["name"], row["curve"], row["name"], row["x"], cell["name"]]
    return [*place, *numbers, cell["printed"], " ".join(cell["runs"])]


def latex_table(table: TableJson) -> str:
    """A table in LaTeX (booktabs): our number, its interval, and the published number if known."""
    columns = list(dict.fromkeys(cell["name"] for row in table["rows"] for cell in row["cells"]))
    lines = [
        r"\begin{table}",
        rf"\caption{{{escape_latex(table['title'])}. "
        r"Brackets: 95\,\% intervals; p: printed in the paper.}",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(map(escape_latex, [table["axis"], *columns])) + r" \\",
        r"\midrule",
    ]
    for row in table["rows"]:
        cells = {cell["name"]: latex_cell(cell) for cell in row["cells"]}
        name = f"{row['curve']}, {row['name']}" if row["curve"] else row["name"]
        texts = [escape_latex(name), *(cells.get(column, "--") for column in columns)]
        lines.append(" & ".join(texts) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def latex_cell(cell: Mapping[str, Any]) -> str:
    """A number with its interval, in percent for shares, and the published number."""
    scale = 100 if cell["rate"] else 1
    value, low, high = (float(cell["measure"][key]) for key in ("value", "low", "high"))
    text = format_number(value * scale)
    if low != high:
        text += f" [{format_number(low * scale)}, {format_number(high * scale)}]"
    if cell["printed"] is not None:
        text += f" (p {format_number(cell['printed'] * scale)})"
    return text


def format_number(value: float) -> str:
    """A number for a table; infinities as LaTeX writes them."""
    if math.isnan(value):
        return "--"
    if math.isinf(value):
        return r"$\infty$" if value > 0 else r"$-\infty$"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def escape_latex(text: str) -> str:
    """Escape the characters of a text that are special in LaTeX."""
    return "".join(SPECIAL.get(character, character) for character in text)
