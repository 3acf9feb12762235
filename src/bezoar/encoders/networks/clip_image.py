"""The image tower of any open_clip architecture alone, fresh (Radford et al. 2021): what BadEncoder publishes of CLIP."""

from collections.abc import Iterable
from typing import Annotated

import torch

from bezoar.encoders import small_towers
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.registry import method, spec


@method
class ClipImage:
    """Images only; for published weights of both towers see `open_clip`."""

    model: Annotated[str, "architecture of open_clip's"] = "RN50"
    mean_std: Annotated[str, "normalisation: cifar, stl10, imagenet, clip, none"] = "clip"

    def vocabulary(self, captions: Iterable[str]) -> tuple[str, ...]:
        """None: it reads no text."""
        return ()

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder; `size` is not used, because the architecture states its own input size."""
        import open_clip

        if self.model not in open_clip.list_models():
            raise UserError(
                f"open_clip has no architecture {self.model!r}; `open_clip.list_models()` names them"
            )
        model = open_clip.create_model(self.model)
        visual = getattr(model, "visual", None)
        if type(model) not in (open_clip.CLIP, open_clip.CustomTextCLIP) or visual is None:
            raise UserError(f"open_clip's {self.model} has no image tower that stands alone")
        config = open_clip.get_model_preprocess_cfg(model)
        side = config["size"][0] if isinstance(config["size"], (tuple, list)) else config["size"]
        preprocess = small_towers.preprocess(side, self.mean_std)
        about = {"network": spec(self), "vocabulary": []}
        return Encoder(visual.to(memory_format=torch.channels_last), preprocess, about=about)

    def __post_init__(self) -> None:
        small_towers.check_mean_std(self.mean_std)
