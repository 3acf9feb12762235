"""A classifier's weights as an encoder with a head: ResNet, PreAct ResNet, WideResNet, VGG."""

from pathlib import Path
from typing import Annotated

import torch

from bezoar.data.files import checkpoints
from bezoar.data.files.paths import existing_file
from bezoar.encoders import small_towers, weight_prefixes
from bezoar.encoders.classifier_networks import (
    Architecture,
    format_architecture,
    parse_architecture,
)
from bezoar.encoders.classifier_weights import (
    ClassifierWeights,
    classifier_prefixes,
    read_class_names,
    read_classifier,
)
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.encoders.networks import Network, image_encoder
from bezoar.encoders.weights import check_weights
from bezoar.errors import UserError
from bezoar.registry import method


@method
class Classifier(Network):
    """`encoder.head` is the classifier; `encoder.about["classes"]` names its classes.

    Strict: no key may be missing, left over or of another shape. `about["imported"]` lists what
    was assumed because the file does not state it.
    """

    path: Annotated[
        str,
        "a .pth, .pt, .npz or .safetensors file of weights; pickles of more than tensors are "
        "refused",
    ] = ""
    mean_std: Annotated[
        str, "cifar, stl10, imagenet, clip, none, or six numbers M/M/M/S/S/S; auto is the stem's"
    ] = "auto"
    size: Annotated[int, "input side in pixels; 0: 32 of a 3x3 stem, 224 of a 7x7 one"] = 0
    classes: Annotated[
        str, "names in the head's order, a+b, or a .txt or .json file; else numbers"
    ] = ""
    architecture: Annotated[str, "a fresh network, as encoder.json writes it"] = ""
    prefix: Annotated[
        str, "name before the encoder's weights, where the file holds several: teacher"
    ] = ""

    def __post_init__(self) -> None:
        if self.path and self.architecture:
            raise ValueError("a file of weights has an architecture; leave architecture= out")
        if self.size < 0:
            raise ValueError("size must be 0 or more")
        if "/" in self.mean_std:
            parse_mean_std(self.mean_std)
        elif self.mean_std != "auto":
            small_towers.check_mean_std(self.mean_std)

    def files(self) -> list[Path]:
        """The weights, and the names."""
        files = [existing_file(self.path, "weights file")] if self.path else []
        if Path(self.classes).suffix in (".txt", ".json"):
            files.append(existing_file(self.classes, "file of class names"))
        return files

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder; `size` is 0 or the images' side. Raises UserError if it does not fit."""
        name = self.path or "classifier"
        weights: ClassifierWeights | None = None
        left_out: list[str] = []
        if self.path:
            loaded = checkpoints.load_tensors(self.path, self.prefix)
            prefixes = classifier_prefixes(loaded)
            selected = weight_prefixes.select_encoder(loaded, prefixes, self.path, self.prefix)
            left_out = selected.left_out
            weights = read_classifier(selected.tensors, self.path)
            architecture = weights.architecture
        elif self.architecture:
            architecture = parse_architecture(self.architecture)
        else:
            raise UserError("network 'classifier': give path=, a file of weights")
        side = self._input_side(architecture.side, size)
        mean_std = self.mean_std
        if mean_std == "auto":
            mean_std = "cifar" if architecture.side == 32 else "imagenet"
        classes = (
            read_class_names(self.classes, architecture.classes, name)
            if self.classes
            else tuple(map(str, range(architecture.classes)))
        )
        if weights is not None:
            check_shapes(weights, name)
        encoder = build_encoder(architecture, make_preprocess(side, mean_std), classes)
        if weights is not None:
            encoder.image.load_state_dict(weights.trunk)
            assert encoder.head is not None
            encoder.head.load_state_dict(weights.head)
            encoder.about["imported"] = {
                "file": Path(self.path).name,
                "layout": "classifier",
                "left_out": left_out,
                "assumed": self._assumptions(side, mean_std),
            }
        small_towers.check_input_size(encoder.image, side, name)
        return encoder

    def _input_side(self, usual: int, size: int) -> int:
        """The input's side in pixels. usual: the architecture's; size: of the images, or 0."""
        if self.size or not self.path:
            return self.size or size or usual
        if size not in (0, usual):
            raise UserError(
                f"{self.path}: its layers suggest images of {usual} px, and these have {size}; "
                f"say size={size} to take them as they are, or size={usual} to have them resized"
            )
        return usual

    def _assumptions(self, side: int, mean_std: str) -> list[str]:
        """The settings that neither the file nor the user states."""
        assumed = [] if self.size else [f"size={side}"]
        if self.mean_std == "auto":
            assumed.append(f"mean_std={mean_std}")
        if not self.classes:
            assumed.append("classes named by their numbers")
        return assumed


def parse_mean_std(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`M/M/M/S/S/S` -> means and standard deviations. Raises ValueError for anything else."""
    numbers = tuple(float(number) for number in text.split("/"))
    if len(numbers) != 6 or not all(abs(n) < 1e3 for n in numbers) or not min(numbers[3:]) > 0:
        raise ValueError(f"mean_std as numbers is M/M/M/S/S/S, deviations above 0; got {text!r}")
    return numbers[:3], numbers[3:]


def make_preprocess(side: int, mean_std: str) -> Preprocess:
    """The preprocessing with a normalisation by name or by numbers."""
    if "/" in mean_std:
        return Preprocess(side, *parse_mean_std(mean_std))
    return small_towers.named_preprocess(side, mean_std)


def check_shapes(weights: ClassifierWeights, name: str) -> None:
    """Raise UserError unless weights fit their architecture, before memory is allocated."""
    with torch.device("meta"):
        trunk = weights.architecture.build_trunk()
        head = weights.architecture.build_head()
    what = f"a classifier {format_architecture(weights.architecture)}"
    check_weights(trunk, weights.trunk, name, what)
    check_weights(head, weights.head, name, f"{what}, its head")


def build_encoder(
    architecture: Architecture, preprocess: Preprocess, classes: tuple[str, ...]
) -> Encoder:
    """A fresh classifier."""
    mean_std = "/".join(map(str, (*preprocess.mean, *preprocess.std)))
    text = format_architecture(architecture)
    network = f'classifier:mean_std={mean_std},size={preprocess.size},architecture="{text}"'
    encoder = image_encoder(architecture.build_trunk(), preprocess, network)
    encoder.head = architecture.build_head()
    encoder.about["classes"] = list(classes)
    return encoder
