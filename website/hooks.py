"""What mkdocs does beside its own work: pages that are made when the site is built, and links to
files outside of docs/.

The pages of kinds and the tables of the board are made from sources; they do not lie in git. A
document of the repository that a page links to (CONTRIBUTING.md, an example) becomes a page or a
file of the site below `repository/`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import board
import kind_pages
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")
PARTS = {"<!-- verbs -->": kind_pages.verb_parts, "<!-- board -->": board.board_tables}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and the files of the repository that pages link to."""
    for name, text in kind_pages.kind_pages().items():
        files.append(File.generated(config, name, content=text))
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    while texts:
        place, text = texts.popitem()
        for path in linked_files(place, text):
            name = f"repository/{path.relative_to(ROOT).as_posix()}"
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(path)))
                if path.suffix == ".md":
                    texts[name] = path.read_text()
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Put in the parts that are made, and turn links to the repository into links to its files on
    the site.
    """
    for mark, make in PARTS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    place = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        target = repository_path(place, link[2])
        if target is None:
            return link[0]
        return link[1] + os.path.relpath(site_path(target), Path(place).parent.as_posix()) + link[3]

    return LINK.sub(moved, markdown)


def linked_files(place: str, text: str) -> list[Path]:
    """The files outside of docs/ that a page links to."""
    targets = [repository_path(place, link[2]) for link in LINK.finditer(text)]
    return [path for path in targets if path and path.is_file() and not path.is_relative_to(DOCS)]


def repository_path(place: str, target: str) -> Path | None:
    """The file of the repository that a page's link means; None for one of the web, or of a
    generated page.
    """
    if "://" in target or target.startswith(("mailto:", "/")):
        return None
    place_there = (
        place.removeprefix("repository/") if place.startswith("repository/") else f"docs/{place}"
    )
    path = Path(os.path.normpath(ROOT / Path(place_there).parent / target))
    return path if path.is_file() else None


def site_path(path: Path) -> str:
    """Where a file of the repository lies on the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    if path == ROOT / "README.md":
        return "index.md"
    return f"repository/{path.relative_to(ROOT).as_posix()}"
