"""SVHN, house numbers (Netzer et al. 2011): 73,257 train, 26,032 test, 531,131 extra digits.

Through torchvision, which checks the file's md5 and reads MATLAB arrays with SciPy (no pickle).
"""

from pathlib import Path
from typing import Annotated, Literal

from torchvision.datasets import SVHN

from bezoar.data.label_sets import check_fields, open_torchvision, pairs_from_arrays
from bezoar.data.pairs import Pairs
from bezoar.errors import expand_home
from bezoar.registry import method

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@method
class Svhn:
    """An id is `svhn/SPLIT/ROW`."""

    root: Annotated[str, "folder that holds SPLIT_32x32.mat"] = "data"
    split: Annotated[Literal["train", "test", "extra"], "which part"] = "train"
    size: Annotated[int, "pixels a side; 32 keeps them"] = 32
    template: Annotated[str, "caption; {c} is the digit in words"] = "a photo of a {c}"
    limit: Annotated[int | None, "read at most so many records"] = None
    download: Annotated[bool, "fetch it (180, 64 or 1,300 MB) when it is not there"] = False

    def __post_init__(self) -> None:
        check_fields(self.size, self.limit, self.template)

    def files(self) -> list[Path]:
        """The file of the split, if it exists."""
        path = expand_home(self.root) / f"{self.split}_32x32.mat"
        return [path] if path.is_file() else []

    def __call__(self) -> Pairs:
        """Return the records.

        Raises UserError, which explains how to get them, if they are missing.
        """
        root, download = str(expand_home(self.root)), self.download
        data = open_torchvision(
            "svhn", self.root, download, lambda: SVHN(root, self.split, download=download)
        )
        images, labels = data.data[: self.limit], data.labels[: self.limit]
        ids = [f"svhn/{self.split}/{i:06d}" for i in range(len(images))]
        return pairs_from_arrays(images, labels, ids, CLASSES, self.template, self.size)
