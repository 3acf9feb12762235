"""A pattern blended over the whole image (Chen et al. 2017, "Targeted backdoor attacks ...")."""

import functools
from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from bezoar.attacks import pixels
from bezoar.data.files import arrays
from bezoar.registry import method


@method
class Blend:
    """(1 - alpha) x + alpha pattern. CleanCLIP and its successors use alpha 0.2."""

    alpha: Annotated[float, "share of the pattern, above 0 and up to 1"] = 0.2
    pattern: Annotated[
        str, "noise (fixed by the seed, uniform per pixel), or a file: png, jpg, npy, npz, pt"
    ] = "noise"
    seed: Annotated[int, "of the noise"] = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1]; got {self.alpha}")
        if self.pattern != "noise" and not arrays.is_array_file(self.pattern):
            raise ValueError(
                f"pattern must be noise or a file of {', '.join(arrays.SUFFIXES)}; "
                f"got {self.pattern!r}"
            )

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W) into a new tensor."""
        height, width = images.shape[-2:]
        if self.pattern == "noise":
            pattern = _noise_pattern(self.seed, height, width)
        else:
            pattern = pixels.load_pattern(self.pattern, height, width)
        return pixels.blend(images, pattern, self.alpha)


@functools.lru_cache(maxsize=8)
def _noise_pattern(seed: int, height: int, width: int) -> Tensor:
    return pixels.uniform_noise(seed, "blend", 3, height, width) * 255
