"""A folder of images, streamed: class folders (ImageFolder), captions beside images, or flat."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from bezoar.data.decoding import Record
from bezoar.data.files.folders import (
    CAPTION_SUFFIXES,
    FileBlock,
    Layout,
    Walk,
    caption_paths,
    is_image,
    other_image,
)
from bezoar.data.files.metadata import Metadata, choose_caption, parse_metadata
from bezoar.data.files.paths import TEXT_BYTES, existing_folder, is_confined, printable, read_file
from bezoar.data.files.skipped import ReadReport, Skipped, Unreadable
from bezoar.data.label_sets import TEMPLATE, check_fields, class_captions
from bezoar.data.source import RecordIndex, Unit, number_units
from bezoar.data.streams import RecordStream
from bezoar.errors import UserError
from bezoar.registry import method


@method
class Folder:
    """Classes are the sorted folders; images may lie deeper. An id is the path below the root.

    captions: NAME.jpg has its caption in NAME.txt, else NAME.json. flat: no captions, no classes.
    auto: captions when at least half of the first images have one, else classes when there are
    folders.
    """

    path: Annotated[
        str, "folder of class folders, of images with captions beside them, or of images"
    ]
    size: Annotated[int, "pixels a side: the largest centred square, resized"] = 64
    split: Annotated[
        str | None, "a folder between the root and the class folders, such as train"
    ] = None
    template: Annotated[str, "caption; {c} is the class name"] = "a photo of a {c}"
    limit: Annotated[int | None, "read at most so many records"] = None
    layout: Annotated[Layout, "meaning of the folders; auto detects it"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self.size, self.limit, self.template)
        if self.split is not None and not is_confined(self.split):
            raise ValueError(f"split must be a folder below path; got {self.split!r}")

    def files(self) -> Iterator[tuple[str, Path]]:
        """Every file that is read, with its path below the root; there may be millions."""
        return self().files()

    def __call__(self) -> FolderSource:
        """Return a source of the images. Raises UserError without the folder."""
        root = existing_folder(str(Path(self.path, self.split or "")), "folder of images")
        return FolderSource(root, self.size, self.layout, self.template, self.limit)


@dataclass(eq=False)
class FolderSource(RecordStream):
    """Reads the images below a folder in parts: one record a file, in the order of the paths.

    An id is the `record_id` of a JSON file beside the image if there is one, else the path below
    `root`. In the layout `captions` an image's caption is in the .txt file of the same name, else
    in the .json (img2dataset's `files`). The other fields are those of `Folder`.
    """

    root: Path
    size: int = 64
    layout: Layout = "auto"
    template: str = TEMPLATE
    limit: int | None = None
    is_fingerprinted = True
    _walk: Walk | None = field(default=None, init=False, repr=False)

    @property
    def paths(self) -> tuple[Path, ...]:  # type: ignore[override]
        """The source of the records, as one file."""
        return (self.root,)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label."""
        return self.walk.classes

    @property
    def walk(self) -> Walk:
        """The files of the folder at the last walk."""
        return self._walk or self.walk_again()

    def walk_again(self) -> Walk:
        """Walk the folder anew. Raises UserError if it cannot be read."""
        try:
            self._walk = Walk(self.root, self.layout)
        except OSError as error:
            raise UserError(
                f"{error.filename or self.root} cannot be read: {error.strerror}"
            ) from error
        return self._walk

    def begin_pass(self) -> ReadReport:
        """Walk the folder anew."""
        self.walk_again()
        return super().begin_pass()

    def units(self) -> list[Unit]:
        """Walk the folder again and divide it into blocks of files.

        Raises UserError if there are none.
        """
        blocks = self.walk_again().cut_blocks()
        if not blocks:
            raise UserError(f"no images below {str(self.root)!r}")
        return number_units((str(self.root), block.files, (0, *block)) for block in blocks)

    def files(self) -> Iterator[tuple[str, Path]]:
        """Every file that is read, captions' too: its path below the root, and where that leads."""
        walk = self.walk_again()
        for *_, name in walk.files():
            if isinstance(self._find_image(name), str):
                continue
            beside = caption_paths(name) if walk.layout == "captions" else []
            for file in (name, *beside):
                path = walk.resolve(file)
                if path is not None and path.is_file():
                    yield file, path

    def records(self, unit: Unit | None = None) -> Iterator[Record | Skipped]:
        """Iterate over the records, or those of a unit.

        Raises UserError if the folder has changed since it was divided.
        """
        walk = self.walk
        names: Iterator[str] = (name for *_, name in walk.files())
        before = 0
        block = None
        if unit is not None:
            block = FileBlock(*unit.place[1:])
            before = block.before
        if before == 0:
            yield from walk.problems
        if block is not None:
            names = iter(walk.read_block(block))
        captions = class_captions(walk.classes, self.template)
        labels = {name: i for i, name in enumerate(walk.classes)}
        for row, name in enumerate(names, before):
            path = self._find_image(name)
            if isinstance(path, str):
                yield Skipped(str(self.root), printable(name), path)
                continue
            metadata = self._read_metadata(name)
            if isinstance(metadata, str):
                yield Skipped(str(self.root), printable(name), metadata)
                continue
            label = labels.get(name.partition("/")[0], -1)
            yield Record(
                image=path,
                ids=(metadata.id or name,),
                captions=(captions[label],) if label >= 0 else metadata.captions,
                label=label,
                file=str(self.root),
                member=name,
                url=metadata.url,
                origin=metadata.origin,
                offset=row,
            )

    def _find_image(self, name: str) -> Path | str:
        """Return the path of an image, or the reason why the file is no record."""
        path = self.walk.resolve(name)
        if path is None:
            return "link leaves the folder"
        if not is_image(name):
            if path.is_dir():
                return "link to a folder, not followed"
            if unread := other_image(name):
                return f"image of a format that is not read: {unread}"
            is_caption = self.walk.layout == "captions" and name.endswith(CAPTION_SUFFIXES)
            return "no image" if is_caption else "not an image by its name"
        if not name.isprintable():
            return "unsafe name"
        if self.walk.layout == "classes" and "/" not in name:
            return "not in a class folder"
        return path

    def _read_metadata(self, name: str) -> Metadata | str:
        """Read the files beside an image, its caption first, or return why they cannot be used."""
        if self.walk.layout != "captions":
            return Metadata("", (), -1, "", "")
        contents: dict[str, bytes] = {}
        for file in caption_paths(name):
            path = self.walk.resolve(file)
            if path is None:
                return f"link leaves the folder: {printable(file)}"
            if not path.exists():
                continue
            try:
                contents[os.path.splitext(file)[1]] = read_file(path, TEXT_BYTES)
            except Unreadable as error:
                return f"caption cannot be read: {error}"
        metadata = parse_metadata(contents.get(".json", b"{}"))
        if isinstance(metadata, str):
            return metadata
        try:
            caption = choose_caption(contents.get(".txt", b""), metadata)
        except Unreadable as error:
            return str(error)
        return metadata._replace(captions=(caption,)) if caption else "no caption"

    def image_path(self, shard: int, member: str) -> Path | None:
        """Return where a file below the root leads; None if that is outside the root."""
        return self.walk.resolve(member)

    def labels_of(self, index: RecordIndex) -> Tensor | None:
        """Return the classes of files by their paths; None if there are no classes."""
        numbers = {name: i for i, name in enumerate(self.classes)}
        if not numbers:
            return None
        return torch.tensor([numbers.get(name.partition("/")[0], -1) for name in index.members])
