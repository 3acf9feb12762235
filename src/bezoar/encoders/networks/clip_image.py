"""The image tower of an open_clip architecture, fresh (Radford et al. 2021), as in BadEncoder."""

from typing import Annotated

import open_clip

from bezoar.encoders import open_clip_models, small_towers
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.networks import Network, image_encoder
from bezoar.errors import UserError
from bezoar.registry import method, spec


@method
class ClipImage(Network):
    """Images only; for published weights of both towers see `open_clip`."""

    model: Annotated[str, "architecture of open_clip's"] = "RN50"
    mean_std: Annotated[str, "normalisation: cifar, stl10, imagenet, clip, half, none"] = "clip"
    config: Annotated[
        str, "in place of a name: model_cfg of an open_clip_config.json, a JSON object"
    ] = ""

    def __post_init__(self) -> None:
        small_towers.check_mean_std(self.mean_std)
        try:
            if self.config:
                open_clip_models.parse_config(self.config)
        except UserError as error:
            raise ValueError(str(error)) from error

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder; `size` is not used, because the architecture states its own input size."""
        if self.config:
            model = open_clip_models.build_from_config(self.config)
        else:
            open_clip_models.check_architecture(self.model)
            model = open_clip.create_model(self.model)
        visual = getattr(model, "visual", None)
        if type(model) not in (open_clip.CLIP, open_clip.CustomTextCLIP) or visual is None:
            raise UserError(f"open_clip's {self.model} has no image tower that stands alone")
        side = open_clip_models.stated_preprocess(model).size
        preprocess = small_towers.named_preprocess(side, self.mean_std)
        return image_encoder(visual, preprocess, spec(self))
