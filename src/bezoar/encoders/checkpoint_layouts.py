"""Recognises published checkpoints by the names and shapes of their weights.

BadEncoder stores SimCLR's model of 2020 (`f.`, an unnamed sequence of a ResNet's parts, and the
head `g.`) below one more `f.`, and CLIP's or SimCLR's ImageNet tower as `visual.`. MoCo stores the
trained encoder as `encoder_q.`. Below these prefixes are torchvision's names.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bezoar.data.files.checkpoints import format_keys
from bezoar.encoders.small_towers import RESNETS
from bezoar.errors import UserError

Weights = Mapping[str, Tensor]

TEXT_KEYS = (
    "transformer.", "text.", "token_embedding.", "ln_final.", "positional_embedding",
    "text_projection", "logit_scale",
)  # fmt: skip
# Parts of an unnamed sequence before its stages; part 2 is a ReLU, and part 3 a max-pool where
# there is one.
STEM_PARTS = {"0": "conv1", "1": "bn1"}
STEMS = {7: "imagenet", 3: "cifar"}  # by the side of the first convolution


@dataclass(frozen=True)
class Layout:
    """The place of an image tower among a checkpoint's keys."""

    name: str  # name of the layout
    prefix: str  # prefix of the tower's keys
    heads: tuple[str, ...] = ()  # beginnings of keys that are left out
    unnamed: bool = False  # whether the tower's parts are numbered instead of named

    @property
    def first_key(self) -> str:
        """The key of the first convolution."""
        return self.prefix + ("0.weight" if self.unnamed else "conv1.weight")


LAYOUTS = (
    Layout("badencoder", "f.f.", ("g.",), unnamed=True),
    Layout("simclr", "f.", ("g.", "fc."), unnamed=True),
    Layout("moco", "encoder_q.", ("encoder_q.fc.", "encoder_k.", "queue", "scalar_label")),
    # OpenAI's files hold these three numbers among the weights.
    Layout("open_clip", "visual.", ("input_resolution", "context_length", "vocab_size")),
    Layout("visual", "visual.", ("visual.fc.",)),
    Layout("torchvision", "", ("fc.",)),
)


def encoder_prefixes(tensors: Weights) -> list[str]:
    """The prefixes of the encoders in a checkpoint."""
    places: dict[str, tuple[str, Layout]] = {}  # by the prefix of the tower
    for key in tensors:
        for layout in LAYOUTS:
            prefix = key.removesuffix(layout.first_key)
            if prefix == key or (prefix and not prefix.endswith(".")):
                continue
            tower = prefix + layout.prefix
            if _begins_tower(tensors, tower, layout.unnamed):
                places.setdefault(tower, (prefix, layout))
    # Leave out encoders that are part of another layout's heads, such as MoCo's `encoder_k`.
    left_out = tuple(prefix + head for prefix, layout in places.values() for head in layout.heads)
    return [prefix for tower, (prefix, _) in places.items() if not tower.startswith(left_out)]


def _begins_tower(tensors: Weights, tower: str, unnamed: bool) -> bool:
    """Whether a prefix holds the first stage of a residual network, or CLIP's class token."""
    first = ("3.0.", "4.0.") if unnamed else ("layer1.0.",)
    blocks = [f"{tower}{block}conv1.weight" for block in first]
    return any(key in tensors for key in [*blocks, f"{tower}class_embedding"])


def recognise_layout(tensors: Weights, path: str) -> Layout:
    """The layout whose first convolution a checkpoint holds. Raises UserError if there is none."""
    has_text = any(key.startswith(TEXT_KEYS) for key in tensors)
    for layout in LAYOUTS:
        if layout.first_key in tensors and (layout.name != "open_clip" or has_text):
            return layout
    layouts = "; ".join(f"{layout.name} ({layout.first_key})" for layout in LAYOUTS)
    raise UserError(
        f"{path}: expected one of the layouts {layouts}; its keys are {format_keys(tensors)}"
    )


def extract_tower(tensors: Weights, layout: Layout, path: str) -> dict[str, Tensor]:
    """The image tower of a checkpoint without heads, by torchvision's or open_clip's names.

    Raises:
        UserError: for keys outside the layout's prefix, and for a sequence that is no residual
        network.
    """
    stray = [key for key in tensors if not key.startswith(layout.prefix)]
    if stray:
        raise UserError(
            f"{path}: layout {layout.name} keeps its weights under {layout.prefix}; "
            f"unexpected: {format_keys(stray)}"
        )
    tower = {key.removeprefix(layout.prefix): tensor for key, tensor in tensors.items()}
    return _name_parts(tower, path) if layout.unnamed else tower


def _name_parts(sequence: Weights, path: str) -> dict[str, Tensor]:
    """Give the parts of an unnamed sequence torchvision's names.

    The four stages begin at part 3, or at part 4 after a max-pool. A 7x7 stem has a max-pool, and
    a 3x3 stem has none.
    """
    first_stage = 4 if any(key.startswith("7.") for key in sequence) else 3
    names = STEM_PARTS | {str(first_stage + i): f"layer{i + 1}" for i in range(4)}
    stray = [key for key in sequence if key.partition(".")[0] not in names]
    if stray:
        raise UserError(
            f"{path}: expected a stem (0, 1) and four stages ({first_stage} to {first_stage + 3}); "
            f"unexpected: {format_keys(stray)}"
        )
    stem = sequence["0.weight"]
    kernel = stem.shape[-1] if stem.ndim else 0
    if (kernel == 7) != (first_stage == 4):
        pool = "with" if first_stage == 4 else "without"
        raise UserError(
            f"{path}: expected a 3x3 stem without a max-pool or 7x7 with one; "
            f"it is {kernel}x{kernel} {pool} one"
        )
    named = {}
    for key, tensor in sequence.items():
        part, _, rest = key.partition(".")
        named[f"{names[part]}.{rest}"] = tensor
    return named


def is_clip_tower(tower: Weights) -> bool:
    """Whether an image tower is CLIP's, a ResNet with attention pooling or a vision transformer."""
    return "attnpool.positional_embedding" in tower or "class_embedding" in tower


def resnet_shape(tower: Weights, path: str) -> tuple[int, str, int]:
    """Depth, stem and width of a ResNet with torchvision's names, as `ResNetTrunk` takes them.

    Raises:
        UserError: for another network.
    """
    first = tower["conv1.weight"].shape
    if len(first) != 4 or first[1] != 3 or first[2] != first[3] or first[2] not in STEMS:
        raise UserError(
            f"{path}: expected a stem of 3x3 or 7x7 on three channels; conv1.weight is "
            f"{tuple(first)}"
        )
    counts = tuple(_count_blocks(tower, f"layer{i}.") for i in range(1, 5))
    bottleneck = "layer1.0.conv3.weight" in tower
    for depth, blocks in RESNETS.items():
        if blocks == (counts, bottleneck):
            return depth, STEMS[first[2]], first[0]
    kind = "three" if bottleneck else "two"
    raise UserError(
        f"{path}: expected a ResNet of depth {', '.join(map(str, RESNETS))}; "
        f"its four stages have {'-'.join(map(str, counts))} blocks of {kind} convolutions"
    )


def _count_blocks(tower: Weights, stage: str) -> int:
    return len({key.split(".")[1] for key in tower if key.startswith(stage)})


def is_simclr_imagenet(tower: Weights, layout: Layout) -> bool:
    """Whether a ResNet is SimCLR's for ImageNet, whose input is pixels in 0..1.

    BadEncoder stores it as `visual.`. Elsewhere it has torchvision's names, but the shortcut of a
    block is stored before its convolutions.
    """
    if layout.name == "visual":
        return True
    shortcut, first, last = (
        f"layer1.0.{part}.weight" for part in ("downsample.0", "conv1", "conv3")
    )
    if not {shortcut, first, last} <= set(tower):
        return False
    order = list(tower)
    return order.index(shortcut) < order.index(first)
