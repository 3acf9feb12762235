"""Triggers: patterns that are stamped on images. One method a file, each a `Trigger`."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Trigger(Protocol):
    """A function of an image and its record id, the same in training and at test time."""

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp the trigger on a batch of images.

        Args:
            images: the stored images, uint8 (N, 3, H, W). They are not changed.
            ids: N record ids, which decide random places.

        Returns:
            A new uint8 tensor of the same shape.

        Raises:
            UserError: if the trigger does not fit into the images, or its file is no trigger.
        """
        ...
