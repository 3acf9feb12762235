"""Folders of image files, walked in one fixed order; no link is followed out of a folder.

What is held of a folder is its directories, and the names in one of them at a time: memory grows
neither with the images nor, but for the largest directory, with their names.
"""

import bisect
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from bezoar.data.files.images import OTHER_IMAGES
from bezoar.data.files.paths import IMAGE_SUFFIXES, printable
from bezoar.data.files.skipped import Skipped
from bezoar.errors import UserError

BLOCK_FILES = 4096  # of a unit of work
MAX_DEPTH = 64  # of directories within one another
CAPTION_SUFFIXES = (".txt", ".json")  # of a caption's file beside its image
Layout = Literal["auto", "classes", "captions", "flat"]


class FileBlock(NamedTuple):
    """Consecutive files of a folder."""

    before: int  # how many files come before them
    stretch: int  # number of the stretch with which they begin
    start: int  # number of their first file in it
    files: int  # how many they are
    checksum: int  # of their names, so that a change is noticed


class Stretch(NamedTuple):
    """Files with no directory between them: start..stop of the sorted names in a directory."""

    directory: str
    start: int
    stop: int


@dataclass
class Walk:
    """A folder as it was when it was walked: its files in the order of their paths."""

    root: Path  # the folder
    layout: Layout  # `auto` is replaced by the layout that the folder seems to have
    # names of the class folders, sorted; none unless the layout is `classes`
    classes: tuple[str, ...] = ()
    stretches: list[Stretch] = field(default_factory=list)  # the files
    # directories that were not walked into, and why
    problems: list[Skipped] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._real_root = Path(os.path.realpath(self.root))
        self._listed: tuple[str, list[str]] | None = None  # the directory listed last, its files
        if self.layout == "auto":
            self.layout = guess_layout(self.root)
        self._enter("")
        if self.layout != "classes":
            return
        self.classes = tuple(_list_directory(self.root, "", self.layout)[1])
        if not self.classes:
            raise UserError(f"{str(self.root)!r} holds no class folders")
        filled = {s.directory.partition("/")[0] for s in self.stretches}
        for name in self.classes:
            if name not in filled:
                self._add_problem(name, "no file in the class folder")

    def _enter(self, directory: str) -> None:
        """Record the files of a directory and of those in it, in the order of the names."""
        if directory.count("/") >= MAX_DEPTH:
            self._add_problem(directory, f"more than {MAX_DEPTH} directories within one another")
            return
        try:
            files, folders = _list_directory(self.root, directory, self.layout)
        except OSError as error:
            self._add_problem(directory, f"cannot be listed: {error.strerror}")
            return
        edges = [0, *(bisect.bisect(files, name) for name in folders), len(files)]
        for (start, stop), name in itertools.zip_longest(itertools.pairwise(edges), folders):
            if stop > start:
                self.stretches.append(Stretch(directory, start, stop))
            if name is not None:
                self._enter(_join(directory, name))

    def _add_problem(self, name: str, reason: str) -> None:
        self.problems.append(Skipped(str(self.root), printable(name), reason))

    def files(self, stretch: int = 0, start: int = 0) -> Iterator[tuple[int, int, str]]:
        """Iterate over the files from a place on.

        Yields:
            The number of a file's stretch, its number in the stretch, and its path below the root.

        Raises:
            UserError: if a directory cannot be read any more.
        """
        for number, (directory, first, stop) in enumerate(self.stretches[stretch:], stretch):
            names = self._list_again(directory)
            for at, name in enumerate(names[first + start : stop], start):
                yield number, at, _join(directory, name)
            start = 0

    def _list_again(self, directory: str) -> list[str]:
        if self._listed is None or self._listed[0] != directory:
            try:
                self._listed = directory, _list_directory(self.root, directory, self.layout)[0]
            except OSError as error:
                raise UserError(
                    f"{self.root / directory} cannot be read any more: {error.strerror}"
                ) from error
        return self._listed[1]

    def cut_blocks(self) -> list[FileBlock]:
        """Cut the files into blocks of BLOCK_FILES."""
        blocks: list[FileBlock] = []
        files = self.files()
        while part := list(itertools.islice(files, BLOCK_FILES)):
            stretch, start, _ = part[0]
            checksum = _checksum([name for *_, name in part])
            blocks.append(FileBlock(len(blocks) * BLOCK_FILES, stretch, start, len(part), checksum))
        return blocks

    def read_block(self, block: FileBlock) -> list[str]:
        """The paths of a block's files. Raises UserError if they are not those that were cut."""
        files = self.files(block.stretch, block.start)
        names = [name for *_, name in itertools.islice(files, block.files)]
        if _checksum(names) != block.checksum:
            raise UserError(f"files were added or taken away below {self.root} while it was read")
        return names

    def resolve(self, name: str) -> Path | None:
        """Return where a path below the root leads by its links; None if that is outside."""
        path = Path(os.path.realpath(self.root / name))
        return path if path.is_relative_to(self._real_root) else None


def guess_layout(root: Path) -> Layout:
    """Guess the layout of a folder by the first of its directories that holds images.

    It is `captions` if at least half of these have one beside them, else `classes` if the root
    holds folders.
    """
    folders = _list_directory(root, "", "flat")[1]
    waiting = [""]
    while waiting:
        directory = waiting.pop()
        try:
            files, deeper = _list_directory(root, directory, "flat")
        except OSError:  # the walk names it
            continue
        names = set(files)
        images = [n for n in files if is_image(n)]
        if images:
            captioned = sum(any(p in names for p in caption_paths(n)) for n in images)
            if 2 * captioned >= len(images):
                return "captions"
            break
        waiting += [
            _join(directory, n) for n in reversed(deeper) if directory.count("/") < MAX_DEPTH
        ]
    return "classes" if folders else "flat"


def is_image(name: str) -> bool:
    """Tell whether a file is an image by the ending of its name."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def other_image(name: str) -> str:
    """The ending of an image of a format that is not read; empty for any other file."""
    ending = os.path.splitext(name)[1].lower().removeprefix(".")
    return ending if ending in OTHER_IMAGES else ""


def caption_paths(name: str) -> list[str]:
    """Return where the caption of an image would stand beside it."""
    return [os.path.splitext(name)[0] + suffix for suffix in CAPTION_SUFFIXES]


def _list_directory(root: Path, directory: str, layout: Layout) -> tuple[list[str], list[str]]:
    """List the files of a directory, captions beside images left out, and its directories."""
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(root / directory) as entries:
        for entry in entries:
            (folders if entry.is_dir(follow_symlinks=False) else files).append(entry.name)
    if layout == "captions":
        images = [name for name in files if is_image(name) or other_image(name)]
        captions = {path for name in images for path in caption_paths(name)}
        if not directory:  # img2dataset describes each of its folders in two files beside it
            captions |= {f + ending for f in folders for ending in ("_stats.json", ".parquet")}
        files = [name for name in files if name not in captions]
    return sorted(files), sorted(folders)


def _join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


def _checksum(names: Sequence[str]) -> int:
    return zlib.crc32("\0".join(names).encode("utf-8", "surrogateescape"))
