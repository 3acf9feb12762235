"""Trunks: the networks that image classifiers mostly are, rebuilt from the names and shapes of their weights alone.

Residual networks with norms behind the convolutions (He et al. 2016, CVPR; torchvision's names and pytorch-cifar's) or
before them (He et al. 2016, ECCV; pytorch-cifar's PreAct ResNet, as BackdoorBench trains it; Zagoruyko and Komodakis 2016,
wide ones, `block1.layer.0`), ResNeXt among them, and VGG (Simonyan and Zisserman 2015; torchvision's and pytorch-cifar's
names). What no weight tells is assumed as in these sources: a stage after the first halves the sides, with the 3x3
convolution; a 7x7 stem steps by 2 and is followed by a max-pool, a 3x3 stem steps by 1; ReLU everywhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from bezoar import registry
from bezoar.data.files.checkpoints import format_keys
from bezoar.errors import UserError

HEADS = ("fc", "linear", "classifier")
NORMS = ("bn1", "bn", "norm")  # of a residual network: behind the stem, or before the pooling
STAGE = re.compile(r"(?:layer|block)([1-9])\.(?:layer\.)?(\d+)\.(.+)")
SHORTCUT = re.compile(r"(?:downsample|shortcut|convShortcut)(?:\.(\d))?")
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Residual:
    """order: norms behind the convolutions (`post`) or before them (`pre`). kernel, stem: side and channels of the first
    convolution. counts, inner, outer: a stage's blocks, its channels within and after a block. groups: of the 3x3
    convolution of a bottleneck. projection: whether a shortcut that changes shape is a 1x1 convolution; else pixels are
    skipped and channels of zeros put on both sides (He et al. 2016, option A). final: a norm before the pooling. pool: side
    of what is pooled to.
    """

    order: typing.Literal["post", "pre"]
    bottleneck: bool
    kernel: int
    stem: int
    counts: tuple[int, ...]
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    groups: int
    projection: bool
    final: bool
    pool: int
    classes: int

    @property
    def side(self) -> int:
        """The input's side in pixels that the sources use with such a stem."""
        return 224 if self.kernel == 7 else 32

    def trunk(self) -> nn.Module:
        """(B, 3, S, S) -> (B, D), what the head reads."""
        return ResidualTrunk(self)

    def head(self) -> nn.Module:
        """(B, D) -> logits (B, classes)."""
        return nn.Linear(self.outer[-1] * self.pool**2, self.classes)


@dataclass(frozen=True)
class Vgg:
    """layers: channels of each convolution, 0 a max-pool. norm: batch norms. bias: of the convolutions. pool: side of what
    is pooled to. widths: of the head's layers, the last being the classes.
    """

    layers: tuple[int, ...]
    norm: bool
    bias: bool
    pool: int
    widths: tuple[int, ...]

    @property
    def side(self) -> int:
        """The input's side in pixels that the sources use with such a pooling."""
        return 224 if self.pool > 1 else 32

    @property
    def classes(self) -> int:
        """How many there are."""
        return self.widths[-1]

    def trunk(self) -> nn.Module:
        """(B, 3, S, S) -> (B, D), the pooled map laid out flat."""
        parts: list[nn.Module] = []
        channels = 3
        for width in self.layers:
            if not width:
                parts.append(nn.MaxPool2d(2))
                continue
            norm = [nn.BatchNorm2d(width)] if self.norm else []
            parts += [nn.Conv2d(channels, width, 3, 1, 1, bias=self.bias), *norm, nn.ReLU()]
            channels = width
        return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(self.pool), nn.Flatten())

    def head(self) -> nn.Module:
        """(B, D) -> logits (B, classes); dropout is left out, which rests in an encoder."""
        wide = (next(n for n in reversed(self.layers) if n) * self.pool**2, *self.widths)
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(wide)]
        if len(layers) == 1:
            return layers[0]
        return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]


Architecture = Residual | Vgg
FAMILIES: dict[str, type[Residual] | type[Vgg]] = {"residual": Residual, "vgg": Vgg}


def write(architecture: Architecture) -> str:
    """An architecture as text that `parse` reads: `vgg:layers=64/0/128/0,norm=true,...`."""
    parts = []
    for f in dataclasses.fields(architecture):
        value = getattr(architecture, f.name)
        text = "/".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
        parts.append(f"{f.name}={text}")
    return f"{type(architecture).__name__.lower()}:{','.join(parts)}"


def parse(text: str) -> Architecture:
    """The architecture of a text. Raises UserError for one that `write` did not write."""
    family, _, rest = text.partition(":")
    if family not in FAMILIES:
        raise UserError(
            f"architecture must begin with {' or '.join(f'{f}:' for f in FAMILIES)}; got {text[:60]!r}"
        )
    hints = typing.get_type_hints(FAMILIES[family])
    given = dict(part.partition("=")[::2] for part in rest.split(","))
    if set(given) != set(hints):
        raise UserError(
            f"architecture {family} needs {', '.join(hints)}; got {', '.join(given)[:100]}"
        )
    return FAMILIES[family](
        **{
            k: registry.convert_text(given[k], hint, f"architecture: {k}")
            for k, hint in hints.items()
        }
    )


class Padded(nn.Module):
    """A shortcut without weights: every second pixel, channels of zeros on both sides."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, (out - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))


class Block(nn.Module):
    """A residual block of two convolutions, or of three as a bottleneck."""

    def __init__(self, a: Residual, stage: int, channels: int, stride: int) -> None:
        super().__init__()
        inner, out = a.inner[stage], a.outer[stage]
        plan = [(channels, inner, 3, stride, 1), (inner, out, 3, 1, 1)]
        if a.bottleneck:
            plan = [
                (channels, inner, 1, 1, 1),
                (inner, inner, 3, stride, a.groups),
                (inner, out, 1, 1, 1),
            ]
        self.pre, self.depth = a.order == "pre", len(plan)
        for i, (wide, to, kernel, step, groups) in enumerate(plan, 1):
            self.add_module(
                f"conv{i}",
                nn.Conv2d(wide, to, kernel, step, kernel // 2, groups=groups, bias=False),
            )
            self.add_module(f"bn{i}", nn.BatchNorm2d(wide if self.pre else to))
        self.shortcut: nn.Module | None = None
        if (stride > 1 or channels != out) and a.projection:
            short: list[nn.Module] = [nn.Conv2d(channels, out, 1, stride, bias=False)]
            self.shortcut = nn.Sequential(*short, *([] if self.pre else [nn.BatchNorm2d(out)]))
        elif stride > 1 or channels != out:
            self.shortcut = Padded(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """With norms before the convolutions, a shortcut that changes the shape reads what the first norm gives."""
        y = F.relu(self.get_submodule("bn1")(x)) if self.pre else x
        short = x if self.shortcut is None else self.shortcut(y)
        for i in range(1, self.depth + 1):
            conv, norm = self.get_submodule(f"conv{i}"), self.get_submodule(f"bn{i}")
            if self.pre:
                y = conv(F.relu(norm(y)) if i > 1 else y)
            else:
                y = norm(conv(y))
                y = F.relu(y) if i < self.depth else y
        return y + short if self.pre else F.relu(y + short)


class ResidualTrunk(nn.Module):
    """The stem, the stages `layer1`, `layer2`, ..., and the pooling."""

    def __init__(self, a: Residual) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            3, a.stem, a.kernel, 2 if a.kernel == 7 else 1, a.kernel // 2, bias=False
        )
        self.bn1 = nn.BatchNorm2d(a.stem) if a.order == "post" else None
        self.maxpool = nn.MaxPool2d(3, 2, 1) if a.kernel == 7 else None
        channels = a.stem
        for i, count in enumerate(a.counts):
            blocks = [
                Block(a, i, channels if j == 0 else a.outer[i], 2 if i and not j else 1)
                for j in range(count)
            ]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            channels = a.outer[i]
        self.stages, self.pool = len(a.counts), a.pool
        self.norm = nn.BatchNorm2d(channels) if a.final else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D)."""
        x = self.conv1(x)
        x = F.relu(self.bn1(x)) if self.bn1 is not None else x
        x = self.maxpool(x) if self.maxpool is not None else x
        for i in range(self.stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
        x = F.relu(self.norm(x)) if self.norm is not None else x
        return F.adaptive_avg_pool2d(x, self.pool).flatten(1)


@dataclass(frozen=True)
class Described:
    """What a file of weights is. trunk, head: its tensors by the names of the modules that `architecture` makes."""

    architecture: Architecture
    trunk: dict[str, Tensor]
    head: dict[str, Tensor]


def describe(tensors: Weights, path: str) -> Described:
    """The architecture that a state dict's names and shapes spell. Raises UserError, one line, for any other.

    It may claim too much: fill the modules on the meta device, and compare (`checkpoints.check`), before memory is spent.
    """
    found = bare(tensors)
    try:
        if "conv1.weight" in found:
            return _residual(found, path)
        if any(k.startswith("features.") for k in found):
            return _vgg(found, path)
    except (KeyError, IndexError, StopIteration) as error:
        raise UserError(
            f"{path}: expected a classifier's weights; {str(error) or 'a part'} is missing or misshapen"
        ) from error
    raise UserError(
        f"{path}: expected a residual network (conv1.weight, layer1.0... or block1.layer.0..., fc or linear) or a VGG "
        f"(features.0..., classifier); its keys are {format_keys(found)}"
    )


def bare(tensors: Weights) -> dict[str, Tensor]:
    """The same without the name that all keys begin with, such as `module.` or `model.`."""
    found = dict(tensors)
    while found and all("." in k for k in found):
        first = {k.partition(".")[0] for k in found}
        if len(first) > 1 or first & {"features", *HEADS}:
            break
        found = {k.partition(".")[2]: v for k, v in found.items()}
    return found


def _residual(found: dict[str, Tensor], path: str) -> Described:
    matrices, head = _head(found, path)
    last = matrices[-1]
    trunk = {_canonical(k): v for k, v in found.items() if k.partition(".")[0] not in HEADS}
    blocks: dict[int, set[str]] = {}
    for key in trunk:
        if match := STAGE.fullmatch(key):
            blocks.setdefault(int(match[1]), set()).add(match[2])
    stages = range(1, len(blocks) + 1)
    if not blocks or set(blocks) != set(stages):
        raise UserError(
            f"{path}: expected stages layer1, layer2, ... or block1.layer, ...; its keys are {format_keys(found)}"
        )
    bottleneck = "layer1.0.conv3.weight" in trunk
    stem = _four(trunk, "conv1.weight", path)
    if stem[1] != 3 or stem[2] not in (3, 7):
        raise UserError(
            f"{path}: expected a stem of 3x3 or 7x7 on three channels; conv1.weight is {stem}"
        )
    firsts = [_four(trunk, f"layer{i}.0.conv1.weight", path) for i in stages]
    outer = tuple(
        _four(trunk, f"layer{i}.0.conv{3 if bottleneck else 2}.weight", path)[0] for i in stages
    )
    inner = tuple(first[0] for first in firsts)
    norm = trunk[f"layer{stages[-1]}.0.bn1.weight"].numel()
    top = next((k for k in NORMS if f"{k}.weight" in trunk), None)
    pre = norm == firsts[-1][1] and (norm != firsts[-1][0] or top is None)
    if pre and stem[2] == 7:
        raise UserError(
            f"{path}: norms before the convolutions and a 7x7 stem; what follows such a stem is not known here"
        )
    if pre and top is not None:
        trunk = {re.sub(rf"^{top}\.", "norm.", k): v for k, v in trunk.items()}
    groups = (
        max(1, inner[0] // max(1, _four(trunk, "layer1.0.conv2.weight", path)[1]))
        if bottleneck
        else 1
    )
    shape = Residual(
        "pre" if pre else "post",
        bottleneck,
        stem[2],
        stem[0],
        tuple(len(blocks[i]) for i in stages),
        inner,
        outer,
        groups,
        any(".shortcut." in k for k in trunk),
        pre and top is not None,
        _pool(last.shape[1], outer[-1], path),
        last.shape[0],
    )
    return Described(shape, trunk, head)


def _canonical(key: str) -> str:
    """The name of a weight in a residual network -> the name in `ResidualTrunk`."""
    match = STAGE.fullmatch(key)
    if not match:
        return key
    part, _, weight = match[3].rpartition(".")
    if short := SHORTCUT.fullmatch(part):
        part = f"shortcut.{short[1] or 0}"
    return f"layer{match[1]}.{match[2]}.{part}.{weight}"


def _vgg(found: dict[str, Tensor], path: str) -> Described:
    numbers = [
        int(k.split(".")[1])
        for k in found
        if re.fullmatch(r"features\.(0|[1-9]\d{0,3})\.weight", k)
    ]
    convolutions = sorted(i for i in numbers if found[f"features.{i}.weight"].ndim == 4)
    if not convolutions:
        raise UserError(
            f"{path}: expected convolutions features.0, ...; its keys are {format_keys(found)}"
        )
    norm = any(k.startswith("features.") and k.endswith("running_mean") for k in found)
    widths = [found[f"features.{i}.weight"].shape[0] for i in convolutions]
    layers: list[int] = []
    renamed: dict[str, str] = {}
    at = 0
    for i, width, after in zip(convolutions, widths, [*convolutions[1:], None], strict=True):
        gap = (
            3 + norm if after is None else after - i
        )  # behind the last convolution, all sources pool
        if gap not in (2 + norm, 3 + norm):
            raise UserError(
                f"{path}: between features.{i} and features.{after} stands more than a norm, a ReLU and a max-pool"
            )
        renamed |= {f"features.{i + k}.": f"{at + k}." for k in range(1 + norm)}
        layers += [width, 0] if gap == 3 + norm else [width]
        at += gap
    trunk = {}
    for key, tensor in found.items():
        stem = key.rpartition(".")[0] + "."
        if key.partition(".")[0] not in HEADS:
            trunk[renamed.get(stem, stem) + key.rpartition(".")[2]] = tensor
    matrices, head = _head(found, path)
    pool = _pool(matrices[0].shape[1], widths[-1], path)
    bias = f"features.{convolutions[0]}.bias" in found
    return Described(
        Vgg(tuple(layers), norm, bias, pool, tuple(m.shape[0] for m in matrices)), trunk, head
    )


def _head(found: Weights, path: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The head's matrices, and its weights by name: of one layer `weight` and `bias`, of several 0, 2, 4, ..."""
    keys = [k for k in found if k.partition(".")[0] in HEADS]
    matrices = sorted(
        (k for k in keys if found[k].ndim == 2),
        key=lambda k: [int(n) for n in re.findall(r"\d{1,4}", k)[:1]],
    )
    if not matrices or len({k.partition(".")[0] for k in keys}) != 1:
        raise UserError(
            f"{path}: expected one head named {', '.join(HEADS[:-1])} or {HEADS[-1]}; "
            f"it has {format_keys(keys) or 'none'} (a trunk without a head is read by the network `imported`)"
        )
    places = {
        k.rpartition(".")[0]: f"{2 * i}." if len(matrices) > 1 else ""
        for i, k in enumerate(matrices)
    }
    named = {
        places.get(k.rpartition(".")[0], k + ".") + k.rpartition(".")[2]: found[k] for k in keys
    }
    return [found[k] for k in matrices], named


def _pool(read: int, channels: int, path: str) -> int:
    """Side of the map that a head reads, flat: it has `read` columns."""
    side = math.isqrt(max(0, read // max(1, channels)))
    if channels < 1 or side < 1 or side * side * channels != read:
        raise UserError(
            f"{path}: expected a head that reads a square map of {channels} channels; it reads {read} numbers"
        )
    return side


def _four(weights: Weights, key: str, path: str) -> tuple[int, ...]:
    """The shape of a convolution's weights."""
    shape = tuple(weights[key].shape)
    if len(shape) != 4 or min(shape) < 1 or shape[2] != shape[3]:
        raise UserError(f"{path}: expected the weights of a convolution; {key} is {shape}")
    return shape


def named_classes(text: str, count: int, owner: str) -> tuple[str, ...]:
    """Class names `a+b`, or of a file (.json: a list; else one a line). Raises UserError unless there are `count` of them."""
    file = Path(text).expanduser()
    names: Iterable[object] = text.split("+")
    if file.suffix in (".txt", ".json"):
        if not os.path.isfile(file) or file.stat().st_size > 1 << 20:
            raise UserError(f"no file of class names of at most 1 MiB at {text!r}")
        try:
            raw = file.read_text(encoding="utf-8")
            names = (
                json.loads(raw)
                if file.suffix == ".json"
                else [line for line in raw.split("\n") if line.strip()]
            )
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{text}: expected names of classes in UTF-8, a list in JSON or one a line"
            ) from error
    if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
        raise UserError(f"{text[:60]}: expected a list of class names")
    stripped = tuple(str(n).strip() for n in names)
    if len(stripped) != count or len(set(stripped)) != count:
        raise UserError(
            f"{owner}: a head of {count} classes; expected as many different names, got {len(set(stripped))}"
        )
    return stripped
