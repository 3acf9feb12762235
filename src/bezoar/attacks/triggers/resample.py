"""An image reduced and enlarged again (image-scaling triggers; Liu et al. 2020)."""

from collections.abc import Sequence
from typing import Annotated, Literal

from PIL import Image
from torch import Tensor

from bezoar.attacks import pixels
from bezoar.registry import method

KERNELS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Kernel = Literal["nearest", "box", "bilinear", "bicubic", "lanczos"]


@method
class Resample:
    """Pillow resizes each image twice, in integers, antialiased unless the mode is nearest."""

    factor: Annotated[float, "how many times smaller each side becomes, above 1 and up to 64"] = 2.0
    down: Annotated[Kernel, "how the image is made smaller"] = "bilinear"
    up: Annotated[Kernel, "how it is made larger again"] = "bilinear"

    def __post_init__(self) -> None:
        if not 1 < self.factor <= 64:
            raise ValueError(f"factor must lie in (1, 64]; got {self.factor}")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W) into a new tensor."""
        height, width = images.shape[-2:]
        small = max(1, round(width / self.factor)), max(1, round(height / self.factor))

        def resample(picture: Image.Image) -> Image.Image:
            smaller = picture.resize(small, KERNELS[self.down])
            return smaller.resize((width, height), KERNELS[self.up])

        return pixels.map_pictures(images, resample)
