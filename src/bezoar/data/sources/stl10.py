"""STL-10 (Coates, Ng, Lee 2011): 5,000 train, 8,000 test, 100,000 unlabelled 96x96 images.

Through torchvision, which checks every file's md5 and reads plain bytes (no pickle).
"""

from pathlib import Path
from typing import Annotated, Literal

from torchvision.datasets import STL10

from bezoar.data.label_sets import check_fields, open_torchvision, pairs_from_arrays
from bezoar.data.pairs import Pairs
from bezoar.errors import expand_home
from bezoar.registry import method

CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


@method
class Stl10:
    """An id is `stl10/SPLIT/ROW`. The unlabelled split has labels -1 and no captions."""

    root: Annotated[str, "folder that holds stl10_binary"] = "data"
    split: Annotated[Literal["train", "test", "unlabeled"], "which part"] = "train"
    size: Annotated[int, "pixels a side; 96 keeps them"] = 96
    template: Annotated[str, "caption; {c} is the class name"] = "a photo of a {c}"
    limit: Annotated[int | None, "read at most so many records"] = None
    download: Annotated[bool, "fetch it (2.6 GB) when it is not there"] = False

    def __post_init__(self) -> None:
        check_fields(self.size, self.limit, self.template)

    def files(self) -> list[Path]:
        """The files of the split that exist."""
        folder = expand_home(self.root) / "stl10_binary"
        paths = (folder / f"{self.split}_X.bin", folder / f"{self.split}_y.bin")
        return [p for p in paths if p.is_file()]

    def __call__(self) -> Pairs:
        """Return the records.

        Raises UserError, which explains how to get them, if they are missing.
        """
        root, download = str(expand_home(self.root)), self.download
        data = open_torchvision(
            "stl10", self.root, download, lambda: STL10(root, self.split, download=download)
        )
        images = data.data[: self.limit]
        labels = data.labels[: self.limit].astype("int64")
        # torchvision's "0 - 1" is 255, since labels are bytes.
        labels[(labels < 0) | (labels >= len(CLASSES))] = -1
        ids = [f"stl10/{self.split}/{i:06d}" for i in range(len(images))]
        return pairs_from_arrays(images, labels, ids, CLASSES, self.template, self.size)
