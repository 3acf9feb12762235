"""Builds timm's models, and recognises them by the names and shapes of their weights."""

import json
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from bezoar.encoders.encoder import INTERPOLATIONS, Preprocess, limit_weights
from bezoar.errors import UserError, first_line

# Arguments of a model that a file may state; norm_eps is not timm's, it is set afterwards.
ARGUMENTS = frozenset((
    "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "init_values",
    "class_token", "global_pool", "reg_tokens", "no_embed_class", "pre_norm", "act_layer",
    "qkv_bias", "dynamic_img_size", "window_size", "final_norm", "fc_norm", "norm_eps",
))  # fmt: skip
LARGEST = 1 << 16  # of a number among them
DEEPEST = 1 << 9  # blocks
MAX_ARGUMENTS = 4096  # characters
WORD = re.compile(r"[\w.]{0,40}")
# Attention heads of a vision transformer by its width, as no weight shows them. Models of other
# widths have heads of HEAD_WIDTH.
HEADS = {1152: 16, 1280: 16, 1408: 16}
HEAD_WIDTH = 64
TRAINED_WITH = ("mask_token", "decoder_")  # parts that DINOv2 and MAE use in training only
# Models to compare weights with, by a weight's name that all models of the family have.
FAMILIES = {
    "conv_stem.weight": (
        "efficientnet_b? tf_efficientnet_b? efficientnet_lite? tf_efficientnet_lite? "
        "mobilenetv2_* mobilenetv3_*_100 tf_mobilenetv3_* mnasnet_* efficientnetv2_rw_? "
        "tf_efficientnetv2_?"
    ),
    "stem.0.weight": "convnext_* convnextv2_*",
    "conv1.0.weight": "resnet??d resnet???d",
    "features.conv0.weight": "densenet*",
    "patch_embed.proj.weight": "swin_*_224 swin_*_384 swinv2_*",
}
# Names of efficientnet-pytorch (Luke Melas-Kyriazi) -> names of timm. PLAIN are the parts of a
# block without expansion, EXPANDING those of a block with it.
OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
PLAIN = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
    **SQUEEZE,
}
EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
    **SQUEEZE,
}
LUKEMELAS = tuple(
    [f"tf_efficientnet_b{i}" for i in range(9)] + [f"tf_efficientnet_lite{i}" for i in range(5)]
)


def create_model(name: str, arguments: str = "", pretrained: bool = False) -> Any:
    """A model of timm's without its classifier.

    Args:
        name: name of the model, perhaps with a tag.
        arguments: a JSON object with some of `ARGUMENTS`, or "".
        pretrained: whether to fetch its published weights.

    Raises:
        UserError: for an unknown name, and for arguments that the model does not accept.
    """
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name.partition('.')[0][:6]}*")[:6]
        names = ", ".join(similar) or "see timm.list_models()"
        raise UserError(f"timm has no model {name[:60]!r}; it has, among others: {names}")
    values = parse_arguments(arguments)
    eps = values.pop("norm_eps", None)
    try:
        model: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **values)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"timm could not make {name!r}: {first_line(error)}") from error
    if eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps
    return model


def build_blank(name: str, arguments: str = "", count: int = 0) -> Any:
    """A model without its classifier on the meta device, which takes no memory.

    count: number of weights in the file. The few models that cannot be built on the meta device
    are built in memory, up to about this size; with 0 they are refused.
    """
    try:
        with torch.device("meta"):
            return create_model(name, arguments)
    except UserError:
        if not count:
            raise
    with limit_weights(count):
        return create_model(name, arguments)


def parse_arguments(text: str) -> dict[str, Any]:
    """The arguments of a JSON object. Raises UserError for those that no file may state."""
    if not text:
        return {}
    try:
        values = json.loads(text[:MAX_ARGUMENTS])
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"arguments of a timm model must be a JSON object; got {text[:60]!r}"
        ) from error
    if not isinstance(values, dict):
        raise UserError("arguments of a timm model must be a JSON object")
    for name, value in values.items():
        if name not in ARGUMENTS or not _is_plain(value):
            raise UserError(f"timm: no file may state {name[:40]}={str(value)[:40]} of a model")
    if values.get("depth", 0) > DEEPEST:
        raise UserError(f"timm: a model of {values['depth']} blocks; expected at most {DEEPEST}")
    return values


def _is_plain(value: object) -> bool:
    """Whether a value is a bounded number, a flag, a word or None."""
    if isinstance(value, str):
        return WORD.fullmatch(value) is not None
    return value is None or (isinstance(value, int | float) and 0 <= value <= LARGEST)


def format_arguments(**values: Any) -> str:
    """Arguments as text, without those that are None."""
    return json.dumps({name: value for name, value in values.items() if value is not None})


def format_stated(values: Mapping[str, Any], path: str) -> str:
    """The arguments of a timm config.json (`model_args`) as text, without the number of classes.

    Raises UserError for images that are not RGB squares.
    """
    others = {name: v for name, v in values.items() if name not in ("num_classes", "in_chans")}
    sides = others.get("img_size")
    if isinstance(sides, list):
        others["img_size"] = sides[0] if sides else None
        if len(set(map(str, sides))) != 1:
            raise UserError(f"{path}: a model of images of {str(sides)[:40]} px; expected squares")
    if values.get("in_chans", 3) != 3:
        raise UserError(f"{path}: a model of {str(values['in_chans'])[:40]} channels; expected RGB")
    return format_arguments(**others) if others else ""


def stated_preprocess(model: Any, name: str) -> Preprocess:
    """A timm model's data configuration. Raises UserError unless RGB, bicubic or bilinear."""
    config = resolve_model_data_config(model)
    channels, side, _ = config["input_size"]
    if channels != 3 or config["interpolation"] not in INTERPOLATIONS:
        raise UserError(
            f"timm's {name} takes {channels} channels by {config['interpolation']}; "
            "expected RGB, bicubic or bilinear"
        )
    return Preprocess(side, tuple(config["mean"]), tuple(config["std"]), config["interpolation"])


def split_classifier(
    model: Any, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split weights into the model and its classifier, empty unless it is one linear layer."""
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = [classifier] if isinstance(classifier, str) else list(classifier)
    prefixes = tuple(f"{head}." for head in heads)
    trunk = {k: tensor for k, tensor in tensors.items() if not k.startswith(prefixes)}
    head = {
        k.removeprefix(prefixes[0]): tensor
        for k, tensor in tensors.items()
        if len(heads) == 1 and k.startswith(prefixes)
    }
    is_linear = set(head) in ({"weight"}, {"weight", "bias"}) and head["weight"].ndim == 2
    return trunk, head if is_linear else {}


# Finding the model of a state dict


def find_models(tensors: Mapping[str, Tensor], file_name: str) -> list[str]:
    """The models whose weights have these names and shapes, apart from the classifier.

    If the file's name begins with a fitting model's name, only that model is returned. Vision
    transformers are recognised by `describe_transformer`.
    """
    hints = [name for name in timm.list_models() if _is_named(file_name, name)]
    for name in sorted(hints, key=len, reverse=True):
        if fits(name, tensors):
            return [name]
    patterns = next((v for key, v in FAMILIES.items() if key in tensors), "")
    names = dict.fromkeys(n for pattern in patterns.split() for n in timm.list_models(pattern))
    return [name for name in names if fits(name, tensors)]


def _is_named(file_name: str, model: str) -> bool:
    """Whether a file's name begins with a model's name as whole words."""
    start = file_name.replace("-", "_")
    return start.startswith(model) and not start[len(model) : len(model) + 1].isalnum()


def fits(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict belongs to a model, apart from the classifier."""
    try:
        blank = build_blank(name)
    except UserError:
        return False
    trunk, _ = split_classifier(blank, tensors)
    return weight_shapes(trunk) == weight_shapes(blank.state_dict())


def weight_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of weights, without the counters of batch norms, which files may lack."""
    counters = ".num_batches_tracked"
    return {k: tuple(tensor.shape) for k, tensor in tensors.items() if not k.endswith(counters)}


def describe_transformer(tensors: Mapping[str, Tensor]) -> str:
    """The arguments of the vision transformer with these weights; "" for another network.

    No weight shows the number of heads (see `HEADS`), nor that the grid of patches is square, as
    in all published models.
    """
    dimensions = {
        "patch_embed.proj.weight": 4,
        "pos_embed": 3,
        "blocks.0.mlp.fc1.weight": 2,
        "blocks.0.attn.qkv.weight": 2,
    }
    if any(key not in tensors or tensors[key].ndim != n for key, n in dimensions.items()):
        return ""
    patch, positions, first, _ = (tensors[key] for key in dimensions)
    width, side = patch.shape[0], patch.shape[-1]
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    grid = round(positions.shape[1] ** 0.5)
    extra = positions.shape[1] - grid**2
    has_class = "cls_token" in tensors
    blocks = {k.split(".")[1] for k in tensors if k.startswith("blocks.")}
    return format_arguments(
        img_size=grid * side,
        patch_size=side,
        embed_dim=width,
        depth=len(blocks),
        num_heads=HEADS.get(width, max(1, width // HEAD_WIDTH)),
        mlp_ratio=mlp_ratio(first.shape[0], width),
        init_values=1e-5 if "blocks.0.ls1.gamma" in tensors else None,
        class_token=has_class,
        reg_tokens=registers or None,
        no_embed_class=True if has_class and not extra else None,
        global_pool=_pooling(tensors, has_class),
        qkv_bias=None if "blocks.0.attn.qkv.bias" in tensors else False,
    )


def tidy_transformer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Give DINOv2's weights timm's names, and leave out parts that only training uses.

    Returns:
        the weights, and the names of the parts that were left out.
    """
    left_out = sorted({key.partition(".")[0] for key in tensors if key.startswith(TRAINED_WITH)})
    weights = {key: v for key, v in tensors.items() if key.partition(".")[0] not in left_out}
    if {"register_tokens", "cls_token", "pos_embed"} <= set(weights):
        # In timm the registers and the class token have no positional embeddings.
        positions = weights["pos_embed"]  # (1, 1 + P, D)
        weights["reg_token"] = weights.pop("register_tokens")
        weights["cls_token"] = weights["cls_token"] + positions[:, :1]
        weights["pos_embed"] = positions[:, 1:]
    return weights, left_out


def _pooling(tensors: Mapping[str, Tensor], has_class: bool) -> str | None:
    if "attn_pool.latent" in tensors:
        return "map"
    return "avg" if "fc_norm.weight" in tensors or not has_class else None


def mlp_ratio(hidden: int, width: int) -> float:
    """A ratio such that `int(width * ratio)` is the hidden width."""
    return (hidden + 0.5) / width


# EfficientNets with the names of efficientnet-pytorch


def is_lukemelas(tensors: Mapping[str, Tensor]) -> bool:
    """Whether weights have the names of efficientnet-pytorch, by Luke Melas-Kyriazi."""
    return {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight"} <= set(tensors)


def rename_lukemelas(tensors: Mapping[str, Tensor], path: str) -> tuple[str, dict[str, Tensor]]:
    """The name of such a network in timm, and its weights by timm's names.

    Raises UserError if no EfficientNet of timm's has these sizes.
    """
    for name in LUKEMELAS:
        blank = build_blank(name)
        keys = blank.state_dict()
        blocks = dict.fromkeys(
            ".".join(key.split(".")[:3]) for key in keys if key.startswith("blocks.")
        )
        renamed = _rename_parts(tensors, list(blocks))
        if renamed and fits(name, renamed):
            return name, renamed
    raise UserError(
        f"{path}: its names are those of efficientnet-pytorch, but its sizes are of no EfficientNet"
    )


def _rename_parts(tensors: Mapping[str, Tensor], blocks: list[str]) -> dict[str, Tensor]:
    """The weights by timm's names, of blocks such as `blocks.1.0`; empty if a part is unknown."""
    renamed = {}
    for key, tensor in tensors.items():
        part, _, weight = key.rpartition(".")
        match = re.fullmatch(r"_blocks\.(\d{1,3})\.(\w+)", part)
        if part == "_fc":
            owner: str | None = "classifier"
        elif match:
            number = int(match[1])
            expands = f"_blocks.{number}._expand_conv.weight" in tensors
            inner = (EXPANDING if expands else PLAIN).get(match[2])
            owner = f"{blocks[number]}.{inner}" if inner and number < len(blocks) else None
        else:
            owner = OUTER.get(part)
        if owner is None:
            return {}
        renamed[f"{owner}.{weight}"] = tensor
    return renamed
