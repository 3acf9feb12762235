"""Published checkpoints of BadEncoder (Jia et al. 2022), SimCLR, MoCo, torchvision, open_clip."""

from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from bezoar import registry
from bezoar.data.files import checkpoints
from bezoar.data.files.paths import existing_file
from bezoar.encoders import (
    checkpoint_layouts,
    filling,
    open_clip_models,
    small_towers,
    weight_prefixes,
)
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.networks import Network
from bezoar.encoders.weights import check_weights
from bezoar.errors import UserError
from bezoar.registry import method


@method
class Imported(Network):
    """Strict: no key may be missing, unexpected or misshapen. `about` says what was assumed.

    No such file states its normalisation. `mean_std=auto` takes cifar for a 3x3 stem, imagenet for
    a 7x7 stem, none for SimCLR's ImageNet encoder, and clip for CLIP. BadEncoder's encoders of
    STL10 have the same keys as those of CIFAR-10, so they need `mean_std=stl10`.
    """

    path: Annotated[
        str, "a .pth, .pt, .bin or .safetensors file; pickles of more than tensors are refused"
    ]
    mean_std: Annotated[
        str, "normalisation: cifar, stl10, imagenet, clip, none; auto is the layout's"
    ] = "auto"
    size: Annotated[
        int,
        "input side in pixels; 0 is the layout's: 32 of a 3x3 stem, 224 of a 7x7 one, CLIP's own",
    ] = 0
    model: Annotated[str, "open_clip architecture, where the keys fit several"] = ""
    prefix: Annotated[
        str, "name before the encoder's weights, where the file holds several: teacher"
    ] = ""

    def __post_init__(self) -> None:
        if self.mean_std != "auto":
            small_towers.check_mean_std(self.mean_std)
        if self.size < 0:
            raise ValueError("size must be 0 or more")

    def files(self) -> list[Path]:
        """The weights."""
        return [existing_file(self.path, "weights file")]

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder; `size` is 0 or the images' side. Raises UserError if it does not fit."""
        loaded = checkpoints.load_tensors(self.path, self.prefix)
        prefixes = checkpoint_layouts.encoder_prefixes(loaded)
        weights = weight_prefixes.select_encoder(loaded, prefixes, self.path, self.prefix)
        tensors = weights.tensors
        layout = checkpoint_layouts.recognise_layout(tensors, self.path)
        heads = layout.heads
        if layout.name == "torchvision" and not checkpoint_layouts.is_clip_tower(tensors):
            parts = sorted({key.partition(".")[0] for key in tensors} - {"fc"})
            heads += tuple(filter(weight_prefixes.TRAINING_PARTS.match, parts))
        body = {key: v for key, v in tensors.items() if not key.startswith(heads)}
        if layout.name == "open_clip":
            encoder, assumed = self._import_clip(body)
        else:
            tower = checkpoint_layouts.extract_tower(body, layout, self.path)
            if checkpoint_layouts.is_clip_tower(tower):
                encoder, assumed = self._import_clip_image(tower)
            else:
                encoder, assumed = self._import_resnet(tower, layout, size)
        left_out = [h.rstrip(".") for h in heads if any(key.startswith(h) for key in tensors)]
        encoder.about["imported"] = {
            "file": Path(self.path).name,
            "layout": layout.name,
            "left_out": left_out + weights.left_out,
            "assumed": assumed,
        }
        return encoder

    def _import_resnet(
        self, tower: dict[str, Tensor], layout: checkpoint_layouts.Layout, size: int
    ) -> tuple[Encoder, list[str]]:
        """Import a residual network with torchvision's names as `resnet`.

        Returns:
            the encoder, and what was assumed of it.
        """
        depth, stem, width = checkpoint_layouts.resnet_shape(tower, self.path)
        usual = stem
        if stem == "imagenet" and checkpoint_layouts.is_simclr_imagenet(tower, layout):
            usual = "none"
        mean_std, assumed = self._choose_mean_std(usual)
        if stem == "cifar" and not layout.unnamed:
            assumed.append("no max-pool after the 3x3 stem")
        side = self.size or (32 if stem == "cifar" else 224)
        if not self.size:
            assumed.append(f"size={side}")
            if size not in (0, side):
                raise UserError(
                    f"{self.path}: its {stem} stem suggests images of {side} px, and these have "
                    f"{size}; say size={size} to take them as they are, or size={side} to have "
                    "them resized"
                )
        spec = f"resnet:depth={depth},stem={stem},width={width},mean_std={mean_std}"
        network: Network = registry.make("network", spec)
        with torch.device("meta"):
            blank = network(side)
        check_weights(blank.image, tower, self.path, f"a ResNet-{depth} with the {stem} stem")
        encoder = network(side)
        encoder.image.load_state_dict(tower)
        return encoder, assumed

    def _import_clip_image(self, tower: dict[str, Tensor]) -> tuple[Encoder, list[str]]:
        """Import an image tower of CLIP as `clip_image`.

        Returns:
            the encoder, and what was assumed of it.
        """
        name = self.model or open_clip_models.find_architecture(tower, None, self.path)
        blank = open_clip_models.build_blank(name).visual
        check_weights(blank, tower, self.path, f"the image tower of open_clip's {name}")
        mean_std, assumed = self._choose_mean_std("clip")
        encoder = self._build(f"clip_image:model={name},mean_std={mean_std}")
        encoder.image.load_state_dict(tower)
        return encoder, assumed

    def _import_clip(self, tensors: dict[str, Tensor]) -> tuple[Encoder, list[str]]:
        """Import both towers of CLIP as `open_clip`, with open_clip's own preprocessing.

        Returns:
            the encoder, and what was assumed of it.
        """
        if self.mean_std != "auto":
            raise UserError(
                f"{self.path}: open_clip states the normalisation of an architecture with both "
                "towers; leave it out"
            )
        image_weights = weight_prefixes.below(tensors, "visual.")
        name = self.model or open_clip_models.find_architecture(image_weights, tensors, self.path)
        blank = open_clip_models.build_blank(name)
        check_weights(blank, tensors, self.path, f"open_clip's {name}")
        encoder = self._build(f"open_clip:{name}")
        encoder.image.get_submodule("model").load_state_dict(tensors)
        mean = encoder.preprocess.mean[0]
        return encoder, [f"open_clip's preprocessing of {name} (mean {mean:g}...)"]

    def _build(self, spec: str) -> Encoder:
        """Build a fresh network of open_clip's. Raises UserError if its input is not `size`."""
        encoder = filling.make_network(spec)
        if self.size not in (0, encoder.preprocess.size):
            raise UserError(
                f"{self.path}: its weights are for {encoder.preprocess.size} px; size={self.size} "
                "does not fit"
            )
        return encoder

    def _choose_mean_std(self, usual: str) -> tuple[str, list[str]]:
        """The normalisation, and what was assumed of it."""
        if self.mean_std == "auto":
            return usual, [f"mean_std={usual}"]
        return self.mean_std, []
