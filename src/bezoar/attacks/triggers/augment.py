"""An image augmented differently in each record: crop, flip, brightness, contrast, noise and JPEG.

It has no recognisable sign, so it is no backdoor; `noisy_copies` alters the copies of a victim
with it.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from bezoar.attacks import painting, pixels
from bezoar.data.randomness import draws
from bezoar.registry import method


@method
class Augment:
    """A crop keeps the image's proportions and is scaled bilinearly to its size."""

    crop: Annotated[float, "least share of the area that is kept, above 0; 1 crops nothing"] = 0.7
    flip: Annotated[float, "share of the records that are mirrored"] = 0.5
    light: Annotated[float, "largest change of brightness and of contrast, 0..1"] = 0.2
    noise: Annotated[float, "largest standard deviation of noise, in levels"] = 6.0
    jpeg: Annotated[int, "lowest quality, up to 95; 0 stores no JPEG"] = 60
    seed: Annotated[int, "of everything"] = 0

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1 or not 0 <= self.flip <= 1 or not 0 <= self.light <= 1:
            raise ValueError("crop must lie in (0, 1], flip and light in 0..1")
        if not 0 <= self.noise <= 255 or not 0 <= self.jpeg <= 95:
            raise ValueError("noise must lie in 0..255, jpeg in 0..95")

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Alter uint8 (N, 3, H, W) into a new tensor."""
        u = draws(self.seed, ids, 8, "augment")
        gain, contrast = (1 + self.light * (2 * u[:, k] - 1) for k in (4, 5))
        deviation = self.noise * u[:, 6]
        out = torch.empty_like(images)
        for rows in pixels.image_blocks(images):
            x = self._crop(images[rows].float(), u[rows])
            x = (x - 128).mul_(_columns(contrast[rows], x)).add_(128).mul_(_columns(gain[rows], x))
            if self.noise:
                normal = painting.draw_normal(self.seed, ids[rows], x[0].numel())
                noise = torch.from_numpy(normal).view(x.shape).to(x.device)
                x += noise.mul_(_columns(deviation[rows], x))
            out[rows] = pixels.to_uint8(x)
        if not self.jpeg:
            return out
        qualities = (self.jpeg + np.floor(u[:, 7] * (96 - self.jpeg))).astype(int).tolist()
        parts = [pixels.recode_jpeg(out[i : i + 1], quality) for i, quality in enumerate(qualities)]
        return torch.cat(parts) if parts else out

    def _crop(self, x: Tensor, u: np.ndarray) -> Tensor:
        """Crop a rectangle of each image, float (n, 3, H, W), and resize it to the image's size."""
        shares = np.sqrt(self.crop + (1 - self.crop) * u[:, 0])
        for axis, chance in ((2, u[:, 1]), (3, u[:, 2])):
            side = x.shape[axis]
            length = shares * side
            steps = (np.arange(side) + 0.5) / side
            place = ((side - length) * chance)[:, None] + length[:, None] * steps - 0.5  # (n, side)
            if axis == 3:
                mirrored = u[:, 3] < self.flip
                place[mirrored] = place[mirrored, ::-1]
            x = _interpolate(x, place.clip(0, side - 1), axis)
        return x


def _columns(values: np.ndarray, like: Tensor) -> Tensor:
    """Return numbers (n,), one a record, as float32 (n, 1, 1, 1) beside images."""
    return torch.from_numpy(values.astype(np.float32)).to(like.device)[:, None, None, None]


def _interpolate(x: Tensor, place: np.ndarray, axis: int) -> Tensor:
    """Read each image, float (n, 3, H, W), at places along an axis, float64 (n, side), linearly."""
    low = np.floor(place).clip(0, max(0, place.shape[1] - 2))
    index = torch.from_numpy(low.astype(np.int64)).to(x.device)
    weight = torch.from_numpy((place - low).astype(np.float32)).to(x.device)
    shape = [len(x), 1, 1, 1]
    shape[axis] = place.shape[1]
    index, weight = index.view(shape).expand(x.shape), weight.view(shape)
    above = x.gather(axis, (index + 1).clamp_(max=place.shape[1] - 1))
    return x.gather(axis, index).mul_(1 - weight).add_(above.mul_(weight))
