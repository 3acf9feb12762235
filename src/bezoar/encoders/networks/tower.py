"""clip_small's image tower alone, for contrastive training on images with a CPU."""

from typing import Annotated

from bezoar.encoders import small_towers
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.encoders.networks import Network, image_encoder
from bezoar.registry import method, spec


@method
class Tower(Network):
    """Images only: 17 MFLOP an image at 32 px."""

    width: Annotated[int, "channels of the first convolution; doubled three times"] = 32
    dim: Annotated[int, "size of the vector"] = 128

    def __post_init__(self) -> None:
        if min(self.width, self.dim) < 1:
            raise ValueError("width and dim must be at least 1")
        small_towers.check_widths(self.width, self.dim)

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """A fresh encoder for images of `size` pixels, 32..96."""
        if not 32 <= size <= 96:
            raise ValueError(f"images of {size} px: tower takes 32 to 96")
        tower = small_towers.ConvTower(self.width, self.dim)
        return image_encoder(tower, Preprocess(size), spec(self))
