"""One image file as a data set with one record, for example a reference input."""

from pathlib import Path
from typing import Annotated

from bezoar.data.decoding import Record, gather_pairs
from bezoar.data.files.paths import existing_file
from bezoar.data.label_sets import check_fields
from bezoar.data.pairs import Pairs
from bezoar.registry import method


@method
class Image:
    """The id is the file's name. There is no caption and no class."""

    path: Annotated[str, "jpg, png, webp, bmp, ppm, gif or tif"]
    size: Annotated[
        int | None, "pixels a side: the largest centred square, resized; none keeps them"
    ] = None

    def __post_init__(self) -> None:
        check_fields(self.size, None)

    def files(self) -> list[Path]:
        """The file."""
        return [existing_file(self.path, "image file")]

    def __call__(self) -> Pairs:
        """Return the one record. Raises UserError if the file is no image."""
        path = existing_file(self.path, "image file")
        record = Record(image=path, ids=(path.name,), file=self.path)
        return gather_pairs([record], self.size, self.path)
