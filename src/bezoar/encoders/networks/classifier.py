"""A classifier's weights as an encoder with a head: ResNet, PreAct ResNet, WideResNet, VGG (He 2016, Zagoruyko 2016)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch

from bezoar.data.files import checkpoints
from bezoar.data.files.paths import existing_file
from bezoar.encoders import classifier_networks, small_towers
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.encoders.weights import check_weights
from bezoar.errors import UserError
from bezoar.registry import method


@method
class Classifier:
    """`encoder.image` gives what the last layers read, `encoder.head` is these, `encoder.about["classes"]` their names.

    Strict: no key may be missing, left over or of another shape. `about["imported"]` says what was assumed, not read.
    """

    path: Annotated[
        str,
        "a .pth, .pt, .npz or .safetensors file of weights; pickles of more than tensors are refused",
    ] = ""
    mean_std: Annotated[
        str, "cifar, stl10, imagenet, clip, none, or six numbers M/M/M/S/S/S; auto is the stem's"
    ] = "auto"
    size: Annotated[int, "input side in pixels; 0: 32 of a 3x3 stem, 224 of a 7x7 one"] = 0
    classes: Annotated[
        str, "names in the head's order, a+b, or a .txt or .json file; else numbers"
    ] = ""
    architecture: Annotated[str, "a fresh network, in the words of an imported one's about"] = ""

    def files(self) -> list[Path]:
        """The weights, and the names."""
        named = (
            [existing_file(self.classes, "file of class names")]
            if Path(self.classes).suffix in (".txt", ".json")
            else []
        )
        return ([existing_file(self.path, "weights file")] if self.path else []) + named

    def vocabulary(self, captions: Iterable[str]) -> tuple[str, ...]:
        """None: it reads no text."""
        return ()

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder; `size` 0 or the input side. Raises UserError for a file, layout or size that does not fit."""
        if not self.path and not self.architecture:
            raise UserError("network 'classifier': give path=, a file of weights")
        found = None
        if self.path:
            found = classifier_networks.describe(checkpoints.load_tensors(self.path), self.path)
        shape = (
            classifier_networks.parse(self.architecture) if found is None else found.architecture
        )
        name = self.path or "classifier"
        side, assumed = self._side(shape.side, size, name)
        preprocess, normalised = self._preprocess(side, shape.side)
        names = (
            classifier_networks.named_classes(self.classes, shape.classes, name)
            if self.classes
            else tuple(map(str, range(shape.classes)))
        )
        if found is not None:
            what = f"a classifier {classifier_networks.write(shape)}"
            with torch.device("meta"):  # shapes are compared before memory is spent
                trunk, head = shape.trunk(), shape.head()
            check_weights(trunk, found.trunk, name, what)
            check_weights(head, found.head, name, what + ", its head")
        image = shape.trunk().to(memory_format=torch.channels_last)
        normal = "/".join(map(str, (*preprocess.mean, *preprocess.std)))
        network = f'classifier:mean_std={normal},size={side},architecture="{classifier_networks.write(shape)}"'
        about = {"network": network, "vocabulary": [], "classes": list(names)}
        encoder = Encoder(image, preprocess, about=about)
        encoder.head = shape.head()
        if found is not None:
            image.load_state_dict(found.trunk)
            encoder.head.load_state_dict(found.head)
            assumed += normalised + ([] if self.classes else ["classes named by their numbers"])
            encoder.about["imported"] = {
                "file": Path(self.path).name,
                "layout": "classifier",
                "left_out": [],
                "assumed": assumed,
            }
        small_towers.check_size(image, side, name)
        return encoder

    def _side(self, own: int, size: int, name: str) -> tuple[int, list[str]]:
        """The input's side, and that it was assumed if it was."""
        if self.size or not self.path:
            return self.size or size or own, []
        if size not in (0, own):
            raise UserError(
                f"{name}: its layers suggest images of {own} px, and these have {size}; "
                f"say size={size} to take them as they are, or size={own} to have them resized"
            )
        return own, [f"size={own}"]

    def _preprocess(self, side: int, own: int) -> tuple[Preprocess, list[str]]:
        """The normalisation, and that it was assumed if it was."""
        if "/" in self.mean_std:
            numbers = [float(n) for n in self.mean_std.split("/")]
            return Preprocess(side, tuple(numbers[:3]), tuple(numbers[3:])), []
        default = "cifar" if own == 32 else "imagenet"
        name = default if self.mean_std == "auto" else self.mean_std
        return small_towers.preprocess(side, name), [
            f"mean_std={default}"
        ] if self.mean_std == "auto" else []

    def __post_init__(self) -> None:
        if self.path and self.architecture:
            raise ValueError("a file of weights has an architecture; leave architecture= out")
        if self.size < 0:
            raise ValueError("size must be 0 or more")
        if "/" not in self.mean_std:
            if self.mean_std != "auto":
                small_towers.check_mean_std(self.mean_std)
            return
        numbers = [float(n) for n in self.mean_std.split("/")]
        if len(numbers) != 6 or not all(abs(n) < 1e3 for n in numbers) or not min(numbers[3:]) > 0:
            raise ValueError(
                f"mean_std as numbers is M/M/M/S/S/S, deviations above 0; got {self.mean_std!r}"
            )
