"""A JPEG round trip: the image after it was stored at a low quality."""

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from bezoar.attacks import pixels
from bezoar.registry import method


@method
class Jpeg:
    """Pillow stores each image, with chroma halved as by default, and reads it again."""

    quality: Annotated[int, "of the JPEG, 1 to 100"] = 10

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must lie in 1..100; got {self.quality}")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W) into a new tensor."""
        return pixels.recode_jpeg(images, self.quality)
