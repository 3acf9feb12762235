"""Published checkpoints, told apart by their keys: BadEncoder (Jia et al. 2022), SimCLR, MoCo, torchvision, open_clip."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from bezoar import registry
from bezoar.data.files import checkpoints
from bezoar.data.files.paths import existing_file
from bezoar.encoders import checkpoint_layouts, small_towers
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.weights import check_weights, without_weight_warnings
from bezoar.errors import UserError
from bezoar.registry import method


@method
class Imported:
    """Strict: no key may be missing, left over or of another shape. `about` says what was assumed, not read.

    mean_std=auto: cifar for a 3x3 stem (BadEncoder's encoders of STL10 have the same keys: say stl10), imagenet for a 7x7
    one, but none for SimCLR's ImageNet encoder, and clip for CLIP. What was meant is written in no such file.
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
    text: Annotated[
        str,
        "to an image tower of CLIP: the text tower of NAME/PRETRAINED (open_clip's), for zero-shot",
    ] = ""

    def files(self) -> list[Path]:
        """The weights."""
        return [existing_file(self.path, "weights file")]

    def vocabulary(self, captions: Iterable[str]) -> tuple[str, ...]:
        """None: the tokenizer, if there is a text tower, comes with the architecture."""
        return ()

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder; `size` 0 or the input side. Raises UserError for a file, layout or size that does not fit."""
        tensors = checkpoints.load_tensors(self.path)
        layout = checkpoint_layouts.recognise(tensors, self.path)
        left = {k for k in tensors if k.startswith(layout.heads)}
        kept = {k: v for k, v in tensors.items() if k not in left}
        if layout.name == "open_clip":
            encoder, assumed = self._both(kept)
        else:
            trunk = checkpoint_layouts.trunk(kept, layout, self.path)
            clip = "attnpool.positional_embedding" in trunk or "class_embedding" in trunk
            if self.text and not clip:
                raise UserError(
                    f"{self.path} holds no image tower of CLIP; text={self.text} cannot be joined to it"
                )
            encoder, assumed = self._clip(trunk) if clip else self._resnet(trunk, layout, size)
        heads = [head.rstrip(".") for head in layout.heads if any(k.startswith(head) for k in left)]
        facts = {
            "file": Path(self.path).name,
            "layout": layout.name,
            "left_out": heads,
            "assumed": assumed,
        }
        encoder.about["imported"] = facts
        return encoder

    def _resnet(
        self, trunk: dict[str, Tensor], layout: checkpoint_layouts.Layout, size: int
    ) -> tuple[Encoder, list[str]]:
        """A residual network of torchvision's names -> `resnet`, and what its keys do not say."""
        depth, stem, width = checkpoint_layouts.shape(trunk, self.path)
        default = (
            "cifar"
            if stem == "cifar"
            else "none"
            if checkpoint_layouts.simclr_imagenet(trunk, layout)
            else "imagenet"
        )
        mean_std, assumed = self._mean_std(default)
        if stem == "cifar" and not layout.unnamed:
            assumed.append("no max-pool after the 3x3 stem")
        side = self.size or (32 if stem == "cifar" else 224)
        if not self.size:
            assumed.append(f"size={side}")
            if size not in (0, side):
                raise UserError(
                    f"{self.path}: its {stem} stem suggests images of {side} px, and these have {size}; "
                    f"say size={size} to take them as they are, or size={side} to have them resized"
                )
        network = registry.make(
            "network", f"resnet:depth={depth},stem={stem},width={width},mean_std={mean_std}"
        )
        with torch.device("meta"):
            check_weights(
                network(side).image, trunk, self.path, f"a ResNet-{depth} with the {stem} stem"
            )
        encoder: Encoder = network(side)
        encoder.image.load_state_dict(trunk)
        return encoder, assumed

    def _clip(self, trunk: dict[str, Tensor]) -> tuple[Encoder, list[str]]:
        """An image tower of CLIP -> `clip_image`."""
        name = self.model or checkpoint_layouts.architecture(trunk, None, self.path)
        mean_std, assumed = self._mean_std("clip")
        check_weights(
            _blank(name).visual, trunk, self.path, f"the image tower of open_clip's {name}"
        )
        if self.text:
            return self._joined(name, trunk), []
        with without_weight_warnings():
            encoder: Encoder = registry.make(
                "network", f"clip_image:model={name},mean_std={mean_std}"
            )()
        self._same_size(encoder)
        encoder.image.load_state_dict(trunk)
        return encoder, assumed

    def _joined(self, name: str, trunk: dict[str, Tensor]) -> Encoder:
        """An image tower of CLIP with the text tower, and the preprocessing, of published weights of its architecture."""
        if self.text.partition("/")[0] != name:
            raise UserError(
                f"{self.path}: an image tower of open_clip's {name}; text={self.text} is of another architecture"
            )
        if self.mean_std != "auto":
            raise UserError(
                f"{self.path}: the normalisation comes with text={self.text}; leave it out"
            )
        encoder: Encoder = registry.make("network", f"open_clip:{self.text}")()
        self._same_size(encoder)
        encoder.image.get_submodule("model.visual").load_state_dict(trunk)
        return encoder

    def _both(self, tensors: dict[str, Tensor]) -> tuple[Encoder, list[str]]:
        """Both towers of CLIP -> `open_clip`, with the preprocessing that it states for the architecture."""
        if self.mean_std != "auto":
            raise UserError(
                f"{self.path}: open_clip states the normalisation of an architecture with both towers; leave it out"
            )
        trunk = {
            k.removeprefix("visual."): v for k, v in tensors.items() if k.startswith("visual.")
        }
        name = self.model or checkpoint_layouts.architecture(trunk, tensors, self.path)
        check_weights(_blank(name), tensors, self.path, f"open_clip's {name}")
        with without_weight_warnings():
            encoder: Encoder = registry.make("network", f"open_clip:{name}")()
        self._same_size(encoder)
        encoder.image.get_submodule("model").load_state_dict(tensors)
        mean = encoder.preprocess.mean[0]
        return encoder, [f"open_clip's preprocessing of {name} (mean {mean:g}...)"]

    def _mean_std(self, default: str) -> tuple[str, list[str]]:
        """The normalisation, and that it was assumed if it was."""
        return (
            (default, [f"mean_std={default}"]) if self.mean_std == "auto" else (self.mean_std, [])
        )

    def _same_size(self, encoder: Encoder) -> None:
        if self.size not in (0, encoder.preprocess.size):
            raise UserError(
                f"{self.path}: its weights are for {encoder.preprocess.size} px; size={self.size} does not fit"
            )

    def __post_init__(self) -> None:
        if self.mean_std != "auto":
            small_towers.check_mean_std(self.mean_std)
        if self.size < 0:
            raise ValueError("size must be 0 or more")


def _blank(name: str) -> Any:
    """An architecture of open_clip's on the meta device: shapes without memory."""
    import open_clip

    if name not in open_clip.list_models():
        raise UserError(
            f"open_clip has no architecture {name!r}; `open_clip.list_models()` names them"
        )
    with torch.device("meta"), without_weight_warnings():
        return open_clip.create_model(name, device="meta")
