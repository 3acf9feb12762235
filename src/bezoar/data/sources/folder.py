"""A folder of images, streamed: class folders (torchvision's ImageFolder), captions beside images (img2dataset), or flat."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from bezoar.data.decoding import check_fields
from bezoar.data.files.paths import existing_folder, is_confined
from bezoar.data.folders import FolderSource as Source
from bezoar.data.folders import Layout
from bezoar.registry import method


@method
class Folder:
    """Classes are the folders in sorted order; images may lie deeper in them. An id is the path below the root.

    captions: NAME.jpg has its caption in NAME.txt, else NAME.json. flat: no captions, no classes. auto: captions when at
    least half of the first images have one, else classes when there are folders.
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
    layout: Annotated[Layout, "what the folders are; auto looks"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self.size, self.limit, self.template)
        if self.split is not None and not is_confined(self.split):
            raise ValueError(f"split must be a folder below path; got {self.split!r}")

    def files(self) -> Iterator[tuple[str, Path]]:
        """Every file that is read, with its path below the root; one after another, since they may be millions."""
        return self().files()

    def __call__(self) -> Source:
        """-> bezoar.data.folders.Folder; `report` says what could not be read. Raises UserError without the folder."""
        root = existing_folder(str(Path(self.path, self.split or "")), "folder of images")
        return Source(root, self.size, self.layout, self.template, self.limit)
