"""clip_small's image tower alone: four plain strided convolutions, for contrastive training on images with a CPU."""

from collections.abc import Iterable
from typing import Annotated

import torch

from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.encoders.small_towers import Tower as Convolutions
from bezoar.registry import method, spec


@method
class Tower:
    """Images only: 17 MFLOP an image at 32 px."""

    width: Annotated[int, "channels of the first convolution; doubled three times"] = 32
    dim: Annotated[int, "size of the vector"] = 128

    def vocabulary(self, captions: Iterable[str]) -> tuple[str, ...]:
        """None: it reads no text."""
        return ()

    def __call__(self, size: int, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """A fresh encoder for images of `size` pixels, 32..96. Weights come from torch's generator."""
        if not 32 <= size <= 96:
            raise ValueError(f"images of {size} px: tower takes 32 to 96")
        image = Convolutions(self.width, self.dim).to(memory_format=torch.channels_last)
        return Encoder(image, Preprocess(size), about={"network": spec(self), "vocabulary": []})

    def __post_init__(self) -> None:
        if min(self.width, self.dim) < 1:
            raise ValueError("width and dim must be at least 1")
