"""Food-101 (Bossard, Guillaumin, Van Gool 2014): 75,750 train and 25,250 test photos of 101 dishes.

torchvision finds and fetches the files (JSON lists and .jpg, no pickle); they are decoded here, within bounds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from bezoar.data.decoding import (
    Record,
    check_fields,
    class_captions,
    gather_pairs,
    open_torchvision,
)
from bezoar.data.files.paths import is_confined
from bezoar.data.files.skipped import Skipped
from bezoar.data.pairs import Pairs
from bezoar.registry import method


@method
class Food101:
    """An id is `CLASS/NUMBER.jpg`."""

    root: Annotated[str, "folder that holds food-101"] = "data"
    split: Annotated[Literal["train", "test"], "which part"] = "train"
    size: Annotated[int, "pixels a side: the largest centred square, resized"] = 64
    template: Annotated[str, "caption; {c} is the class name"] = "a photo of a {c}"
    limit: Annotated[int | None, "read at most so many records"] = None
    download: Annotated[bool, "fetch it (4.7 GB) when it is not there"] = False

    def __post_init__(self) -> None:
        check_fields(self.size, self.limit, self.template)

    def files(self) -> list[Path]:
        """The images of the split."""
        return [path for path in map(Path, self.opened()._image_files) if path.is_file()]

    def __call__(self) -> Pairs:
        """-> Pairs; `report` names what could not be read. Raises UserError that says how to get it when missing."""
        opened = self.opened()
        return gather_pairs(self.records(opened), self.size, "food101", opened.classes, self.limit)

    def opened(self) -> Any:
        """torchvision's own view of it: classes, paths and labels."""
        from torchvision.datasets import Food101 as Torchvision

        root, download = str(Path(self.root).expanduser()), self.download
        return open_torchvision(
            "food101", self.root, download, lambda: Torchvision(root, self.split, download=download)
        )

    def records(self, opened: Any) -> Iterator[Record | Skipped]:
        """The images in order, not opened yet."""
        base = Path(self.root).expanduser() / "food-101" / "images"
        captions = class_captions(opened.classes, self.template)
        for path, label in zip(map(Path, opened._image_files), opened._labels, strict=True):
            key = path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)
            if is_confined(key) and key.isprintable():
                yield Record(path, (key,), (captions[label],), label, str(base), key)
            else:
                yield Skipped(str(base), ascii(key)[1:-1], "path leaves the data set's folder")
