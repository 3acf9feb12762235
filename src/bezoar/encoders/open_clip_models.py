"""Builds open_clip's models, and finds the architecture that a checkpoint's sizes belong to."""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import open_clip
import torch
from torch import Tensor

from bezoar.encoders.encoder import Preprocess
from bezoar.encoders.small_towers import MEAN_STD
from bezoar.errors import UserError, first_line

BLOCKS = "transformer.resblocks."
# Keys that the config of an architecture without a name may have.
TOP_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_bias"}
TOP_KEYS |= {"init_logit_scale"}
MAX_CONFIG = 1 << 14  # characters
LARGEST = 1 << 18  # of a number; vocabularies are the largest
DEEPEST = 1 << 9  # blocks of a tower
WORD = re.compile(r"[\w./-]{0,80}")
# What open_clip raises for values of another type or size than it expects.
MAKING_ERRORS: tuple[type[Exception], ...] = (ArithmeticError, AssertionError, AttributeError)
MAKING_ERRORS += (LookupError, RuntimeError, TypeError, ValueError)


def check_architecture(name: str) -> None:
    """Raise UserError unless open_clip has an architecture of this name."""
    if name not in open_clip.list_models():
        raise UserError(
            f"open_clip has no architecture {name!r}; `open_clip.list_models()` names them"
        )


def build_blank(name: str) -> Any:
    """An architecture on the meta device, without memory. Raises UserError if it is unknown."""
    check_architecture(name)
    with torch.device("meta"), without_weight_warnings():
        return open_clip.create_model(name, device="meta")


def build_from_config(text: str) -> Any:
    """A fresh model of an architecture without a name.

    Args:
        text: a JSON object such as `model_cfg` of an open_clip_config.json: embed_dim, vision_cfg,
            text_cfg and perhaps quick_gelu and custom_text.

    Raises:
        UserError: for other keys or values, and for sizes of which open_clip makes no model.
    """
    config = parse_config(text)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    try:
        return kind(**config)
    except MAKING_ERRORS as error:
        raise UserError(f"open_clip could not make such a model: {first_line(error)}") from error


def parse_config(text: str) -> dict[str, Any]:
    """The architecture of a JSON object; see `build_from_config`."""
    try:
        config = json.loads(text[:MAX_CONFIG])
    except (ValueError, RecursionError) as error:
        raise UserError(f"config must be a JSON object; got {text[:60]!r}") from error
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        raise UserError("config needs embed_dim, vision_cfg and text_cfg")
    if foreign := sorted(set(config) - TOP_KEYS):
        raise UserError(f"open_clip models with {foreign[0][:40]} are not read")
    kinds = {"vision_cfg": open_clip.CLIPVisionCfg, "text_cfg": open_clip.CLIPTextCfg}
    parts = {name: value for name, value in config.items() if name not in kinds}
    _check_values(parts)
    for name, kind in kinds.items():
        values = config[name]
        allowed = {field.name for field in dataclasses.fields(kind)}
        if not isinstance(values, dict) or not set(values) <= allowed:
            raise UserError(f"{name} must be an object of open_clip's settings")
        _check_values(values)
    if config["text_cfg"].get("hf_model_name"):
        raise UserError("open_clip models with a text tower of transformers are not read")
    config["vision_cfg"].pop("timm_model_pretrained", None)
    return config


def _check_values(values: Mapping[str, Any]) -> None:
    """Raise UserError unless values are words, flags, bounded numbers or short lists of these."""
    for name, value in values.items():
        numbers = value if isinstance(value, list) and len(value) <= 8 else [value]
        is_plain = all(
            n is None or (isinstance(n, int | float) and abs(n) <= LARGEST) for n in numbers
        )
        if not is_plain and not (isinstance(value, str) and WORD.fullmatch(value)):
            raise UserError(f"no file may state {name[:40]}={str(value)[:40]} of a model")
        blocks = max((n for n in numbers if isinstance(n, int | float)), default=0)
        if name == "layers" and blocks > DEEPEST:
            raise UserError(f"a tower of {blocks} blocks; expected at most {DEEPEST}")


@contextmanager
def without_weight_warnings() -> Iterator[None]:
    """Silence open_clip's warning of random weights, which a file's weights will replace."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def stated_preprocess(model: Any) -> Preprocess:
    """The preprocessing that an open_clip model states."""
    config = open_clip.get_model_preprocess_cfg(model)
    size = config["size"]
    side = size[0] if isinstance(size, (tuple, list)) else size
    mean, std = (
        tuple(config.get(key) or usual)
        for key, usual in zip(("mean", "std"), MEAN_STD["clip"], strict=True)
    )
    return Preprocess(side, mean, std, config.get("interpolation", "bicubic"))


def find_architecture(
    image_weights: Mapping[str, Tensor], all_weights: Mapping[str, Tensor] | None, path: str
) -> str:
    """Find the architecture whose sizes a checkpoint has.

    Args:
        image_weights: of the image tower, by their names within it.
        all_weights: of both towers, by their names in the model; None to compare the image tower
            alone.
        path: of the checkpoint, for messages.

    Raises:
        UserError: if no architecture has these sizes, or several that compute different things.
    """
    sizes = _image_sizes(image_weights, path)
    if all_weights is not None:
        sizes |= _text_sizes(all_weights)
    names: list[str] = [
        name
        for name in open_clip.list_models()
        if sizes == _architecture_sizes(name, all_weights is not None)
    ]
    if not names:
        text = ", ".join(f"{key} {value}" for key, value in sizes.items())
        raise UserError(f"{path}: no architecture of open_clip's has {text}")
    is_resnet = isinstance(sizes["layers"], tuple)
    # Image ResNets have the same activations in all architectures; transformers and text towers
    # have one of two kinds.
    if len(names) > 1 and (all_weights is not None or not is_resnet):
        raise UserError(
            f"{path}: its weights fit several architectures, which have different activation "
            f"functions; say model= one of {', '.join(names)}"
        )
    return min(names, key=len)


def _architecture_sizes(name: str, with_text: bool) -> dict[str, Any]:
    """The sizes of an architecture as `_image_sizes` gives them; empty unless it is plain CLIP."""
    config: dict[str, Any] = open_clip.get_model_config(name) or {}
    image, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    if "timm_model_name" in image or "hf_model_name" in text or "multimodal_cfg" in config:
        return {}
    image = _with_defaults(open_clip.CLIPVisionCfg, image)
    text = _with_defaults(open_clip.CLIPTextCfg, text)
    layers = image["layers"]
    is_resnet = isinstance(layers, (list, tuple))
    sizes = {
        "image_size": image["image_size"],
        "layers": tuple(layers) if is_resnet else layers,
        "width": image["width"],
        "embed_dim": config["embed_dim"],
    }
    if not is_resnet:
        sizes["patch_size"] = image["patch_size"]
    if with_text:
        keys = ("layers", "width", "context_length", "vocab_size")
        sizes |= {f"text_{key}": text[key] for key in keys}
    return sizes


def _with_defaults(config_class: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {f.name: values.get(f.name, f.default) for f in dataclasses.fields(config_class)}


def _image_sizes(weights: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """The sizes of a CLIP image tower, read off its weights. Raises UserError for another tower."""
    try:
        if "class_embedding" in weights:
            return _transformer_sizes(weights)
        return _resnet_sizes(weights)
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{path}: expected an image tower of CLIP; {error} is missing or of another shape"
        ) from error


def _transformer_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    patch = weights["conv1.weight"].shape[-1]
    return {
        "image_size": patch * _grid_side(weights["positional_embedding"]),
        "layers": _count_parts(weights, BLOCKS),
        "width": weights["conv1.weight"].shape[0],
        "embed_dim": weights["proj"].shape[1],
        "patch_size": patch,
    }


def _resnet_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "image_size": 32 * _grid_side(weights["attnpool.positional_embedding"]),
        "layers": tuple(_count_parts(weights, f"layer{i}.") for i in range(1, 5)),
        "width": len(weights["layer1.0.conv1.weight"]),
        "embed_dim": len(weights["attnpool.c_proj.weight"]),
    }


def _grid_side(positions: Tensor) -> int:
    """The side of the square grid of patches, from positional embeddings (1 + patches, D)."""
    return round(math.sqrt(max(0, len(positions) - 1)))


def _count_parts(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts there are under a prefix of keys."""
    return len({k.removeprefix(prefix).partition(".")[0] for k in weights if k.startswith(prefix)})


def _text_sizes(all_weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes of a CLIP text tower; 0 where its weights have other names."""
    tower = {
        k.removeprefix("text."): v for k, v in all_weights.items() if not k.startswith("visual.")
    }
    words, width = _matrix_shape(tower, "token_embedding.weight")
    context, _ = _matrix_shape(tower, "positional_embedding")
    return {
        "text_layers": _count_parts(tower, BLOCKS),
        "text_width": width,
        "text_context_length": context,
        "text_vocab_size": words,
    }


def _matrix_shape(weights: Mapping[str, Tensor], key: str) -> tuple[int, int]:
    """Rows and columns of a matrix; (0, 0) if there is no matrix of this name."""
    if key not in weights or weights[key].ndim != 2:
        return 0, 0
    rows, columns = weights[key].shape
    return rows, columns
