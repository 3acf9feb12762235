"""Folders of image files: walked in one fixed order, and read file by file, from any block of them on.

What is held of a folder is its directories, and the names in one of them at a time: memory grows neither with the images
nor, but for the largest directory, with their names. A folder is hostile: no link is followed out of it, and what cannot
be read is named.
"""

from __future__ import annotations

import bisect
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bezoar.data.decoding import TEMPLATE, batch_pairs, class_captions, describe_failure
from bezoar.data.files.images import SUFFIXES
from bezoar.data.files.paths import TEXT_BYTES, read_file
from bezoar.data.files.skipped import ReadReport, Skipped, Unreadable
from bezoar.data.files.tars import Group
from bezoar.data.pairs import Pairs
from bezoar.data.shards import StoredRecord, parse_metadata
from bezoar.errors import UserError

BLOCK = 4096  # files of a unit of work
DEEPEST = 64  # directories within one another
BESIDE = (".txt", ".json")  # what a caption's file beside its image ends in
Layout = Literal["auto", "classes", "captions", "flat"]
Place = tuple[
    int, int, int, int, int
]  # of a block: files before it; the stretch, the file of it, it begins with; count; mark


class Stretch(NamedTuple):
    """Files with no directory between them: start..stop of the sorted names in the directory `below` the root."""

    below: str
    start: int
    stop: int


@dataclass
class Walk:
    """A folder as it was found, its files in the order of their paths. problems: what was not walked into."""

    root: Path
    layout: Layout
    classes: tuple[str, ...] = ()
    stretches: list[Stretch] = field(default_factory=list)
    problems: list[Skipped] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.listed: tuple[str, list[str]] | None = None
        if self.layout == "auto":
            self.layout = _layout(self.root)
        self._into("")
        if self.layout != "classes":
            return
        self.classes = tuple(_entries(self.root, "", self.layout)[1])
        if not self.classes:
            raise UserError(f"{str(self.root)!r} holds no class folders")
        filled = {s.below.partition("/")[0] for s in self.stretches}
        self.problems += [
            self._problem(c, "no file in the class folder") for c in self.classes if c not in filled
        ]

    def _into(self, below: str) -> None:
        """Take down a directory and those in it, each where its name stands among the files."""
        if below.count("/") >= DEEPEST:
            self.problems.append(
                self._problem(below, f"more than {DEEPEST} directories within one another")
            )
            return
        try:
            files, folders = _entries(self.root, below, self.layout)
        except OSError as error:
            self.problems.append(self._problem(below, f"cannot be listed: {error.strerror}"))
            return
        edges = [0, *(bisect.bisect(files, name) for name in folders), len(files)]
        for (start, stop), name in itertools.zip_longest(itertools.pairwise(edges), folders):
            if stop > start:
                self.stretches.append(Stretch(below, start, stop))
            if name is not None:
                self._into(_joined(below, name))

    def _problem(self, name: str, reason: str) -> Skipped:
        return Skipped(str(self.root), shown(name), reason)

    def names(self, stretch: int = 0, start: int = 0) -> Iterator[tuple[int, int, str]]:
        """From a file on: its stretch, its place there, its path below the root. Raises UserError where a directory is gone."""
        for number, (below, first, stop) in enumerate(self.stretches[stretch:], stretch):
            if self.listed is None or self.listed[0] != below:
                try:
                    self.listed = below, _entries(self.root, below, self.layout)[0]
                except OSError as error:
                    raise UserError(
                        f"{self.root / below} cannot be read any more: {error.strerror}"
                    ) from error
            for at, name in enumerate(self.listed[1][first + start : stop], start):
                yield number, at, _joined(below, name)
            start = 0

    def cut(self, size: int) -> list[Place]:
        """Blocks of `size` files."""
        found: list[Place] = []
        every = self.names()
        while block := list(itertools.islice(every, size)):
            found.append(
                (len(found) * size, *block[0][:2], len(block), _mark([name for *_, name in block]))
            )
        return found


@dataclass(frozen=True)
class FolderSource:
    """A source that reads the images below a folder as it goes: a record a file, in the order of the paths.

    layout: classes: captions and labels are those of the folders in `root`. captions: an image's caption stands beside it
    in .txt, else in .json, under the image's name (what img2dataset writes as `files`). flat: neither. auto: captions
    when at least half of the first images have one, else classes when there are folders.

    An id is json's `record_id` where there is one, else the path below `root`. limit: records.
    """

    root: Path
    size: int = 64
    layout: Layout = "auto"
    template: str = TEMPLATE
    limit: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_report", ReadReport())
        object.__setattr__(self, "_walk", None)
        object.__setattr__(self, "_real", Path(os.path.realpath(self.root)))

    @property
    def paths(self) -> tuple[Path, ...]:
        """What the records are read from, as one file."""
        return (self.root,)

    @property
    def report(self) -> ReadReport:
        """How the last pass over the folder went, or is going; empty before the first."""
        return self.__dict__["_report"]

    @property
    def walk(self) -> Walk:
        """The folder as it was found last."""
        return self.__dict__["_walk"] or self.begin()

    def begin(self) -> Walk:
        """Walk the folder anew. Raises UserError where it cannot be read."""
        try:
            object.__setattr__(self, "_walk", Walk(self.root, self.layout))
        except OSError as error:
            raise UserError(
                f"{error.filename or self.root} cannot be read: {error.strerror}"
            ) from error
        return self.__dict__["_walk"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label."""
        return self.walk.classes

    def __len__(self) -> int:
        """How many records `batches` yields. Costs a pass that decodes everything."""
        return sum(len(batch) for batch in self.batches(1024))

    def batches(self, size: int) -> Iterator[Pairs]:
        """The records in order, `size` at a time. Raises UserError when there are none."""
        report = ReadReport()
        object.__setattr__(self, "_report", report)
        classes = self.begin().classes
        yield from batch_pairs(self.records(), self.size, size, report, classes, self.limit)
        if not report.read:
            raise UserError(describe_failure(str(self.root), report))

    def cut(self) -> list[Place]:
        """The folder's blocks, walked anew. Raises UserError where there is no file."""
        found = self.begin().cut(BLOCK)
        if not found:
            raise UserError(f"no images below {str(self.root)!r}")
        return found

    def files(self) -> Iterator[tuple[str, Path]]:
        """Every file that is read, captions' too, and its path below the root."""
        walk = self.begin()
        for *_, name in walk.names():
            if isinstance(self._usable(name, walk.layout), str):
                continue
            for one in (
                name,
                *(os.path.splitext(name)[0] + e for e in BESIDE if walk.layout == "captions"),
            ):
                path = self.resolved(self.root, one)
                if path is not None and path.is_file():
                    yield one, path

    def records(self, _: int = 0, *place: int) -> Iterator[StoredRecord | Skipped]:
        """The records, or those of one block, not decoded yet. Raises UserError where the folder is not as it was."""
        before, stretch, start, count, known = place or (0, 0, 0, None, 0)
        walk = self.walk
        if before == 0:
            yield from walk.problems
        names: Iterator[str] = (name for *_, name in walk.names(stretch, start))
        if place:
            block = list(itertools.islice(names, count))
            if _mark(block) != known:
                raise UserError(
                    f"files were added or taken away below {self.root} while it was read"
                )
            names = iter(block)
        captions, number = (
            class_captions(walk.classes, self.template),
            {name: i for i, name in enumerate(walk.classes)},
        )
        for row, name in enumerate(names, before):
            path = self._usable(name, walk.layout)
            told = (
                self._told(name)
                if walk.layout == "captions" and isinstance(path, Path)
                else (name, "", "")
            )
            if isinstance(path, str) or isinstance(told, str):
                yield Skipped(
                    str(self.root), shown(name), path if isinstance(path, str) else str(told)
                )
                continue
            key, caption, url = told
            label = number.get(name.partition("/")[0], -1)
            texts = (captions[label],) if label >= 0 else (caption,) if caption else ()
            yield StoredRecord(path, (key,), texts, label, str(self.root), name, 0, row, 0, url)

    def _usable(self, name: str, layout: Layout) -> Path | str:
        """Where a file lies, or why it is no record."""
        path = self.resolved(self.root, name)
        if path is None:
            return "link leaves the folder"
        if not _is_image(name):
            alone = layout == "captions" and name.endswith(BESIDE)
            return (
                "link to a folder, not followed"
                if path.is_dir()
                else "no image"
                if alone
                else "not an image by its name"
            )
        if not name.isprintable():
            return "unsafe name"
        return path if layout != "classes" or "/" in name else "not in a class folder"

    def _told(self, name: str) -> tuple[str, str, str] | str:
        """What stands beside an image: id, caption and address; or why it cannot be used."""
        held: dict[str, bytes] = {}
        for ending in BESIDE:
            beside = os.path.splitext(name)[0] + ending
            path = self.resolved(self.root, beside)
            if path is None:
                return f"link leaves the folder: {shown(beside)}"
            if not path.exists():
                continue
            try:
                held[ending[1:]] = read_file(path, TEXT_BYTES)
            except Unreadable as error:
                return f"caption cannot be read: {error}"
        fact = parse_metadata(Group(name, held, {}))
        if isinstance(fact, str):
            return fact
        try:
            caption = held.get("txt", b"").decode().strip() or fact.captions[0].strip()
        except UnicodeDecodeError:
            return "caption is not UTF-8"
        return (fact.id or name, caption, fact.url) if caption else "no caption"

    def resolved(self, _: Path, name: str) -> Path | None:
        """Where a path below the root leads, all links followed, when that is inside the root."""
        path, real = Path(os.path.realpath(self.root / name)), self.__dict__["_real"]
        return path if path.is_relative_to(real) else None

    def labels(self, names: Sequence[str]) -> Tensor | None:
        """int64 (N,): the classes of files, by their paths below the root; None where there are no classes."""
        number = {name: i for i, name in enumerate(self.classes)}
        return (
            torch.tensor([number.get(name.partition("/")[0], -1) for name in names])
            if number
            else None
        )


class FolderImages:
    """A folder's images by name: what `indexed.Files` is to tars. An offset is the record's row in `members`."""

    def __init__(self, folder: FolderSource, members: Sequence[str]) -> None:
        self.folder, self.paths, self.members = folder, folder.paths, members

    def read(self, _: int, offset: int, __: int) -> bytes:
        """The encoded image of a record."""
        path = self.folder.resolved(self.folder.root, self.members[offset])
        if path is None:
            raise Unreadable("link leaves the folder")
        return read_file(path)


def shown(name: str) -> str:
    """A name, fit to print."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _entries(root: Path, below: str, layout: Layout) -> tuple[list[str], list[str]]:
    """Names of a directory's files, captions' beside their images left out, and of its directories, sorted."""
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(root / below) as entries:
        for entry in entries:
            (folders if entry.is_dir(follow_symlinks=False) else files).append(entry.name)
    if layout == "captions":
        beside = {os.path.splitext(n)[0] for n in files if _is_image(n)}
        files = [n for n in files if not (n.endswith(BESIDE) and os.path.splitext(n)[0] in beside)]
        if not below:  # what img2dataset writes of a whole folder
            told = {f + e for f in folders for e in ("_stats.json", ".parquet")}
            files = [n for n in files if n not in told]
    return sorted(files), sorted(folders)


def _layout(root: Path) -> Layout:
    """What a folder looks like, see `Folder`."""
    folders = _entries(root, "", "flat")[1]
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            files, deeper = _entries(root, below, "flat")
        except OSError:  # the walk says so
            continue
        images, held = [n for n in files if _is_image(n)], set(files)
        if images:
            told = sum(any(os.path.splitext(n)[0] + e in held for e in BESIDE) for n in images)
            return "captions" if 2 * told >= len(images) else "classes" if folders else "flat"
        waiting += [_joined(below, n) for n in reversed(deeper) if below.count("/") < DEEPEST]
    return "classes" if folders else "flat"


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _joined(below: str, name: str) -> str:
    return f"{below}/{name}" if below else name


def _mark(names: Sequence[str]) -> int:
    """A number by which names that change are noticed."""
    return zlib.crc32("\0".join(names).encode("utf-8", "surrogateescape"))
