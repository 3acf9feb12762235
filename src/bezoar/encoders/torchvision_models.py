"""Recognises torchvision's classifiers by the names and shapes of their weights."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from bezoar.encoders import filling, normalisation
from bezoar.encoders.encoder import Encoder, limit_weights
from bezoar.encoders.timm_models import weight_shapes
from bezoar.encoders.weights import check_weights
from bezoar.errors import UserError

# Families by the beginning of their weights' names. `classifier_weights` reads residual networks.
FAMILIES = {
    "features.": "alexnet convnext densenet efficientnet mobilenet squeezenet swin vgg",
    "encoder.layers.": "vit",
    "stem.": "maxvit regnet",
    "layers.": "mnasnet",
    "Conv2d_1a": "inception",
    "stage2.": "shufflenet",
}


def find_model(tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """The names of the classifier with these weights and of its last layer, or two empty strings.

    The shapes of the last layer may differ.
    """
    starts = [s for s in FAMILIES if any(key.startswith(s) for key in tensors)]
    families = tuple(name for start in starts for name in FAMILIES[start].split())
    shapes = weight_shapes(tensors)
    for name in models.list_models(module=models):
        if not name.startswith(families):
            continue
        try:
            blank = _build_blank(name, sum(map(math.prod, shapes.values())))
        except (RuntimeError, ValueError, UserError):
            continue
        expected, last = weight_shapes(blank.state_dict()), last_layer(blank)
        others = [key for key in expected if key.rpartition(".")[0] != last]
        if shapes.keys() == expected.keys() and all(shapes[k] == expected[k] for k in others):
            return str(name), last
    return "", ""


def _build_blank(name: str, count: int) -> Any:
    """A classifier on the meta device.

    RegNets compute their widths, so they are built in memory, up to about `count` weights.
    """
    options = {"init_weights": False} if name.startswith("inception") else {}  # avoids a warning
    if not name.startswith("regnet"):
        with torch.device("meta"):
            return models.get_model(name, weights=None, **options)
    with limit_weights(count):
        return models.get_model(name, weights=None)


def last_layer(model: nn.Module) -> str:
    """The name of a model's last layer if it is linear, else ""."""
    layers = [
        (path, m) for path, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
    ]
    path, last = layers[-1]
    return path if isinstance(last, nn.Linear) else ""


def open_weights(tensors: Mapping[str, Tensor], path: str, mean_std: str) -> Encoder | None:
    """The classifier with these weights, its last layer as the head; None if none fits."""
    name, last = find_model(tensors)
    if not name:
        return None
    weights = {k: v for k, v in tensors.items() if not last or k.rpartition(".")[0] != last}
    head = {k.rpartition(".")[2]: v for k, v in tensors.items() if k not in weights}
    encoder = filling.make_network(f"torchvision:model={name}")
    check_weights(encoder.image, weights, path, f"torchvision's {name}")
    encoder.image.load_state_dict(weights, strict=False)  # see check_weights
    filling.add_head(encoder, head, (), path)
    assumed = [f"size={encoder.preprocess.size}"]
    if mean_std == "auto":
        name_of = normalisation.mean_std_name(encoder.preprocess)
        assumed.append(f"{normalisation.GUESS}{name_of}")
    else:
        encoder.set_preprocess(normalisation.with_mean_std(encoder.preprocess, mean_std))
    encoder.about["imported"] = {
        "file": path.rpartition("/")[2],
        "layout": "torchvision",
        "what": f"torchvision's {name} with its head",
        "left_out": [],
        "assumed": assumed,
    }
    return encoder
