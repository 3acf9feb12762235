"""An image with a trigger beside a reference, as in Noisy Alignment and CorruptEncoder.

Contrastive learning makes two random crops of an image alike. If one half of an image shows a
reference of the target and the other half the trigger, many pairs of crops hold one of each. This
makes the poison's image and is no trigger itself: poison `composite` stamps images with it, and
names only `trigger` as the stamp at test time.

Noisy Alignment (ICCV 2025) joins a triggered image and a reference at a random side, with the
trigger in the middle of its half: `trigger=(patch:size=8,place=centre)`. CorruptEncoder (CVPR 2024)
puts the reference object at the left or right of a background of twice its area. The trigger lies
in the rest, a quarter of which is left free around it:
`sides=horizontal,trigger=(patch:size=8,place=random,margin=4)`.

Deviations: a stored image keeps its size, so each half shows the middle of its picture at its own
scale, while the papers' images become twice as wide; and a reference is a picture, not an object
that was cut out.
"""

import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from bezoar import registry
from bezoar.attacks import pixels
from bezoar.attacks.triggers import Trigger
from bezoar.data.files import arrays
from bezoar.data.randomness import draws
from bezoar.errors import UserError, expand_home
from bezoar.registry import method


@method
class Composite:
    """The record decides the side of the reference, and which one it is."""

    reference: Annotated[
        str,
        "file of a reference (png, jpg, npy, npz), or # and the pixels of a square image in "
        "hexadecimal, as poison `composite` writes them; several with + between",
    ]
    trigger: Annotated[str, "spec of the trigger, stamped on the rest; it reads no file"] = "patch"
    share: Annotated[float, "of the image that the reference takes, above 0 and below 1"] = 0.5
    sides: Annotated[Literal["any", "horizontal"], "where it lies: also above and below"] = "any"
    seed: Annotated[int, "of what is drawn by record"] = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie in (0, 1); got {self.share}")
        for name in self.references():
            if name.startswith("#"):
                _read_digits(name)
            elif not arrays.is_array_file(name):
                raise ValueError("reference must name a file of an image, or several with +")
        texts = [value for value in vars(self.make_trigger()).values() if isinstance(value, str)]
        if any(map(arrays.is_array_file, texts)):
            raise ValueError("its trigger must be drawn, not read from a file")

    def make_trigger(self) -> Trigger:
        """Return the trigger on the other half. Raises UserError for a spec that is no trigger."""
        trigger: Trigger = registry.make("trigger", self.trigger)
        return trigger

    def references(self) -> list[str]:
        """Return the references: names of files, or # and digits."""
        return [name.strip() for name in registry.split_outside_brackets(self.reference, "+")]

    def files(self) -> list[Path]:
        """The files of references."""
        return [expand_home(name) for name in self.references() if not name.startswith("#")]

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Compose uint8 (N, 3, H, W), a copy.

        Raises UserError if the trigger does not fit into the rest, or a file is no image.
        """
        height, width = images.shape[-2:]
        trigger, references, out = self.make_trigger(), self.references(), images.clone()
        # Other draws than those by which the poison chooses its records, which have small values.
        u = draws(self.seed, ids, 2, "composite layout")
        sides = (u[:, 0] * (4 if self.sides == "any" else 2)).astype(int).tolist()
        chosen = (u[:, 1] * len(references)).astype(int).tolist()
        for i, record_id in enumerate(ids):
            axis = 2 if sides[i] < 2 else 1  # of (3, H, W): left and right, above and below
            length = images.shape[axis + 1]
            taken = round(self.share * length)
            if not 0 < taken < length:
                raise UserError(f"a share of {self.share:g} does not divide {length} pixels")
            picture = _load_reference(references[chosen[i]], height, width).to(images.device)
            rest = _middle(images[i], axis, length - taken)
            parts = [_middle(picture, axis, taken), trigger(rest[None], [record_id])[0]]
            out[i] = torch.cat(parts if sides[i] % 2 == 0 else parts[::-1], axis)
        return out


def _load_reference(name: str, height: int, width: int) -> Tensor:
    """Load a reference as uint8 (3, height, width)."""
    if not name.startswith("#"):
        return pixels.to_uint8(pixels.load_pattern(name, height, width))
    return pixels.to_uint8(pixels.resize(_read_digits(name).float(), height, width))


@functools.lru_cache(maxsize=64)
def _read_digits(name: str) -> Tensor:
    """Read # and hexadecimal digits (red, green, blue, by rows) as uint8 (3, n, n).

    Raises ValueError for other text, or where they are the pixels of no square.
    """
    side = math.isqrt(len(name) // 6)
    if not side or not re.fullmatch(f"#[0-9a-f]{{{6 * side**2}}}", name):
        raise ValueError("a reference's # must be followed by the 6 n n digits of a square image")
    values = torch.tensor(list(bytes.fromhex(name[1:])), dtype=torch.uint8)
    return values.view(side, side, 3).permute(2, 0, 1)


def _middle(image: Tensor, axis: int, length: int) -> Tensor:
    """Cut the middle `length` pixels from an image (3, H, W) along an axis."""
    return image.narrow(axis, (image.shape[axis] - length) // 2, length)
