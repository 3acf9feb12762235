"""Trained trunks, locked, and two linear maps into one space (LiT, Zhai et al. 2022)."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from bezoar import registry
from bezoar.encoders import small_towers
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.locked_towers import LockedTower
from bezoar.encoders.networks import Network
from bezoar.registry import method, spec


@method
class Lit(Network):
    """An image-text encoder of two published ones:
    `lit:image=(weights:path=F,size=128),text=(sentence:path=DIR)`.

    Training fits the maps alone. With `clip:shift=0`, which changes no image, each image and
    caption passes its trunk once, and the training reads the vectors; any augmentation, and
    `unlocked`, make the trunks run in each step. The run holds the weights of both trunks, and
    needs their files no more.
    """

    image: Annotated[str, "spec of the network whose image tower is the image trunk"]
    text: Annotated[str, "spec of the network whose text tower is the text trunk"]
    dim: Annotated[int, "size of the joint embedding"] = 256
    unlocked: Annotated[int, "last blocks of the image trunk that are trained too"] = 0

    def __post_init__(self) -> None:
        if self.dim < 1 or self.unlocked < 0:
            raise ValueError("dim must be at least 1, and unlocked at least 0")
        small_towers.check_widths(1, self.dim)

    def parts(self) -> tuple[Any, Any]:
        """The networks of the trunks, image and text. Raises UserError for no such networks."""
        return registry.make("network", self.image), registry.make("network", self.text)

    def files(self) -> list[Path]:
        """The files of both trunks."""
        return [path for part in self.parts() if hasattr(part, "files") for path in part.files()]

    def vocabulary(self, captions: Iterable[str]) -> tuple[str, ...]:
        """The vocabulary of the text trunk."""
        vocabulary: tuple[str, ...] = self.parts()[1].vocabulary(captions)
        return vocabulary

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder; its maps are fresh.

        Raises ValueError without a size, and for trunks that do not read images and texts.
        """
        if size < 1:
            raise ValueError("the maps of its trunks are fresh")
        image_part, text_part = self.parts()
        images: Encoder = image_part(size, ())
        texts: Encoder = text_part(size, vocabulary)
        if not images.reads_images or texts.text is None or texts.tokenizer is None:
            raise ValueError("image must be a network that reads images, and text one with texts")
        side = images.preprocess.size
        width = measure_width(images.image, torch.zeros(1, 3, side, side))
        text_width = measure_width(texts.text, texts.tokenizer(["a"]))
        this: Any = self
        fresh = replace(this, image=images.about["network"], text=texts.about["network"])
        about = {"network": spec(fresh), "vocabulary": texts.about["vocabulary"]}
        if imported := [e.about["imported"] for e in (images, texts) if "imported" in e.about]:
            about["imported"] = {
                key: " and ".join(one[key] for one in imported) for key in ("file", "what")
            } | {key: [x for one in imported for x in one[key]] for key in ("assumed", "left_out")}
            about["imported"]["layout"] = "lit"
            about["imported"]["left_out"] += ["the head"] if images.head is not None else []
        if any(encoder.about.get("poisoned") for encoder in (images, texts)):
            about["poisoned"] = True
        return Encoder(
            LockedTower(images.image, width, self.dim, self.unlocked),
            images.preprocess,
            LockedTower(texts.text, text_width, self.dim),
            texts.tokenizer,
            about,
        )


@torch.no_grad()
def measure_width(trunk: nn.Module, x: torch.Tensor) -> int:
    """The size of a trunk's vector of one input."""
    return int(trunk.eval()(x).shape[-1])
