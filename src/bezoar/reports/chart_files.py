"""Saves a page's charts as separate SVG files in light colours, for papers and slides."""

import re
from collections.abc import Sequence
from pathlib import Path

from bezoar.data.files.writing import make_folder, write_whole
from bezoar.reports.page_parts import Figure, Section

FOLDER = "charts"
STYLE = Path(__file__).parent / "templates" / "style.css"
NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'
FONT = "DejaVu Sans, sans-serif"
LONGEST_NAME = 80  # characters


def write_charts(folder: Path, sections: Sequence[tuple[str, Section]]) -> list[str]:
    """Write every chart of some sections into the folder's `charts`. Returns the files' names."""
    figures = [
        (title, part) for title, s in sections for part in s.parts if isinstance(part, Figure)
    ]
    if not figures:
        return []
    make_folder(folder / FOLDER)
    names = []
    for number, (title, figure) in enumerate(figures, 1):
        words = re.findall(r"[a-z0-9]+", f"{title} {figure.title}".lower())
        names.append(f"{number:02d}-{'-'.join(words)[:LONGEST_NAME]}.svg")
        write_whole(folder / FOLDER / names[-1], stand_alone(figure.svg))
    return names


def stand_alone(svg: str) -> str:
    """Turn an inline chart into a document with its namespace and without colour variables."""
    colours = light_colours()  # `str`, because markup escapes what is put into it
    text = str(svg).replace("<svg ", f"<svg {NAMESPACE} ", 1).replace("var(--font)", FONT)
    return re.sub(r"var\(--(\w+)\)", lambda match: colours.get(match[1], "#000000"), text)


def light_colours() -> dict[str, str]:
    """The colours of the light theme by name, from the page's style sheet."""
    light = STYLE.read_text().partition("@media")[0]
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", light))
