"""Image-caption records streamed from webdataset tars in img2dataset's layout (Beaumont 2021), at any scale."""

from pathlib import Path
from typing import Annotated, Literal

from bezoar.data.decoding import check_fields
from bezoar.data.shards import LoadMode, expand_paths
from bezoar.data.shards import ShardSource as Source
from bezoar.registry import method


@method
class Shards:
    """`shards:"cc/{00000..00331}.tar"`: a path, a folder, a glob or a brace list."""

    path: Annotated[str, "tar, folder, glob, or brace list such as cc/{00000..00331}.tar"]
    size: Annotated[int, "pixels a side: the largest centred square, resized"] = 64
    captions: Annotated[
        Literal["first", "all"], "one record an image, or one a caption (id#0, id#1 ...)"
    ] = "first"
    limit: Annotated[int | None, "read at most so many records"] = None
    load: Annotated[
        LoadMode,
        "images in memory, or read when training draws them; auto: when they would fill half of it",
    ] = "auto"

    def __post_init__(self) -> None:
        check_fields(self.size, self.limit)

    def files(self) -> list[Path]:
        """What the records are read from."""
        return list(expand_paths(self.path))

    def __call__(self) -> Source:
        """-> bezoar.shards.Shards; `report` says what could not be read. Raises UserError when a tar is missing."""
        return Source(expand_paths(self.path), self.size, self.captions, self.limit, self.load)
