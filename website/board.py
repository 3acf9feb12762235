"""The board: attack by scan, audit and repair, out of claim files that anybody can add to.

A claim file is TOML, one an attack on one kind of data (`docs/board/claims`): what was attacked,
and figures, each with its n, its interval, the command that makes it and where it was published. A
file of another form is refused with its name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec

CLAIMS = Path(__file__).parents[1] / "docs" / "board" / "claims"
COLUMNS = ("scan", "audit", "repair")
UNMEASURED = "not measured"


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One number. value, low, high: within its 95 % interval; before: the attack's success before a
    repair.

    source: a page of docs/, or an address; key: the name of the figure in the table of figures at
    the end of that page.
    """

    column: Literal["scan", "audit", "repair"]
    method: str
    measure: str
    value: float
    low: float
    high: float
    n: int
    of: str
    command: str
    source: str
    before: float | None = None
    key: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.value <= self.high <= 1:
            raise ValueError(f"{self.method}: 0 <= low <= value <= high <= 1 does not hold")
        if self.n < 1 or (self.before is not None and not 0 <= self.before <= 1):
            raise ValueError(f"{self.method}: n is at least 1, and `before` within 0..1")
        if not self.command.startswith("bezoar "):
            raise ValueError(f"{self.method}: the command must begin with `bezoar `")


class Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of the board. success: of the attack; unmeasured: why a column has no figure."""

    attack: str
    data: str
    encoder: str
    success: str
    figures: tuple[Figure, ...]
    unmeasured: dict[Literal["scan", "audit", "repair"], str] = {}

    def __post_init__(self) -> None:
        if doubled := set(self.unmeasured) & columns_measured(self):
            raise ValueError(f"{', '.join(doubled)} has figures and is `unmeasured`")


def read_claims(folder: Path = CLAIMS) -> dict[str, Claim]:
    """Name of a claim's file -> the claim. Raises ValueError, with the file's name, for one of
    another form.
    """
    claims = {}
    for path in sorted(folder.glob("*.toml")):
        try:
            claims[path.stem] = msgspec.toml.decode(path.read_bytes(), type=Claim)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{path.name}: {error}") from error
    return claims


def board_tables() -> str:
    """The board as Markdown: one table, then every figure of each row with its command and source.

    Rows of which most columns were measured come first.
    """
    by_name = read_claims()
    claims = dict(sorted(by_name.items(), key=lambda item: -len(columns_measured(item[1]))))
    lines = ["| attack | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name, claim in claims.items():
        title = f"[{claim.attack}](#{name})<br>{claim.data}; {claim.encoder}; {claim.success}"
        cells = [cell_text(claim, column) for column in COLUMNS]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    table = '<div class="board" markdown>\n\n' + "\n".join(lines) + "\n\n</div>"
    return "\n\n".join([table, *(row_part(name, claim) for name, claim in claims.items())])


def columns_measured(claim: Claim) -> set[str]:
    return {figure.column for figure in claim.figures}


def cell_text(claim: Claim, column: str) -> str:
    """The figures of a cell, a line each; where there is none, that it was not measured."""
    figures = [figure for figure in claim.figures if figure.column == column]
    if not figures:
        return f"*{UNMEASURED}*"
    return "<br>".join(
        f"**{value_text(f)}** {interval_text(f)}, n = {f.n:,} `{f.method}`" for f in figures
    )


def row_part(name: str, claim: Claim) -> str:
    """A row's own table: measure, n, command and source of each figure."""
    parts = [f"### {claim.attack}: {claim.data} {{ #{name} }}"]
    rows = ["| | method | measure | value | n | command | |", "|---|---|---|---|---|---|---|"]
    for f in claim.figures:
        n = f"{f.n:,} ({f.of})"
        source = f"[source](../{f.source})" if "://" not in f.source else f"[source]({f.source})"
        note = f"{source}; {f.note}" if f.note else source
        value = f"{value_text(f)} {interval_text(f)}"
        cells = [f.column, f"`{f.method}`", f.measure, value, n, f"`{f.command}`", note]
        rows.append("| " + " | ".join(cells) + " |")
    parts.append("\n".join(rows))
    for column in COLUMNS:
        if column not in columns_measured(claim):
            why = claim.unmeasured.get(column)  # type: ignore[call-overload]
            parts.append(f"{column}: {UNMEASURED}" + (f", because {why}." if why else "."))
    parts.append(f"[{name}.toml](claims/{name}.toml)")
    return "\n\n".join(parts)


def value_text(figure: Figure) -> str:
    """The value, after the one before where there is one."""
    value = number_text(figure.value)
    return value if figure.before is None else f"{number_text(figure.before)} → {value}"


def interval_text(figure: Figure) -> str:
    return f"({number_text(figure.low)} to {number_text(figure.high)})"


def number_text(value: float) -> str:
    """A share or an AUROC, as pages write it: three digits after the point, and no nought before
    it.
    """
    if value in (0, 1) or math.isclose(value, 1, abs_tol=5e-4):
        return f"{value:.2f}".removeprefix("0") if value else "0"
    return f"{value:.3f}".removeprefix("0")
