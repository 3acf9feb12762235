"""Residual networks and VGGs, the most common image classifiers, as modules and as text.

Residual networks have norms after the convolutions (He et al. 2016, CVPR; ResNeXt) or before them
(He et al. 2016, ECCV; Zagoruyko and Komodakis 2016). VGG is by Simonyan and Zisserman (2015).
`classifier_weights` finds the architecture of a file. What no weight shows is fixed: every stage
after the first halves the sides in a 3x3 convolution; a 7x7 stem has stride 2 and a max-pool, and a
3x3 stem has stride 1; activations are ReLU.
"""

import dataclasses
import itertools
import typing
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from bezoar import registry
from bezoar.errors import UserError


@dataclass(frozen=True)
class Residual:
    """A residual network."""

    # norms come after the convolutions (`post`) or before them (`pre`)
    order: typing.Literal["post", "pre"]
    bottleneck: bool  # a block has three convolutions rather than two
    kernel: int  # side of the first convolution, 3 or 7
    stem: int  # channels of the first convolution
    counts: tuple[int, ...]  # blocks of each stage
    inner: tuple[int, ...]  # channels within the blocks of each stage
    outer: tuple[int, ...]  # channels after a block of each stage
    groups: int  # groups of the 3x3 convolution of a bottleneck
    # a shortcut that changes the shape is a 1x1 convolution; otherwise it skips pixels and pads
    # channels of zeros on both sides (He et al. 2016, option A)
    projection: bool
    final: bool  # there is a norm before the pooling
    pool: int  # side of the map that the last stage is pooled to
    classes: int  # number of classes of the head

    @property
    def side(self) -> int:
        """The usual side in pixels of the input for such a stem."""
        return 224 if self.kernel == 7 else 32

    def build_trunk(self) -> nn.Module:
        """A fresh module (B, 3, S, S) -> (B, D), the head's input."""
        return ResidualTrunk(self)

    def build_head(self) -> nn.Module:
        """A fresh module (B, D) -> logits (B, classes)."""
        return nn.Linear(self.outer[-1] * self.pool**2, self.classes)


@dataclass(frozen=True)
class Vgg:
    """A network of the VGG family."""

    layers: tuple[int, ...]  # channels of each convolution; 0 stands for a max-pool
    norm: bool  # batch norms follow the convolutions
    bias: bool  # the convolutions have biases
    pool: int  # side of the map that the last layer is pooled to
    widths: tuple[int, ...]  # units of each layer of the head; the last is the number of classes

    @property
    def side(self) -> int:
        """The input's side in pixels: the pooled map's, doubled for each max-pool, or 32."""
        return self.pool << self.layers.count(0) if self.pool > 1 else 32

    @property
    def classes(self) -> int:
        """The number of classes of the head."""
        return self.widths[-1]

    def build_trunk(self) -> nn.Module:
        """A fresh module (B, 3, S, S) -> (B, D), the flattened map."""
        parts: list[nn.Module] = []
        channels = 3
        for width in self.layers:
            if width == 0:
                parts.append(nn.MaxPool2d(2))
                continue
            parts.append(nn.Conv2d(channels, width, 3, 1, 1, bias=self.bias))
            if self.norm:
                parts.append(nn.BatchNorm2d(width))
            parts.append(nn.ReLU())
            channels = width
        return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(self.pool), nn.Flatten())

    def build_head(self) -> nn.Module:
        """A fresh module (B, D) -> logits (B, classes), without the dropout of training."""
        channels = next(width for width in reversed(self.layers) if width)
        sizes = (channels * self.pool**2, *self.widths)
        layers = [nn.Linear(before, after) for before, after in itertools.pairwise(sizes)]
        if len(layers) == 1:
            return layers[0]
        parts: list[nn.Module] = [layers[0]]
        for layer in layers[1:]:
            parts += [nn.ReLU(), layer]
        return nn.Sequential(*parts)


Architecture = Residual | Vgg
FAMILIES: dict[str, type[Residual] | type[Vgg]] = {"residual": Residual, "vgg": Vgg}


def format_architecture(architecture: Architecture) -> str:
    """An architecture as text: `vgg:layers=64/0/128/0,norm=true,...`."""
    parts = []
    for field in dataclasses.fields(architecture):
        value = getattr(architecture, field.name)
        text = "/".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
        parts.append(f"{field.name}={text}")
    return f"{type(architecture).__name__.lower()}:{','.join(parts)}"


def parse_architecture(text: str) -> Architecture:
    """The architecture of a text by `format_architecture`. Raises UserError for another text."""
    family, _, rest = text.partition(":")
    if family not in FAMILIES:
        families = " or ".join(f"{name}:" for name in FAMILIES)
        raise UserError(f"architecture must begin with {families}; got {text[:60]!r}")
    hints = typing.get_type_hints(FAMILIES[family])
    texts = dict(part.partition("=")[::2] for part in rest.split(","))
    if set(texts) != set(hints):
        raise UserError(
            f"architecture {family} needs {', '.join(hints)}; got {', '.join(texts)[:100]}"
        )
    values = {
        name: registry.convert_text(texts[name], hint, f"architecture: {name}")
        for name, hint in hints.items()
    }
    return FAMILIES[family](**values)


class PaddedShortcut(nn.Module):
    """A shortcut without weights: every `stride`-th pixel, and channels of zeros on both sides."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = (out - channels) // 2  # channels on each side

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H / stride, W / stride)."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding))


class Block(nn.Module):
    """A residual block of two convolutions, or of three as a bottleneck."""

    def __init__(self, a: Residual, stage: int, channels: int, stride: int) -> None:
        super().__init__()
        inner, out = a.inner[stage], a.outer[stage]
        # input channels, output channels, kernel, stride and groups of each convolution
        convolutions = [(channels, inner, 3, stride, 1), (inner, out, 3, 1, 1)]
        if a.bottleneck:
            convolutions = [
                (channels, inner, 1, 1, 1),
                (inner, inner, 3, stride, a.groups),
                (inner, out, 1, 1, 1),
            ]
        self.pre = a.order == "pre"
        self.depth = len(convolutions)
        for i, (before, after, kernel, step, groups) in enumerate(convolutions, 1):
            conv = nn.Conv2d(before, after, kernel, step, kernel // 2, groups=groups, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(before if self.pre else after))
        self.shortcut: nn.Module | None = None
        if stride > 1 or channels != out:
            self.shortcut = self._build_shortcut(a, channels, out, stride)

    def _build_shortcut(self, a: Residual, channels: int, out: int, stride: int) -> nn.Module:
        if not a.projection:
            return PaddedShortcut(channels, out, stride)
        conv = nn.Conv2d(channels, out, 1, stride, bias=False)
        return nn.Sequential(conv) if self.pre else nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """In a block with norms first, the shortcut reads the output of the first norm and ReLU."""
        y = F.relu(self.get_submodule("bn1")(x)) if self.pre else x
        shortcut = x if self.shortcut is None else self.shortcut(y)
        for i in range(1, self.depth + 1):
            conv, norm = self.get_submodule(f"conv{i}"), self.get_submodule(f"bn{i}")
            if self.pre:
                y = conv(F.relu(norm(y)) if i > 1 else y)
            else:
                y = norm(conv(y))
                y = F.relu(y) if i < self.depth else y
        return y + shortcut if self.pre else F.relu(y + shortcut)


class ResidualTrunk(nn.Module):
    """The stem, the stages `layer1`, `layer2`, ..., and the pooling of a residual network."""

    def __init__(self, a: Residual) -> None:
        super().__init__()
        stride = 2 if a.kernel == 7 else 1
        self.conv1 = nn.Conv2d(3, a.stem, a.kernel, stride, a.kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(a.stem) if a.order == "post" else None
        self.maxpool = nn.MaxPool2d(3, 2, 1) if a.kernel == 7 else None
        channels = a.stem
        for i, count in enumerate(a.counts):
            first = Block(a, i, channels, 2 if i else 1)
            others = [Block(a, i, a.outer[i], 1) for _ in range(count - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *others))
            channels = a.outer[i]
        self.stages = len(a.counts)
        self.pool = a.pool
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
