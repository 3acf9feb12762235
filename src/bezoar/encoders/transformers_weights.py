"""Translates models of the library transformers into equal models of open_clip and timm.

CLIP becomes open_clip's; SigLIP's image tower, ViT and DINOv2 become timm's vision transformer. The
library itself is not needed: config.json states the sizes, and the weights are renamed. Both the
names of published files and those of transformers 5 are known.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar import registry
from bezoar.data.files.artefacts import Facts
from bezoar.data.files.checkpoints import format_keys
from bezoar.encoders import timm_models, weight_prefixes
from bezoar.errors import UserError

Weights = Mapping[str, Tensor]

LARGEST = 1 << 18  # of a size that a config states
DEEPEST = 1 << 9  # blocks
CLIP_WORDS = 49408  # tokens of CLIP's own vocabulary
# A weight of block i of a tower.
BLOCK = re.compile(r"(?:encoder\.)?layers?\.(\d{1,3})\.(.+)\.(weight|bias|lambda1)")
PARTS = {
    "attention.attention.query": "q",
    "attention.attention.key": "k",
    "attention.attention.value": "v",
    "attention.output.dense": "proj",
    "attention.o_proj": "proj",
    "self_attn.out_proj": "proj",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
}
PARTS |= {f"{owner}.{x}_proj": x for owner in ("attention", "self_attn") for x in "qkv"}
PARTS |= {f"{norm}{i}": f"norm{i}" for norm in ("layer_norm", "norm") for i in (1, 2)}
# Names of the parts of a block, including the character before `weight` and `bias`.
TIMM = {"qkv": "attn.qkv.", "proj": "attn.proj.", "fc1": "mlp.fc1.", "fc2": "mlp.fc2."}
TIMM |= {part: f"{part}." for part in ("norm1", "norm2", "ls1", "ls2")}
OPEN_CLIP = {"qkv": "attn.in_proj_", "proj": "attn.out_proj.", "fc1": "mlp.c_fc."}
OPEN_CLIP |= {"fc2": "mlp.c_proj.", "norm1": "ln_1.", "norm2": "ln_2."}
TIMM_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
PREFIXES = ("vit.", "dinov2.", "dinov2_with_registers.")


@dataclass(frozen=True)
class Translation:
    """A network of open_clip's or timm's, and the weights that fill it."""

    network: str  # the spec that builds it
    what: str  # the network in words
    weights: dict[str, Tensor]  # weights by the names of that network
    size: int  # side of the input in pixels
    mean_std: str  # the usual normalisation of such a network
    # `weight` and `bias` of the classifier, if there is one
    head: dict[str, Tensor] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()  # beginnings of the names of weights that are left out


def translate(config: Facts, tensors: Weights, side: int, path: str) -> Translation:
    """Translate a model of transformers.

    Args:
        config: its config.json.
        tensors: its weights.
        side: side in pixels of the images that its preprocessor makes; 0 if unknown.
        path: its folder, for messages.

    Raises:
        UserError: for another kind of model, and for sizes or names that do not fit.
    """
    kind = config.text("model_type")
    if kind not in KINDS:
        raise UserError(
            f"{path}: a model {kind[:40]!r} of transformers; read are {', '.join(KINDS)}"
        )
    try:
        return KINDS[kind](config, dict(tensors), side, path)
    except (KeyError, IndexError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: weights of a {kind} of transformers; {str(error)[:100]} is missing or "
            "misshapen"
        ) from error


def _number(config: Facts, name: str, usual: int | None = None) -> int:
    """A size that a config states. Raises UserError for other values."""
    value = config.get(name, usual)
    if not isinstance(value, int) or not 0 < value <= LARGEST:
        raise UserError(f"{config.file}: {name} must be a whole number in 1..{LARGEST}")
    return value


def _sizes(config: Facts) -> dict[str, int]:
    """Width, depth, heads and hidden width of a transformer, defaults as in transformers."""
    width = _number(config, "hidden_size", 768)
    ratio = config.get("mlp_ratio")  # DINOv2 states this instead of the hidden width
    hidden = 3072
    if ratio is not None:
        if not isinstance(ratio, int | float) or not 0 < ratio <= LARGEST:
            raise UserError(f"{config.file}: mlp_ratio must be a number in 0..{LARGEST}")
        hidden = int(width * ratio)
    sizes = {
        "width": width,
        "depth": _number(config, "num_hidden_layers", 12),
        "heads": _number(config, "num_attention_heads", 12),
        "hidden": _number(config, "intermediate_size", hidden),
    }
    if sizes["depth"] > DEEPEST or sizes["width"] % sizes["heads"]:
        raise UserError(f"{config.file}: no transformer has {sizes}")
    return sizes


def _part(config: Facts, name: str) -> Facts:
    """The config of a tower: an object within the config of both towers, or the config itself."""
    return config.object(name) if name in config else config


# Names


def _rename_blocks(
    tensors: Weights, names: Mapping[str, str], prefix: str, path: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rename the blocks of a transformer. Returns their weights, and all other weights.

    Args:
        names: new name of each part of a block, `TIMM` or `OPEN_CLIP`.
        prefix: prefix of the new names.
        path: of the folder, for messages.
    """
    renamed: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    qkv: dict[tuple[str, str], dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = BLOCK.fullmatch(key)
        if not match:
            others[key] = tensor
            continue
        part, weight = PARTS.get(match[2], ""), match[3].replace("lambda1", "gamma")
        if part in ("q", "k", "v"):
            qkv.setdefault((match[1], weight), {})[part] = tensor
        elif part in names:
            renamed[f"{prefix}{match[1]}.{names[part]}{weight}"] = tensor
        else:
            unknown.append(key)
    _refuse_rest(unknown, path)
    for (number, weight), parts in qkv.items():
        joint = torch.cat([parts["q"], parts["k"], parts["v"]])
        renamed[f"{prefix}{number}.{names['qkv']}{weight}"] = joint
    return renamed, others


def _take(others: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Remove weights from `others` and return them by their new names."""
    return {new: others.pop(old) for old, new in names.items() if old in others}


def _norm(old: str, new: str) -> dict[str, str]:
    return {f"{old}.{part}": f"{new}.{part}" for part in ("weight", "bias")}


CLIP_NAMES = {  # of both towers, beside the blocks
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    **_norm("pre_layrnorm", "ln_pre"),
    **_norm("post_layernorm", "ln_post"),
    **_norm("final_layer_norm", "ln_final"),
}


def _refuse_rest(keys: Collection[str], path: str) -> None:
    if keys:
        raise UserError(f"{path}: weights of transformers; unexpected: {format_keys(keys)}")


def _drop(others: dict[str, Tensor], *beginnings: str) -> tuple[str, ...]:
    """Remove weights from `others`. Returns those of the beginnings that occurred."""
    dropped = {b for b in beginnings for key in others if key.startswith(b)}
    for key in [key for key in others if key.startswith(beginnings)]:
        del others[key]
    return tuple(sorted(b.rstrip(".") for b in dropped))


# ViT and DINOv2


def _translate_vit(
    config: Facts, tensors: dict[str, Tensor], side: int, path: str, dino: bool = False
) -> Translation:
    """ViT (Dosovitskiy et al. 2021), or DINOv2 (Oquab et al. 2024) with or without registers."""
    prefix = next((p for p in PREFIXES if any(k.startswith(p) for k in tensors)), "")
    tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    if dino:
        config.setdefault("mlp_ratio", 4)
    sizes = _sizes(config)
    if config.get("use_swiglu_ffn"):
        raise UserError(f"{path}: a DINOv2 with gated blocks (SwiGLU) is not read")
    weights, others = _rename_blocks(tensors, TIMM, "blocks.", path)
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.register_tokens": "reg_token",
        **_norm("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        **_norm("layernorm", "norm"),
    }
    weights |= _take(others, names)
    left_out = _drop(others, "embeddings.mask_token", "pooler.")
    head: dict[str, Tensor] = {}
    if dino:  # its classifier also reads the mean of the patches, which timm's does not
        left_out += _drop(others, "classifier.")
    else:
        head = _take(others, _norm("classifier", "head"))
    _refuse_rest(others, path)
    patch = _number(config, "patch_size", 14 if config["model_type"] == "dinov2" else 16)
    image_size = _number(config, "image_size", 224)
    positions = weights["pos_embed"]
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else None
    if dino and side:  # fit the positional embeddings to the preprocessor's images
        image_size = side // patch * patch
        positions = _fit_positions(positions, image_size // patch, antialias=registers is not None)
        weights["pos_embed"] = positions
    if registers:  # in timm the registers and the class token have no positional embeddings
        weights["cls_token"] = weights["cls_token"] + positions[:, :1]
        weights["pos_embed"] = positions[:, 1:]
    arguments = _arguments(
        config,
        path,
        img_size=image_size,
        patch_size=patch,
        qkv_bias=bool(config.get("qkv_bias", True)),
        norm_eps=float(config.get("layer_norm_eps", 1e-6 if dino else 1e-12)),
        init_values=1.0 if dino else None,
        reg_tokens=registers,
        no_embed_class=True if registers else None,
    )
    name = "DINOv2" if dino else "ViT"
    return Translation(
        _timm_spec(arguments),
        f"a {name} of transformers, {sizes['depth']} blocks of {sizes['width']}, patches of "
        f"{patch} px",
        weights,
        image_size,
        "imagenet" if dino else "half",
        {key.removeprefix("head."): tensor for key, tensor in head.items()},
        left_out,
    )


def _translate_dinov2(
    config: Facts, tensors: dict[str, Tensor], side: int, path: str
) -> Translation:
    return _translate_vit(config, tensors, side, path, dino=True)


def _fit_positions(positions: Tensor, grid: int, antialias: bool) -> Tensor:
    """Resize positional embeddings (1, 1 + P, D) to another number of patches, as DINOv2 does."""
    if positions.ndim != 3:
        raise UserError(
            f"position_embeddings {tuple(positions.shape)}; expected (1, 1 + patches, D)"
        )
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == grid:
        return positions
    first, rest = positions[:, :1].float(), positions[:, 1:].float()
    square = rest.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    square = F.interpolate(
        square, (grid, grid), mode="bicubic", align_corners=False, antialias=antialias
    )
    return torch.cat([first, square.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def _activation(config: Facts, path: str) -> str:
    name = config.get("hidden_act", "gelu")
    if name not in TIMM_ACTIVATIONS:
        raise UserError(
            f"{path}: activation {str(name)[:40]}; read are {', '.join(TIMM_ACTIVATIONS)}"
        )
    return TIMM_ACTIVATIONS[name]


def _arguments(config: Facts, path: str, **others: object) -> str:
    """The arguments of timm's vision transformer for the sizes of a config, and some others."""
    sizes = _sizes(config)
    return timm_models.format_arguments(
        embed_dim=sizes["width"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
        mlp_ratio=timm_models.mlp_ratio(sizes["hidden"], sizes["width"]),
        act_layer=_activation(config, path),
        **others,
    )


def _timm_spec(arguments: str) -> str:
    return f"timm:model=vit_base_patch16_224,arguments={registry.spec_value(arguments)}"


# SigLIP


def _translate_siglip(
    config: Facts, tensors: dict[str, Tensor], side: int, path: str
) -> Translation:
    """The image tower of SigLIP (Zhai et al. 2023). The tokenizer of its texts is not supported."""
    vision = _part(config, "vision_config")
    tower, rest = _split_tower(tensors, path)
    left_out = _drop(rest, "text_model.", "logit_scale", "logit_bias")
    _refuse_rest(rest, path)
    sizes = _sizes(vision)
    weights, others = _rename_blocks(tower, TIMM, "blocks.", path)
    _drop(others, "embeddings.position_ids")
    weights["pos_embed"] = others.pop("embeddings.position_embedding.weight")[None]
    weights["attn_pool.latent"] = others.pop("head.probe")
    for part in ("weight", "bias"):
        joint = others.pop(f"head.attention.in_proj_{part}")
        query, key, value = joint.chunk(3)
        weights[f"attn_pool.q.{part}"] = query
        weights[f"attn_pool.kv.{part}"] = torch.cat([key, value])
    names = _norm("embeddings.patch_embedding", "patch_embed.proj") | _norm(
        "post_layernorm", "norm"
    )
    pool = {"attention.out_proj": "proj", "layernorm": "norm", "mlp.fc1": "mlp.fc1"}
    for old, new in (pool | {"mlp.fc2": "mlp.fc2"}).items():
        names |= _norm(f"head.{old}", f"attn_pool.{new}")
    weights |= _take(others, names)
    _refuse_rest(others, path)
    patch, image_size = _number(vision, "patch_size", 16), _number(vision, "image_size", 224)
    vision.setdefault("hidden_act", "gelu_pytorch_tanh")
    arguments = _arguments(
        vision,
        path,
        img_size=image_size,
        patch_size=patch,
        norm_eps=float(vision.get("layer_norm_eps", 1e-6)),
        class_token=False,
        global_pool="map",
    )
    what = (
        f"the image tower of a SigLIP of transformers, {sizes['depth']} blocks of {sizes['width']}"
    )
    return Translation(_timm_spec(arguments), what, weights, image_size, "half", left_out=left_out)


# CLIP


def _translate_clip(config: Facts, tensors: dict[str, Tensor], side: int, path: str) -> Translation:
    """CLIP (Radford et al. 2021); its image tower alone if the vocabulary is not CLIP's."""
    vision = _part(config, "vision_config")
    tower, rest = _split_tower(tensors, path)
    texts = weight_prefixes.below(rest, "text_model.")
    _drop(rest, "text_model.")
    weights = _clip_tower(tower, path)
    identity = torch.eye(len(weights["class_embedding"]))
    weights["proj"] = rest.pop("visual_projection.weight", identity).T
    text_projection = rest.pop("text_projection.weight", None)
    scale = rest.pop("logit_scale", torch.tensor(2.6593))
    _refuse_rest(rest, path)
    sizes = _sizes(vision)
    dim = weights["proj"].shape[1]
    image_size, patch = _number(vision, "image_size", 224), _number(vision, "patch_size", 32)
    image_config = _clip_sizes(vision, sizes) | {"image_size": image_size, "patch_size": patch}
    image_config["head_width"] = sizes["width"] // sizes["heads"]
    quick = {vision.get("hidden_act", "quick_gelu")}
    left_out: tuple[str, ...] = ()
    text_config: dict[str, Any] = {"layers": 1, "width": 8, "heads": 1, "vocab_size": 8}
    words = 0
    if texts and text_projection is not None:
        text = _part(config, "text_config")
        words = _number(text, "vocab_size", CLIP_WORDS)
        quick.add(text.get("hidden_act", "quick_gelu"))
    if words == CLIP_WORDS:
        text_sizes = _sizes_of_text(text)
        text_config = _clip_sizes(text, text_sizes) | {
            "heads": text_sizes["heads"],
            "vocab_size": words,
            "context_length": _number(text, "max_position_embeddings", 77),
        }
    elif texts:
        left_out = ("text_model",)
    if not quick <= {"quick_gelu", "gelu"} or len(quick) > 1:
        raise UserError(
            f"{path}: activations {', '.join(map(str, quick))}; read are quick_gelu and gelu"
        )
    whole = json.dumps(
        {
            "embed_dim": dim,
            "vision_cfg": image_config,
            "text_cfg": text_config,
            "quick_gelu": quick == {"quick_gelu"},
        }
    )
    spec = f"config={registry.spec_value(whole)}"
    size_text = f"{sizes['depth']} blocks of {sizes['width']}, patches of {patch} px"
    if words != CLIP_WORDS:
        what = f"the image tower of a CLIP of transformers, {size_text}"
        return Translation(
            f"clip_image:{spec}", what, weights, image_size, "clip", left_out=left_out
        )
    assert text_projection is not None
    both = {f"visual.{key}": tensor for key, tensor in weights.items()}
    both |= _clip_tower(texts, path)
    both |= {"text_projection": text_projection.T, "logit_scale": scale.reshape(())}
    what = f"a CLIP of transformers, {size_text}"
    return Translation(f"open_clip:{spec}", what, both, image_size, "clip")


def _sizes_of_text(text: Facts) -> dict[str, int]:
    """The sizes of a text tower, whose defaults are smaller."""
    for name, usual in (
        ("hidden_size", 512),
        ("num_attention_heads", 8),
        ("intermediate_size", 2048),
    ):
        text.setdefault(name, usual)
    return _sizes(text)


def _clip_sizes(config: Facts, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The sizes of a tower by open_clip's names. Raises UserError for norms of another epsilon."""
    if abs(float(config.get("layer_norm_eps", 1e-5)) - 1e-5) > 1e-9:
        raise UserError(f"{config.file}: layer_norm_eps must be 1e-5, as open_clip's")
    ratio = timm_models.mlp_ratio(sizes["hidden"], sizes["width"])
    return {"width": sizes["width"], "layers": sizes["depth"], "mlp_ratio": ratio}


def _split_tower(tensors: Weights, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split weights into the image tower (`vision_model.`, or none if alone) and all others."""
    prefix = "vision_model."
    rest = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    if len(rest) < len(tensors):
        return weight_prefixes.below(tensors, prefix), rest
    if not any(key.startswith("embeddings.patch_embedding") for key in tensors):
        raise UserError(f"{path}: holds no image tower; its keys are {format_keys(tensors)}")
    projection = {k: v for k, v in tensors.items() if k.startswith("visual_projection.")}
    return {k: v for k, v in tensors.items() if k not in projection}, projection


def _clip_tower(tower: Weights, path: str) -> dict[str, Tensor]:
    """An image tower or a text tower by open_clip's names, without its projection."""
    weights, others = _rename_blocks(tower, OPEN_CLIP, "transformer.resblocks.", path)
    _drop(others, "embeddings.position_ids")
    weights |= _take(others, CLIP_NAMES)
    _refuse_rest(others, path)
    return weights


KINDS: dict[str, Callable[[Facts, dict[str, Tensor], int, str], Translation]] = {
    "clip": _translate_clip,
    "clip_vision_model": _translate_clip,
    "siglip": _translate_siglip,
    "siglip_vision_model": _translate_siglip,
    "vit": _translate_vit,
    "dinov2": _translate_dinov2,
    "dinov2_with_registers": _translate_dinov2,
}
