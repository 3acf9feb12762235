"""One image file as the one record of a data set: a reference input, say."""

from pathlib import Path
from typing import Annotated

from bezoar.data.decoding import Record, check_fields, gather_pairs
from bezoar.data.files.paths import existing_file
from bezoar.data.pairs import Pairs
from bezoar.registry import method


@method
class Image:
    """The id is the file's name. No caption and no class."""

    path: Annotated[str, "jpg, png, webp, bmp or ppm"]
    size: Annotated[
        int | None, "pixels a side: the largest centred square, resized; none keeps them"
    ] = None

    def __post_init__(self) -> None:
        check_fields(self.size, None)

    def files(self) -> list[Path]:
        """The file."""
        return [existing_file(self.path, "image file")]

    def __call__(self) -> Pairs:
        """-> Pairs of one record. Raises UserError for what is no image."""
        path = existing_file(self.path, "image file")
        return gather_pairs(
            [Record(path, (path.name,), (), -1, self.path, "")], self.size, self.path
        )
