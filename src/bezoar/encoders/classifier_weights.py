"""Recognises a classifier's architecture by the names and shapes of its weights.

The names are those of torchvision and pytorch-cifar. Residual networks with norms before the
convolutions may also have the names of BackdoorBench's PreAct ResNet, or of wide residual networks
(`block1.layer.0`).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bezoar.data.files.checkpoints import format_keys
from bezoar.data.files.paths import read_regular_text
from bezoar.data.label_sets import distinct_names
from bezoar.encoders.classifier_networks import Architecture, Residual, Vgg
from bezoar.encoders.weight_prefixes import strip_common
from bezoar.errors import UserError, expand_home

HEADS = ("fc", "linear", "classifier")
# Norms outside the stages of a residual network: after the stem, or before the pooling.
OUTER_NORMS = ("bn1", "bn", "norm")
STAGE = re.compile(r"(?:layer|block)([1-9])\.(?:layer\.)?(\d+)\.(.+)")
# These find the prefix before the first convolution, and before the first stage.
FIRST_WEIGHT = re.compile(r"((?:[^.]+\.)*?)(features|conv1)(?:\.\d+)?\.weight")
FIRST_STAGE = re.compile(r"((?:[^.]+\.)*?)(?:layer1\.\d|block1\.layer)")
SHORTCUT = re.compile(r"(?:downsample|shortcut|convShortcut)(?:\.(\d))?")
USUAL_SIDES = (28, 32, 48, 64, 96, 112, 128, 160, 192, 224, 256, 384)  # pixels of images
NAMES_BYTES = 1 << 20  # of a file of class names
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class ClassifierWeights:
    """An architecture, and its weights by the names of the modules that it builds."""

    architecture: Architecture
    trunk: dict[str, Tensor]
    head: dict[str, Tensor]


def read_classifier(tensors: Weights, path: str) -> ClassifierWeights:
    """Recognise a classifier's architecture by its state dict.

    The result is not checked in full: build its modules on the meta device, and check the weights
    against them (`weights.check_weights`) before any memory is allocated.

    Args:
        tensors: the state dict.
        path: of the file, for messages.

    Raises:
        UserError: in one line, for any other network.
    """
    weights = strip_common(tensors)
    try:
        if "conv1.weight" in weights:
            return _read_residual(weights, path)
        if any(key.startswith("features.") for key in weights):
            return _read_vgg(weights, path)
    except (KeyError, IndexError, StopIteration) as error:
        raise UserError(
            f"{path}: expected a classifier's weights; {str(error) or 'a part'} is missing or "
            "misshapen"
        ) from error
    raise UserError(
        f"{path}: expected a residual network (conv1.weight, layer1.0... or block1.layer.0..., fc "
        f"or linear) or a VGG (features.0..., classifier); its keys are {format_keys(weights)}"
    )


def classifier_prefixes(tensors: Weights) -> list[str]:
    """The prefixes of the residual networks and VGGs in a file."""
    firsts = [match for key in tensors if (match := FIRST_WEIGHT.fullmatch(key))]
    stages = {match[1] for key in tensors if (match := FIRST_STAGE.match(key))}
    return list(dict.fromkeys(m[1] for m in firsts if m[2] == "features" or m[1] in stages))


# Residual networks


def _read_residual(weights: Weights, path: str) -> ClassifierWeights:
    matrices, head = _read_head(weights, path)
    trunk = {
        _canonical_key(key): tensor
        for key, tensor in weights.items()
        if key.partition(".")[0] not in HEADS
    }
    counts = _count_blocks(trunk, path)
    stages = range(1, len(counts) + 1)
    bottleneck = "layer1.0.conv3.weight" in trunk
    last_conv = "conv3" if bottleneck else "conv2"
    stem = _conv_shape(trunk, "conv1.weight", path)
    if stem[1] != 3 or stem[2] not in (3, 7):
        raise UserError(
            f"{path}: expected a stem of 3x3 or 7x7 on three channels; conv1.weight is {stem}"
        )
    inner = tuple(_conv_shape(trunk, f"layer{i}.0.conv1.weight", path)[0] for i in stages)
    outer = tuple(_conv_shape(trunk, f"layer{i}.0.{last_conv}.weight", path)[0] for i in stages)
    outer_norm = next((name for name in OUTER_NORMS if f"{name}.weight" in trunk), None)
    pre = _has_norms_before(trunk, len(counts), outer_norm, path)
    if pre and stem[2] == 7:
        raise UserError(
            f"{path}: norms before the convolutions and a 7x7 stem; "
            "no source says what follows such a stem"
        )
    if pre and outer_norm is not None:
        trunk = {re.sub(rf"^{outer_norm}\.", "norm.", key): v for key, v in trunk.items()}
    groups = 1
    if bottleneck:
        group_width = _conv_shape(trunk, "layer1.0.conv2.weight", path)[1]
        groups = max(1, inner[0] // max(1, group_width))
    classes, features = matrices[-1].shape
    architecture = Residual(
        order="pre" if pre else "post",
        bottleneck=bottleneck,
        kernel=stem[2],
        stem=stem[0],
        counts=counts,
        inner=inner,
        outer=outer,
        groups=groups,
        projection=any(".shortcut." in key for key in trunk),
        final=pre and outer_norm is not None,
        pool=_pooled_side(features, outer[-1], path),
        classes=classes,
    )
    return ClassifierWeights(architecture, trunk, head)


def _canonical_key(key: str) -> str:
    """The name in `ResidualTrunk` of a weight by any of the known names."""
    match = STAGE.fullmatch(key)
    if not match:
        return key
    part, _, weight = match[3].rpartition(".")
    if shortcut := SHORTCUT.fullmatch(part):
        part = f"shortcut.{shortcut[1] or 0}"
    return f"layer{match[1]}.{match[2]}.{part}.{weight}"


def _count_blocks(trunk: Weights, path: str) -> tuple[int, ...]:
    """How many blocks each stage has. Raises UserError unless stages are numbered 1, 2, ..."""
    blocks: dict[int, set[str]] = {}
    for key in trunk:
        if match := STAGE.fullmatch(key):
            blocks.setdefault(int(match[1]), set()).add(match[2])
    if not blocks or set(blocks) != set(range(1, len(blocks) + 1)):
        raise UserError(
            f"{path}: expected stages layer1, layer2, ... or block1.layer, ...; "
            f"its keys are {format_keys(trunk)}"
        )
    return tuple(len(blocks[i]) for i in sorted(blocks))


def _has_norms_before(trunk: Weights, stages: int, outer_norm: str | None, path: str) -> bool:
    """Whether a network's norms come before its convolutions.

    In the last stage, the first norm has as many channels as the input of the first convolution if
    it comes before it, and as many as its output if it comes after it. If both numbers are equal, a
    network without a norm outside the stages has norms before the convolutions: otherwise it would
    have one after the stem.
    """
    out, channels, *_ = _conv_shape(trunk, f"layer{stages}.0.conv1.weight", path)
    norm = trunk[f"layer{stages}.0.bn1.weight"].numel()
    return norm == channels and (norm != out or outer_norm is None)


# VGG


def _read_vgg(weights: Weights, path: str) -> ClassifierWeights:
    convolutions = _find_convolutions(weights, path)
    norm = any(key.startswith("features.") and key.endswith("running_mean") for key in weights)
    layers: list[int] = []
    renamed: dict[str, str] = {}  # beginnings of keys: those in the file -> those in the trunk
    plain, pooled = 2 + norm, 3 + norm  # parts of a layer: convolution, norm, ReLU, max-pool
    position = 0
    for number, following in zip(convolutions, [*convolutions[1:], None], strict=True):
        # All known VGGs pool after the last convolution.
        parts = pooled if following is None else following - number
        if parts not in (plain, pooled):
            raise UserError(
                f"{path}: between features.{number} and features.{following} stands more than "
                "a norm, a ReLU and a max-pool"
            )
        for i in range(1 + norm):
            renamed[f"features.{number + i}."] = f"{position + i}."
        layers.append(weights[f"features.{number}.weight"].shape[0])
        if parts == pooled:
            layers.append(0)
        position += parts
    trunk = {}
    for key, tensor in weights.items():
        owner, _, name = key.rpartition(".")
        if key.partition(".")[0] not in HEADS:
            trunk[renamed.get(f"{owner}.", f"{owner}.") + name] = tensor
    matrices, head = _read_head(weights, path)
    channels = weights[f"features.{convolutions[-1]}.weight"].shape[0]
    architecture = Vgg(
        layers=tuple(layers),
        norm=norm,
        bias=f"features.{convolutions[0]}.bias" in weights,
        pool=_pooled_side(matrices[0].shape[1], channels, path),
        widths=tuple(matrix.shape[0] for matrix in matrices),
    )
    if architecture.side not in USUAL_SIDES:
        raise UserError(
            f"{path}: its head reads a map of {architecture.pool}x{architecture.pool}, which "
            f"convolutions padded by one pixel and {layers.count(0)} max-pools make of no usual "
            f"image ({architecture.side} px)"
        )
    return ClassifierWeights(architecture, trunk, head)


def _find_convolutions(weights: Weights, path: str) -> list[int]:
    """The numbers of a VGG's convolutions, in order. Raises UserError if there are none."""
    matches = (re.fullmatch(r"features\.(0|[1-9]\d{0,3})\.weight", key) for key in weights)
    numbers = sorted(int(match[1]) for match in matches if match)
    convolutions = [i for i in numbers if weights[f"features.{i}.weight"].ndim == 4]
    if not convolutions:
        raise UserError(
            f"{path}: expected convolutions features.0, ...; its keys are {format_keys(weights)}"
        )
    return convolutions


# Parts of both


def _read_head(weights: Weights, path: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Read the layers of a head.

    Returns:
        their matrices in order; and all weights by the module's names: `weight` and `bias` for one
        layer, or `0.weight`, `0.bias`, `2.weight`, ... for several with ReLUs between them.
    """
    keys = [key for key in weights if key.partition(".")[0] in HEADS]
    matrices = sorted((key for key in keys if weights[key].ndim == 2), key=_first_number)
    if not matrices or len({key.partition(".")[0] for key in keys}) != 1:
        raise UserError(
            f"{path}: expected one head named {', '.join(HEADS[:-1])} or {HEADS[-1]}; it has "
            f"{format_keys(keys) or 'none'} (a trunk without a head is read by the network "
            "`imported`)"
        )
    if not all(weights[key].numel() for key in matrices):
        raise UserError(f"{path}: a head of no classes")
    owners = {
        key.rpartition(".")[0]: f"{2 * i}." if len(matrices) > 1 else ""
        for i, key in enumerate(matrices)
    }
    head = {}
    for key in keys:
        owner, _, name = key.rpartition(".")
        head[owners.get(owner, f"{key}.") + name] = weights[key]
    return [weights[key] for key in matrices], head


def _first_number(key: str) -> list[int]:
    """The first number in a key, for sorting; nothing if it has none."""
    return [int(number) for number in re.findall(r"\d{1,4}", key)[:1]]


def _pooled_side(features: int, channels: int, path: str) -> int:
    """The side of the feature map that a head reads. Raises UserError if it is not square."""
    side = math.isqrt(max(0, features // max(1, channels)))
    if channels < 1 or side < 1 or side * side * channels != features:
        raise UserError(
            f"{path}: expected a head that reads a square map of {channels} channels; "
            f"it reads {features} numbers"
        )
    return side


def _conv_shape(weights: Weights, key: str, path: str) -> tuple[int, ...]:
    """The shape (out, in, k, k) of a convolution's weights. Raises UserError for another shape."""
    shape = tuple(weights[key].shape)
    if len(shape) != 4 or min(shape) < 1 or shape[2] != shape[3]:
        raise UserError(f"{path}: expected the weights of a convolution; {key} is {shape}")
    return shape


# Class names


def read_class_names(text: str, count: int, owner: str) -> tuple[str, ...]:
    """Read the names of a head's classes.

    Args:
        text: `a+b`, or the path of a .json file with a list, or of a .txt file with one name a
            line.
        count: how many classes the head has.
        owner: file of the head, for messages.

    Raises:
        UserError: unless there are `count` names. Equal names are numbered (`distinct_names`).
    """
    file = expand_home(text)
    names: object = _load_names(file, text) if file.suffix in (".txt", ".json") else text.split("+")
    if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
        raise UserError(f"{text[:60]}: expected a list of class names")
    stripped = tuple(str(name).strip() for name in names)
    if len(stripped) != count:
        raise UserError(
            f"{owner}: a head of {count} classes; expected as many names, got {len(stripped)}"
        )
    return distinct_names(stripped)


def _load_names(file: Path, text: str) -> object:
    """Read a file of class names. Raises UserError if it cannot be read."""
    try:
        content = read_regular_text(file, NAMES_BYTES)
        if file.suffix == ".json":
            return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{text}: expected names of classes in UTF-8, a list in JSON or one a line"
        ) from error
    return [line for line in content.split("\n") if line.strip()]
