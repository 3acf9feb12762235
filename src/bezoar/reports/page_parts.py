"""What a page is made of: sections of text, figures, tables, galleries. Plain data; the templates give it its looks.

All text in here is taken to be hostile and is escaped by the templates; only a Figure's svg, made by `charts`, is markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Figure:
    """A chart. svg: inline markup. note: what is seen, in a sentence."""

    svg: Markup
    title: str
    note: str = ""
    kind: str = field(default="figure", init=False)


@dataclass(frozen=True)
class Figures:
    """Charts side by side."""

    figures: Sequence[Figure]
    kind: str = field(default="figures", init=False)


@dataclass(frozen=True)
class Links:
    """A table's cell that links to pages of sibling runs, by number."""

    runs: Sequence[str]


@dataclass(frozen=True)
class Table:
    """head: column names. rows: cells of text. numbers: which columns are set flush right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Links]]
    numbers: Sequence[int] = ()
    note: str = ""
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Line:
    """A line under a picture. look: '', 'old', 'new', 'muted', 'bad', 'good' or 'mark'."""

    text: str
    look: str = ""


@dataclass(frozen=True)
class Tile:
    """Pictures of a gallery that belong together, and the lines under them. pictures: places in the contact sheet."""

    pictures: Sequence[int]
    lines: Sequence[Line] = ()
    look: str = ""  # '', 'bad' or 'good': colour of the frame
    badge: str = ""


@dataclass(frozen=True)
class Gallery:
    """A contact sheet cut into tiles. sheet: data address of one PNG of `columns` x `rows` square cells.

    scale: side of a shown picture in CSS pixels. smooth: whether pixels are blended when they are shown larger.
    """

    sheet: str
    columns: int
    rows: int
    tiles: Sequence[Tile]
    scale: int = 80
    smooth: bool = False
    title: str = ""
    note: str = ""
    kind: str = field(default="gallery", init=False)

    @property
    def pictures_across(self) -> int:
        """Pictures in the widest tile."""
        return max((len(t.pictures) for t in self.tiles), default=1)

    def background_position(self, picture: int) -> str:
        """CSS background-position of a picture, in percent of the room there is."""
        y, x = divmod(picture, self.columns)
        return f"{100 * x / max(1, self.columns - 1):.4g}% {100 * y / max(1, self.rows - 1):.4g}%"


Part = Text | Figure | Figures | Table | Gallery


@dataclass(frozen=True)
class Section:
    """A heading, and what stands below it."""

    title: str
    parts: Sequence[Part] = ()
    lead: str = ""
