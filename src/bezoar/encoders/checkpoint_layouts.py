"""How published checkpoints name their weights: which layout a file has, and which architecture its shapes spell.

Facts of the layouts: BadEncoder keeps SimCLR's model of 2020 (`f.`, an unnamed sequence of a ResNet's parts, and the head
`g.`) within one more `f.`, and CLIP's or SimCLR's ImageNet tower as `visual.`; MoCo keeps the encoder that is trained as
`encoder_q.`; torchvision's names stand underneath all of them. Everything here looks at keys and shapes alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bezoar.data.files.checkpoints import format_keys
from bezoar.encoders.small_towers import DEPTHS
from bezoar.errors import UserError

TEXT = (
    "transformer.",
    "text.",
    "token_embedding.",
    "ln_final.",
    "positional_embedding",
    "text_projection",
    "logit_scale",
)
STEM = {
    "0": "conv1",
    "1": "bn1",
}  # parts of an unnamed sequence; 2 is a ReLU, a max-pool would be 3


@dataclass(frozen=True)
class Layout:
    """Where a trunk lies among a checkpoint's keys: under `prefix`. heads: beginnings of keys that are left out."""

    name: str
    prefix: str
    heads: tuple[str, ...] = ()
    unnamed: bool = False

    @property
    def first(self) -> str:
        """The key of the first convolution."""
        return self.prefix + ("0.weight" if self.unnamed else "conv1.weight")


LAYOUTS = (
    Layout("badencoder", "f.f.", ("g.",), unnamed=True),
    Layout("simclr", "f.", ("g.", "fc."), unnamed=True),
    Layout("moco", "encoder_q.", ("encoder_q.fc.", "encoder_k.", "queue", "scalar_label")),
    Layout(
        "open_clip", "visual.", ("input_resolution", "context_length", "vocab_size")
    ),  # numbers among OpenAI's weights
    Layout("visual", "visual.", ("visual.fc.",)),
    Layout("torchvision", "", ("fc.",)),
)


def recognise(tensors: Mapping[str, Tensor], path: str) -> Layout:
    """The layout whose first convolution a checkpoint holds. Raises UserError that says what was looked for."""
    for layout in LAYOUTS:
        if layout.first in tensors and (
            layout.name != "open_clip" or any(k.startswith(TEXT) for k in tensors)
        ):
            return layout
    known = "; ".join(f"{v.name} ({v.first})" for v in LAYOUTS)
    raise UserError(
        f"{path}: expected one of the layouts {known}; its keys are {format_keys(tensors)}"
    )


def trunk(kept: Mapping[str, Tensor], layout: Layout, path: str) -> dict[str, Tensor]:
    """What remains of a checkpoint without its heads -> an image tower's weights with torchvision's or open_clip's names."""
    stray = [k for k in kept if not k.startswith(layout.prefix)]
    if stray:
        raise UserError(
            f"{path}: layout {layout.name} keeps its weights under {layout.prefix}; unexpected: {format_keys(stray)}"
        )
    found = {k.removeprefix(layout.prefix): v for k, v in kept.items()}
    return named(found, path) if layout.unnamed else found


def named(parts: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Keys of an unnamed sequence -> torchvision's. Stages begin at 3, or at 4 behind a max-pool, which the stem must match."""
    first = 4 if any(k.startswith("7.") for k in parts) else 3
    names = STEM | {str(first + i): f"layer{i + 1}" for i in range(4)}
    stray = [k for k in parts if k.partition(".")[0] not in names]
    if stray:
        raise UserError(
            f"{path}: expected a stem (0, 1) and four stages ({first} to {first + 3}); unexpected: {format_keys(stray)}"
        )
    kernel = parts["0.weight"].shape[-1] if parts["0.weight"].ndim else 0
    if (kernel == 7) != (first == 4):
        pool = "with" if first == 4 else "without"
        raise UserError(
            f"{path}: expected a 3x3 stem without a max-pool or 7x7 with one; it is {kernel}x{kernel} {pool} one"
        )
    return {names[k.partition(".")[0]] + "." + k.partition(".")[2]: v for k, v in parts.items()}


def shape(trunk: Mapping[str, Tensor], path: str) -> tuple[int, str, int]:
    """Depth, stem and width of a residual network with torchvision's names. Raises UserError for one that is none."""
    first = trunk["conv1.weight"].shape
    stems = {7: "imagenet", 3: "cifar"}
    if len(first) != 4 or first[1] != 3 or first[2] != first[3] or first[2] not in stems:
        raise UserError(
            f"{path}: expected a stem of 3x3 or 7x7 on three channels; conv1.weight is {tuple(first)}"
        )
    counts = tuple(
        len({k.split(".")[1] for k in trunk if k.startswith(f"layer{i}.")}) for i in range(1, 5)
    )
    bottleneck = "layer1.0.conv3.weight" in trunk
    depth = next((d for d, known in DEPTHS.items() if known == (counts, bottleneck)), None)
    if depth is None:
        kind = "three" if bottleneck else "two"
        raise UserError(
            f"{path}: expected a ResNet of depth {', '.join(map(str, DEPTHS))}; "
            f"its four stages have {'-'.join(map(str, counts))} blocks of {kind} convolutions"
        )
    return depth, stems[first[2]], first[0]


def simclr_imagenet(trunk: Mapping[str, Tensor], layout: Layout) -> bool:
    """Whether a ResNet is the one SimCLR published for ImageNet, which reads pixels in 0..1 as they are.

    BadEncoder keeps it as `visual.`; elsewhere it has torchvision's names, but a shortcut stands before its convolutions.
    """
    order = list(trunk)
    keys = ("layer1.0.downsample.0.weight", "layer1.0.conv1.weight", "layer1.0.conv3.weight")
    first = all(k in trunk for k in keys) and order.index(keys[0]) < order.index(keys[1])
    return layout.name == "visual" or first


def architecture(trunk: Mapping[str, Tensor], both: Mapping[str, Tensor] | None, path: str) -> str:
    """The open_clip architecture whose sizes a checkpoint has: its image tower's, and with `both` its text tower's.

    Raises UserError when none has, and when several have that compute different things from the same weights.
    """
    import open_clip

    seen = _vision(trunk, path) | (_text(both) if both is not None else {})
    fit = []
    for name in open_clip.list_models():
        config: dict[str, Any] = open_clip.get_model_config(name) or {}
        image, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
        if "timm_model_name" in image or "hf_model_name" in text or "multimodal_cfg" in config:
            continue
        image, text = _filled(open_clip.CLIPVisionCfg, image), _filled(open_clip.CLIPTextCfg, text)
        layers = (
            tuple(image["layers"])
            if isinstance(image["layers"], (list, tuple))
            else image["layers"]
        )
        sizes = {
            "image_size": image["image_size"],
            "layers": layers,
            "width": image["width"],
            "embed_dim": config["embed_dim"],
        }
        if not isinstance(layers, tuple):
            sizes["patch_size"] = image["patch_size"]
        if both is not None:
            sizes |= {
                f"text_{k}": text[k] for k in ("layers", "width", "context_length", "vocab_size")
            }
        if sizes == seen:
            fit.append(name)
    if not fit:
        raise UserError(
            f"{path}: no architecture of open_clip's has "
            + ", ".join(f"{k} {v}" for k, v in seen.items())
        )
    if len(fit) > 1 and (both is not None or not isinstance(seen["layers"], tuple)):
        raise UserError(
            f"{path}: its weights fit several architectures, which activate differently; say model= one of {', '.join(fit)}"
        )
    return min(fit, key=len)


def _filled(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {f.name: given.get(f.name, f.default) for f in dataclasses.fields(kind)}


def _vision(trunk: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """The sizes of a CLIP image tower, read off its weights."""
    try:
        if "class_embedding" in trunk:
            patch, tokens = trunk["conv1.weight"].shape[-1], len(trunk["positional_embedding"])
            layers: Any = len(
                {k.split(".")[2] for k in trunk if k.startswith("transformer.resblocks.")}
            )
            sizes = {
                "width": trunk["conv1.weight"].shape[0],
                "embed_dim": trunk["proj"].shape[1],
                "patch_size": patch,
            }
        else:
            patch, tokens = 32, len(trunk["attnpool.positional_embedding"])
            layers = tuple(
                len({k.split(".")[1] for k in trunk if k.startswith(f"layer{i}.")})
                for i in range(1, 5)
            )
            sizes = {
                "width": len(trunk["layer1.0.conv1.weight"]),
                "embed_dim": len(trunk["attnpool.c_proj.weight"]),
            }
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{path}: expected an image tower of CLIP; {error} is missing or of another shape"
        ) from error
    return {"image_size": patch * round(max(0, tokens - 1) ** 0.5), "layers": layers, **sizes}


def _text(both: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes of a CLIP text tower, 0 where its weights have other names."""
    tower = {k.removeprefix("text."): v for k, v in both.items() if not k.startswith("visual.")}
    tables = [
        tower[k].shape if k in tower else ()
        for k in ("token_embedding.weight", "positional_embedding")
    ]
    (words, width), (context, _) = (table if len(table) == 2 else (0, 0) for table in tables)
    layers = len({k.split(".")[2] for k in tower if k.startswith("transformer.resblocks.")})
    return {
        "text_layers": layers,
        "text_width": width,
        "text_context_length": context,
        "text_vocab_size": words,
    }
