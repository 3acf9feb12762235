"""A file or folder of weights whose kind is recognised: what a bare path stands for."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import timm
from torch import Tensor

from bezoar import registry
from bezoar.data.files import checkpoints
from bezoar.encoders import (
    checkpoint_layouts,
    classifier_weights,
    filling,
    normalisation,
    pretrained_folders,
    sentence_towers,
    small_towers,
    timm_models,
    torchvision_models,
    weight_prefixes,
)
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.networks import Network
from bezoar.errors import UserError, describe_neighbours, expand_home
from bezoar.registry import method

SAVED = ("encoder.json", "encoder.safetensors")  # of an encoder that bezoar wrote
OF_TRANSFORMERS = ("embeddings.patch_embedding", "embeddings.cls_token", "vision_model.")
PATCHES = "patch_embed.proj.weight"  # the first weight of a vision transformer by timm's names
MAX_NAMES = 8  # models in a message
LINEAR = ("fc.weight", "linear.weight", "classifier.weight")


@method
class Weights(Network):
    """Recognises classifiers, self-supervised trunks, CLIP, timm and torchvision by their weights.

    Folders are those of open_clip, timm, transformers and sentence-transformers, and of bezoar's
    own encoders. `about["imported"]` lists what was assumed because no weight states it.
    """

    path: Annotated[str, "file or folder"]
    mean_std: Annotated[
        str, "normalisation: cifar, imagenet, clip, half, none ...; auto is the file's, or guessed"
    ] = "auto"
    size: Annotated[int, "input side in pixels; 0: the usual one for these weights"] = 0
    model: Annotated[str, "name of timm's or open_clip's, where the weights fit several"] = ""
    classes: Annotated[
        str, "names in the head's order, a+b, or a .txt or .json file; else numbers"
    ] = ""
    prefix: Annotated[
        str, "name before the encoder's weights, where the file holds several: teacher"
    ] = ""

    def __post_init__(self) -> None:
        if self.mean_std != "auto":
            small_towers.check_mean_std(self.mean_std)
        if self.size < 0:
            raise ValueError("size must be 0 or more")

    def files(self) -> list[Path]:
        """The file, or what is read of the folder."""
        path = expand_home(self.path)
        if os.path.isdir(path):
            saved = [path / name for name in SAVED]
            if all(map(os.path.isfile, saved)):
                return saved
            if sentence_towers.is_sentence_folder(path):
                return sentence_towers.folder_files(self.path)
            only = pretrained_folders.only_weights(path)
            return [only] if only else pretrained_folders.open_folder(self.path).files()
        if not os.path.isfile(path):
            beside = describe_neighbours(self.path)
            raise UserError(f"no file or folder of weights {self.path!r}{beside}")
        return [path]

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder; `size` is 0 or the images' side. Raises UserError if it does not fit."""
        path = expand_home(self.path)
        if os.path.isdir(path):
            encoder = self._open_folder(path, size)
        else:
            self.files()
            encoder = self._open_file(path, size)
        if self.classes and encoder.head is not None:
            count = len(encoder.about["classes"])
            names = classifier_weights.read_class_names(self.classes, count, self.path)
            encoder.about["classes"] = list(names)
        return encoder

    def _open_folder(self, path: Path, size: int) -> Encoder:
        if all(os.path.isfile(path / name) for name in SAVED):
            return Encoder.load(path)
        if sentence_towers.is_sentence_folder(path):
            return self._make("sentence")
        if only := pretrained_folders.only_weights(path):
            this: Any = self
            encoder: Encoder = dataclasses.replace(this, path=str(only))(size)
            return encoder
        return self._take_size(self._make("hugging_face", mean_std=self.mean_std))

    def _open_file(self, path: Path, size: int) -> Encoder:
        tensors = checkpoints.load_tensors(self.path, self.prefix)
        common = {"mean_std": self.mean_std, "size": self.size, "prefix": self.prefix}
        classifier = common | {"classes": self.classes}
        clip = common | ({"model": self.model} if self.model else {})
        problem: UserError | None = None
        try:
            if _has_linear_head(tensors):
                return self._make("classifier", size, **classifier)
            if checkpoint_layouts.encoder_prefixes(tensors):
                return self._make("imported", size, **clip)
            if classifier_weights.classifier_prefixes(tensors):
                return self._make("classifier", size, **classifier)
        except UserError as error:  # perhaps another network with similar names, tried below
            problem = error
        encoder = self._open_others(path, tensors)
        if encoder is not None:
            return self._take_size(encoder)
        if problem is not None:
            raise problem
        raise UserError(self._describe_unknown(tensors))

    def _take_size(self, encoder: Encoder) -> Encoder:
        """The same encoder; if the user stated a `size`, it takes images of that size."""
        if self.size:
            imported = encoder.about["imported"]
            small_towers.check_input_size(encoder.image, self.size, imported["what"])
            encoder.set_preprocess(dataclasses.replace(encoder.preprocess, size=self.size))
            imported["assumed"] = [a for a in imported["assumed"] if not a.startswith("size=")]
        return encoder

    def _open_others(self, path: Path, tensors: dict[str, Tensor]) -> Encoder | None:
        """A model of timm's or torchvision's, or efficientnet-pytorch's; None if it is neither."""
        prefixes = [key.removesuffix(PATCHES) for key in tensors if key.endswith(PATCHES)]
        selected = weight_prefixes.select_encoder(tensors, prefixes, self.path, self.prefix)
        weights, trained_with = timm_models.tidy_transformer(
            selected.tensors if prefixes else weight_prefixes.strip_common(tensors)
        )
        left_out = selected.left_out + trained_with
        arguments = "" if self.model else timm_models.describe_transformer(weights)
        if timm_models.is_lukemelas(weights):
            name, weights = timm_models.rename_lukemelas(weights, self.path)
            what = f"{name} by efficientnet-pytorch's names"
        elif arguments:
            name, what = "vit_base_patch16_224", "a vision transformer of timm's"
        else:
            name = self._name_of_timm(weights, path.stem)
            what = f"timm's {name}"
        if not name:
            return torchvision_models.open_weights(weights, self.path, self.mean_std)
        encoder, what, _ = filling.fill_timm(name, arguments, weights, self.path, what)
        self._describe_timm(encoder, path.name, what, arguments, left_out)
        return encoder

    def _name_of_timm(self, weights: dict[str, Tensor], file: str) -> str:
        """The model of timm's with these weights, or "". Raises UserError if several fit."""
        if self.model:
            return self.model if timm.is_model(self.model) else ""
        names = timm_models.find_models(weights, file)
        if len(names) > 1:
            raise UserError(
                f"{self.path}: its weights fit {len(names)} of timm's models, which compute "
                f"different things from them: {checkpoints.format_keys(names, MAX_NAMES)}; say "
                "model= one of them"
            )
        return names[0] if names else ""

    def _describe_timm(
        self, encoder: Encoder, file: str, what: str, arguments: str, left_out: list[str]
    ) -> None:
        """Set the normalisation of a model of timm's, and note what was assumed of it."""
        assumed = []
        if self.mean_std != "auto":
            encoder.set_preprocess(normalisation.with_mean_std(encoder.preprocess, self.mean_std))
        else:
            # Self-supervised transformers (DINO, MAE) use the normalisation of ResNets.
            if arguments and left_out:
                encoder.set_preprocess(normalisation.with_mean_std(encoder.preprocess, "imagenet"))
            name = normalisation.mean_std_name(encoder.preprocess)
            assumed.append(f"{normalisation.GUESS}{name}")
        if arguments:
            assumed.append(f"{timm_models.parse_arguments(arguments)['num_heads']} attention heads")
        encoder.about["imported"] = {
            "file": file,
            "layout": "timm",
            "what": what,
            "left_out": left_out,
            "assumed": [*assumed, f"size={encoder.preprocess.size}"],
        }

    def _make(self, network: str, side: int = 0, **fields: object) -> Encoder:
        """The encoder of another network that reads the same path. side: of the images, or 0."""
        values = {"path": self.path, **fields}
        texts = [f"{k}={registry.spec_value(v)}" for k, v in values.items() if v not in ("", 0)]
        encoder: Encoder = registry.make("network", f"{network}:{','.join(texts)}")(side)
        return encoder

    def _describe_unknown(self, tensors: dict[str, Tensor]) -> str:
        """The message for weights of an unknown network."""
        if any(start in key for key in tensors for start in OF_TRANSFORMERS):
            return (
                f"{self.path}: weights of a model of transformers, whose sizes stand in "
                "config.json; name the folder that holds both"
            )
        return (
            f"{self.path}: expected a residual network, a VGG, CLIP, or a model of timm or "
            f"torchvision; its keys are {checkpoints.format_keys(tensors)}; say model=, a name of "
            "timm's, if it is one of those"
        )


def _has_linear_head(tensors: dict[str, Tensor]) -> bool:
    """Whether a file holds one encoder, a convolutional network with a linear classifier."""
    prefixes = set(checkpoint_layouts.encoder_prefixes(tensors))
    starts = set(classifier_weights.classifier_prefixes(tensors))
    if len(prefixes) != 1 or prefixes != starts:
        return False
    (prefix,) = prefixes
    return any(tensors[prefix + key].ndim == 2 for key in LINEAR if prefix + key in tensors)
