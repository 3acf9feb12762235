"""A folder of class folders of images (the layout of torchvision's ImageFolder), captioned from the class names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from bezoar.errors import UserError
from bezoar.pairs import Pairs
from bezoar.reading import (
    SUFFIXES,
    Record,
    Skipped,
    check_fields,
    confined,
    existing_folder,
    gather,
    phrases,
)
from bezoar.registry import method


@method
class Folder:
    """Classes are the folders in sorted order; images may lie deeper in them. An id is the path below the root."""

    path: Annotated[str, "folder of class folders"]
    size: Annotated[int, "pixels a side: the largest centred square, resized"] = 64
    split: Annotated[str | None, "a folder between the root and the class folders, such as train"] = None
    template: Annotated[str, "caption; {c} is the class name"] = "a photo of a {c}"
    limit: Annotated[int | None, "read at most so many records"] = None

    def __post_init__(self) -> None:
        check_fields(self.size, self.limit, self.template)
        if self.split is not None and not confined(self.split):
            raise ValueError(f"split must be a folder below path; got {self.split!r}")

    def files(self) -> list[Path]:
        """Every file of the class folders."""
        return [p for folder in self.classes() for p in sorted(folder.rglob("*")) if p.is_file()]

    def __call__(self) -> Pairs:
        """-> Pairs; `report` names each file that could not be read. Raises UserError when none can."""
        folders = self.classes()
        return gather(self.records(folders), self.size, self.path, [f.name for f in folders], self.limit)

    def root(self) -> Path:
        """The folder that holds the class folders. Raises UserError when it is not there."""
        return existing_folder(str(Path(self.path, self.split or "")), "folder of class folders")

    def classes(self) -> list[Path]:
        """The class folders, sorted by name."""
        found = sorted(p for p in self.root().iterdir() if p.is_dir())
        if not found:
            raise UserError(f"{str(self.root())!r} holds no class folders")
        return found

    def records(self, folders: list[Path]) -> Iterator[Record | Skipped]:
        """The files in order, not opened yet."""
        root = self.root()
        for path in sorted(p for p in root.iterdir() if not p.is_dir()):
            yield Skipped(self.path, path.name, "not in a class folder")
        captions = phrases([f.name for f in folders], self.template)
        for label, folder in enumerate(folders):
            files = [p for p in sorted(folder.rglob("*")) if not p.is_dir()]
            if not files:
                yield Skipped(self.path, folder.name, "no file in the class folder")
            for path in files:
                key = path.relative_to(root).as_posix()
                if path.suffix.lower() not in SUFFIXES:
                    yield Skipped(self.path, ascii(key)[1:-1], "not an image by its name")
                elif not key.isprintable():
                    yield Skipped(self.path, ascii(key)[1:-1], "unsafe name")
                else:
                    yield Record(path, (key,), (captions[label],), label, self.path, key)
