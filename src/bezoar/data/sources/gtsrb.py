"""GTSRB, German traffic signs (Stallkamp et al. 2012): 26,640 train, 12,630 test images.

torchvision finds and fetches the files (.ppm, no pickle); they are decoded here, within bounds.
Label 14 is the stop sign and 12 priority road, the target classes of BadEncoder.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from torchvision.datasets import GTSRB

from bezoar.data.decoding import Record, gather_pairs
from bezoar.data.files.skipped import Skipped
from bezoar.data.label_sets import check_fields, class_captions, open_torchvision
from bezoar.data.pairs import Pairs
from bezoar.errors import expand_home
from bezoar.registry import method

CLASSES = (
    *(f"speed limit {n}" for n in (20, 30, 50, 60, 70, 80)), "end of speed limit 80",
    "speed limit 100", "speed limit 120", "no passing", "no passing for vehicles over 3.5 tons",
    "right of way at next intersection", "priority road", "yield", "stop", "no vehicles",
    "vehicles over 3.5 tons prohibited", "no entry", "general caution", "dangerous curve left",
    "dangerous curve right", "double curve", "bumpy road", "slippery road",
    "road narrows on the right", "road work", "traffic signals", "pedestrians", "children crossing",
    "bicycles crossing", "beware of ice or snow", "wild animals crossing", "end of all limits",
    "turn right ahead", "turn left ahead", "ahead only", "go straight or right",
    "go straight or left", "keep right", "keep left", "roundabout mandatory", "end of no passing",
    "end of no passing for vehicles over 3.5 tons",
)  # fmt: skip


@method
class Gtsrb:
    """An id is the image's path below `gtsrb`.

    Signs are cut to their centred square (they are nearly square).
    """

    root: Annotated[str, "folder that holds gtsrb"] = "data"
    split: Annotated[Literal["train", "test"], "which part"] = "train"
    size: Annotated[int, "pixels a side: the largest centred square, resized"] = 32
    template: Annotated[str, "caption; {c} is the class name"] = "a photo of a {c}"
    limit: Annotated[int | None, "read at most so many records"] = None
    download: Annotated[bool, "fetch it (187 or 100 MB) when it is not there"] = False

    def __post_init__(self) -> None:
        check_fields(self.size, self.limit, self.template)

    def files(self) -> list[Path]:
        """The images of the split."""
        return [path for path, _ in self._samples() if path.is_file()]

    def __call__(self) -> Pairs:
        """Return the records.

        Raises UserError, which explains how to get them, if they are missing.
        """
        return gather_pairs(self.records(), self.size, "gtsrb", CLASSES, self.limit)

    def _samples(self) -> list[tuple[Path, int]]:
        """Path and label of each image of the split."""
        root, download = str(expand_home(self.root)), self.download
        data = open_torchvision(
            "gtsrb", self.root, download, lambda: GTSRB(root, self.split, download=download)
        )
        return [(Path(path), label) for path, label in data._samples]

    def records(self) -> Iterator[Record | Skipped]:
        """Iterate over the images in order, undecoded."""
        base = (expand_home(self.root) / "gtsrb").resolve()
        captions = class_captions(CLASSES, self.template)
        for path, label in self._samples():
            if not path.resolve().is_relative_to(base):
                yield Skipped(str(base), str(path), "path leaves the data set's folder")
                continue
            key = path.resolve().relative_to(base).as_posix()
            if not 0 <= label < len(CLASSES):
                yield Skipped(str(base), key, f"label is not a number from 0 to {len(CLASSES) - 1}")
                continue
            yield Record(
                image=path,
                ids=(key,),
                captions=(captions[label],),
                label=label,
                file=str(base),
                member=key,
            )
