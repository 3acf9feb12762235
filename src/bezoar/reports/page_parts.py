"""The parts of a page: sections of text, charts, tables and galleries.

They hold plain data; the templates render them and escape every text, which may be hostile. Only
the svg of a `Figure`, made by `charts`, is markup.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Figure:
    """A chart as inline svg, with a title and a sentence on how to read it."""

    kind: ClassVar[str] = "figure"
    svg: Markup
    title: str
    note: str = ""

    @property
    def is_wide(self) -> bool:
        """Whether the chart is as wide as the page; others are placed side by side."""
        return 'class="wide"' in self.svg


@dataclass(frozen=True)
class Links:
    """A table cell that links to the pages of sibling runs, by number."""

    runs: Sequence[str]


@dataclass(frozen=True)
class Line:
    """A line of text. `look`: '', 'old', 'new', 'muted', 'bad', 'good', 'warn', 'mark' or 'key'."""

    text: str
    look: str = ""


@dataclass(frozen=True)
class Table:
    """A table."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]  # names of the columns
    rows: Sequence[Sequence[str | Links | Line]]  # cells of each row
    numbers: Sequence[int] = ()  # indices of the columns that are set flush right
    note: str = ""  # A sentence below the table


@dataclass(frozen=True)
class Tile:
    """Pictures of a gallery that belong together, with the lines under them."""

    pictures: Sequence[int]  # indices of the pictures in the contact sheet
    lines: Sequence[Line] = ()  # lines of text
    look: str = ""  # the colour of the frame: '', 'bad' or 'good'
    badge: str = ""  # A short text in a corner, such as a rank


@dataclass(frozen=True)
class Gallery:
    """A contact sheet cut into tiles."""

    kind: ClassVar[str] = "gallery"
    sheet: str  # A data address of one PNG of `columns` x `rows` square cells
    columns: int  # cells in a row of the sheet
    rows: int  # rows of the sheet
    tiles: Sequence[Tile]  # what is shown, in order
    scale: int = 80  # side of a shown picture in CSS pixels
    smooth: bool = False  # whether pixels are blended where a picture is shown larger than it is
    title: str = ""  # A heading above the gallery
    note: str = ""  # A sentence below it

    @property
    def pictures_across(self) -> int:
        """The number of pictures in the widest tile."""
        return max((len(t.pictures) for t in self.tiles), default=1)

    def background_position(self, picture: int) -> str:
        """Return the CSS background-position that shows one picture of the sheet."""
        y, x = divmod(picture, self.columns)
        return f"{100 * x / max(1, self.columns - 1):.4g}% {100 * y / max(1, self.rows - 1):.4g}%"


@dataclass(frozen=True)
class Step:
    """Something to do next: a sentence, and the command that does it; "" for none."""

    text: str
    command: str = ""


Part = Text | Figure | Table | Gallery


@dataclass(frozen=True)
class Section:
    """The contents below a heading: an introduction, then the parts."""

    parts: Sequence[Part] = ()
    lead: str = ""
