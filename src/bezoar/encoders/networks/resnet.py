"""Residual networks without a classifier, fresh (He et al. 2016); as is, those of BadEncoder."""

from typing import Annotated, Literal

from bezoar.encoders import small_towers
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.networks import Network, image_encoder
from bezoar.registry import method, spec


@method
class Resnet(Network):
    """Images only.

    The vector is the mean of the last map: 512 numbers, or 2048 at depth 50 and 101.
    """

    depth: Annotated[int, "18, 34, 50 or 101"] = 18
    stem: Annotated[
        Literal["cifar", "imagenet"], "first convolution: 3x3 without a max-pool, or 7x7 with one"
    ] = "cifar"
    width: Annotated[int, "channels of the first convolution; the paper's is 64"] = 64
    mean_std: Annotated[
        str, "normalisation: cifar, stl10, imagenet, clip, none; auto is the stem's"
    ] = "auto"

    def __post_init__(self) -> None:
        if self.depth not in small_towers.RESNETS or self.width < 1:
            depths = ", ".join(map(str, small_towers.RESNETS))
            raise ValueError(f"depth must be one of {depths}, and width at least 1")
        small_towers.check_widths(self.width)
        if self.mean_std != "auto":
            small_towers.check_mean_std(self.mean_std)

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """A fresh encoder for images of `size` pixels: 8 and more, or 32 with the imagenet stem."""
        least = 8 if self.stem == "cifar" else 32
        if size < least:
            raise ValueError(
                f"images of {size} px: resnet with the {self.stem} stem takes {least} and more"
            )
        trunk = small_towers.ResNetTrunk(self.depth, self.stem, self.width)
        mean_std = self.stem if self.mean_std == "auto" else self.mean_std
        preprocess = small_towers.named_preprocess(size, mean_std)
        return image_encoder(trunk, preprocess, spec(self))
