"""A folder of a pretrained model by open_clip, timm or transformers: CLIP, SigLIP, DINOv2, ViT."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import torch

from bezoar import registry
from bezoar.data.files.artefacts import Facts
from bezoar.encoders import (
    filling,
    normalisation,
    open_clip_models,
    pretrained_folders,
    small_towers,
    timm_models,
    transformers_weights,
    weight_prefixes,
)
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.encoders.networks import Network
from bezoar.encoders.pretrained_folders import PretrainedFolder
from bezoar.encoders.weights import check_weights
from bezoar.errors import UserError
from bezoar.registry import method

MAX_CLASSES = 1 << 16  # of a classifier whose classes are named


@method
class HuggingFace(Network):
    """The folder states architecture and preprocessing; nothing is cropped, and nothing is fetched.

    Weights are safetensors, or pickles of tensors alone. A linear classifier becomes the encoder's
    head. Models of transformers are computed by open_clip and timm.
    """

    path: Annotated[str, "folder with config.json or open_clip_config.json, and weights"]
    mean_std: Annotated[
        str, "normalisation: cifar, imagenet, clip, half, none ...; auto is the folder's"
    ] = "auto"

    def __post_init__(self) -> None:
        if self.mean_std != "auto":
            small_towers.check_mean_std(self.mean_std)

    def files(self) -> list[Path]:
        """Config, preprocessing and weights."""
        return pretrained_folders.open_folder(self.path).files()

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder; `size` is not used, because the folder states the size of its input."""
        folder = pretrained_folders.open_folder(self.path)
        open_by = {
            "open_clip": _open_open_clip,
            "timm": _open_timm,
            "transformers": _open_transformers,
        }
        encoder, what, left_out = open_by[folder.library](folder)
        preprocess, assumed, cuts = folder.preprocess(encoder.preprocess)
        usual = encoder.preprocess.size
        try:
            small_towers.check_input_size(encoder.image, preprocess.size, self.path)
        except UserError:  # it may be the size before cropping
            preprocess = dataclasses.replace(preprocess, size=usual)
            small_towers.check_input_size(encoder.image, usual, self.path)
        if self.mean_std != "auto":
            preprocess, assumed = normalisation.with_mean_std(preprocess, self.mean_std), []
        elif assumed:
            assumed = [f"{normalisation.GUESS}{normalisation.mean_std_name(preprocess)}"]
        encoder.set_preprocess(preprocess)
        encoder.about["imported"] = {
            "file": folder.path.name,
            "layout": folder.library,
            "what": what,
            "left_out": left_out + cuts,
            "assumed": assumed,
        }
        return encoder


def _open_open_clip(folder: PretrainedFolder) -> filling.Filled:
    """Both towers, or the image tower alone if the text tower needs a tokenizer of the hub's."""
    config = folder.config.object("model_cfg")
    text_config = config.object("text_cfg")
    foreign = text_config.get("hf_tokenizer_name") or text_config.get("hf_model_name")
    if foreign:
        text_config = Facts({"layers": 1, "width": 8, "heads": 1, "vocab_size": 8}, config.file)
    text = json.dumps(config | {"text_cfg": text_config})
    tensors = folder.load_tensors()
    path = str(folder.path)
    spec = f"config={registry.spec_value(text)}"
    with torch.device("meta"):
        blank = open_clip_models.build_from_config(text)
    if foreign:
        weights = weight_prefixes.below(tensors, "visual.")
        check_weights(blank.visual, weights, path, "the image tower of its config")
        encoder = filling.make_network(f"clip_image:{spec}")
        encoder.image.load_state_dict(weights)
        return encoder, "the image tower of an open_clip model", ["text tower (its tokenizer)"]
    check_weights(blank, tensors, path, "the model of its config")
    encoder = filling.make_network(f"open_clip:{spec}")
    encoder.image.get_submodule("model").load_state_dict(tensors)
    return encoder, "an open_clip model", []


def _open_timm(folder: PretrainedFolder) -> filling.Filled:
    name = folder.config.text("architecture")
    arguments = folder.config.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise UserError(f"{folder.path}: model_args must be an object")
    text = timm_models.format_stated(arguments, str(folder.path))
    names, path = _class_names(folder.config), str(folder.path)
    return filling.fill_timm(name, text, folder.load_tensors(), path, f"timm's {name}", names)


def _open_transformers(folder: PretrainedFolder) -> filling.Filled:
    stated, _, _ = folder.preprocess(Preprocess(0))
    translation = transformers_weights.translate(
        folder.config, folder.load_tensors(), stated.size, str(folder.path)
    )
    path, what = str(folder.path), translation.what
    network, _, fields = translation.network.partition(":")
    values = registry.parse_spec("network", translation.network)[1]
    config = registry.convert_text(values.get("config", ""), str, "config")
    if network == "timm":
        blank = timm_models.build_blank(
            values["model"], registry.convert_text(values["arguments"], str, "arguments")
        )
    else:
        with torch.device("meta"):
            blank = open_clip_models.build_from_config(config)
        blank = blank if network == "open_clip" else blank.visual
    check_weights(blank, translation.weights, path, what)
    encoder = filling.make_network(f"{network}:{fields}")
    target = encoder.image.get_submodule("model") if network == "open_clip" else encoder.image
    target.load_state_dict(translation.weights)
    filling.add_head(encoder, translation.head, _class_names(folder.config), path)
    usual = normalisation.with_mean_std(encoder.preprocess, translation.mean_std)
    encoder.set_preprocess(dataclasses.replace(usual, size=translation.size))
    return encoder, what, list(translation.left_out)


def _class_names(config: Facts) -> tuple[str, ...]:
    """The class names of a config; () if it has none, or only `LABEL_0`, `LABEL_1`, ..."""
    names = config.get("id2label", config.get("label_names"))  # of transformers, and of timm
    if isinstance(names, list):
        names = {str(i): name for i, name in enumerate(names)}
    if not isinstance(names, dict) or len(names) > MAX_CLASSES:
        return ()
    texts = [names.get(str(i)) for i in range(len(names))]
    if not all(isinstance(text, str) for text in texts):
        return ()
    are_numbers = all(text == f"LABEL_{i}" for i, text in enumerate(texts))
    return () if are_numbers else tuple(str(text).partition(",")[0].strip() for text in texts)
