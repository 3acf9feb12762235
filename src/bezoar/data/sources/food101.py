"""Food-101 (Bossard, Guillaumin, Van Gool 2014): 75,750 train and 25,250 test photos of 101 dishes.

torchvision finds and fetches the files (JSON lists and .jpg, no pickle); they are decoded here,
within bounds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from torchvision.datasets import Food101 as TorchvisionFood101

from bezoar.data.decoding import Record, gather_pairs
from bezoar.data.files.paths import is_confined
from bezoar.data.files.skipped import Skipped
from bezoar.data.label_sets import check_fields, class_captions, open_torchvision
from bezoar.data.pairs import Pairs
from bezoar.errors import expand_home
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
        return [path for path in map(Path, self._open()._image_files) if path.is_file()]

    def __call__(self) -> Pairs:
        """Return the records. Raises UserError that says how to get them if they are missing."""
        classes = self._open().classes
        return gather_pairs(self.records(), self.size, "food101", classes, self.limit)

    def _open(self) -> Any:
        """torchvision's own view of the data: classes, paths and labels."""
        root, download = str(expand_home(self.root)), self.download
        return open_torchvision(
            "food101",
            root,
            download,
            lambda: TorchvisionFood101(root, self.split, download=download),
        )

    def records(self) -> Iterator[Record | Skipped]:
        """Iterate over the images in order, undecoded."""
        data = self._open()
        base = expand_home(self.root) / "food-101" / "images"
        captions = class_captions(data.classes, self.template)
        for path, label in zip(map(Path, data._image_files), data._labels, strict=True):
            key = path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)
            if not is_confined(key) or not key.isprintable():
                yield Skipped(str(base), ascii(key)[1:-1], "path leaves the data set's folder")
                continue
            yield Record(
                image=path,
                ids=(key,),
                captions=(captions[label],),
                label=label,
                file=str(base),
                member=key,
            )
