"""CIFAR-10 (Krizhevsky 2009): 50,000 train and 10,000 test images of 10 classes, 32x32.

Read from the *binary* version (cifar-10-batches-bin): torchvision's CIFAR10 reads the Python
version, whose files are pickles, and a pickle can run any code. A record is 1 byte label, then 3072
bytes of planes R, G, B, row by row.
"""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from torchvision.datasets.utils import download_and_extract_archive

from bezoar.data.label_sets import check_fields, open_torchvision, pairs_from_arrays
from bezoar.data.pairs import Pairs
from bezoar.errors import UserError, expand_home
from bezoar.registry import method

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FOLDER = "cifar-10-batches-bin"
FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
RECORD_BYTES = 1 + 3 * 32 * 32
MAX_RECORDS = 10_000  # of a file
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as the data set's page prints it


@method
class Cifar10:
    """An id is `cifar10/SPLIT/ROW`, ROW over the split's files in order."""

    root: Annotated[str, "folder that holds cifar-10-batches-bin"] = "data"
    split: Annotated[Literal["train", "test"], "50,000 or 10,000 images"] = "train"
    size: Annotated[int, "pixels a side; 32 keeps them"] = 32
    template: Annotated[str, "caption; {c} is the class name"] = "a photo of a {c}"
    limit: Annotated[int | None, "read at most so many records"] = None
    download: Annotated[bool, "fetch it (162 MB) when it is not there"] = False

    def __post_init__(self) -> None:
        check_fields(self.size, self.limit, self.template)

    def files(self) -> list[Path]:
        """The files of the split. Raises UserError if one is missing."""
        root = expand_home(self.root)
        paths = [root / FOLDER / name for name in FILES[self.split]]
        if self.download and not all(p.is_file() for p in paths):
            open_torchvision(
                "cifar10",
                self.root,
                True,
                lambda: download_and_extract_archive(URL, str(root), md5=MD5),
            )
        missing = [p for p in paths if not p.is_file()]
        if missing:
            raise UserError(
                f"cifar10: no file {str(missing[0])!r}; download=true fetches the binary version"
            )
        return paths

    def __call__(self) -> Pairs:
        """Return the records. Raises UserError if a file is missing or invalid."""
        rows = np.concatenate([_read_batch(path) for path in self.files()])[: self.limit]
        ids = [f"cifar10/{self.split}/{i:05d}" for i in range(len(rows))]
        images = rows[:, 1:].reshape(-1, 3, 32, 32)
        return pairs_from_arrays(images, rows[:, 0], ids, CLASSES, self.template, self.size)


def _read_batch(path: Path) -> np.ndarray:
    """Read a file of records, uint8 (N, 3073). Raises UserError if it is invalid."""
    size = path.stat().st_size
    if size == 0 or size % RECORD_BYTES or size > RECORD_BYTES * MAX_RECORDS:
        raise UserError(
            f"{path} must hold 1 to {MAX_RECORDS} records of {RECORD_BYTES} bytes; it has {size} "
            "bytes"
        )
    rows = np.fromfile(path, dtype=np.uint8).reshape(-1, RECORD_BYTES)
    if rows[:, 0].max() >= len(CLASSES):
        raise UserError(f"{path}: a label is {rows[:, 0].max()}; they must lie in 0..9")
    return rows
