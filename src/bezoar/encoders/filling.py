"""Builds fresh networks and loads the weights of a file into them, with their classifier."""

from typing import Any

from torch import Tensor, nn

from bezoar import registry
from bezoar.data.label_sets import distinct_names
from bezoar.encoders import open_clip_models, timm_models
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.weights import check_weights
from bezoar.errors import UserError

Filled = tuple[Encoder, str, list[str]]  # the encoder, what it is, and what was left out


def fill_timm(
    name: str,
    arguments: str,
    tensors: dict[str, Tensor],
    path: str,
    what: str,
    names: tuple[str, ...] = (),
) -> Filled:
    """A model of timm's with these weights; its classifier becomes the head.

    Args:
        name: timm's name of the model.
        arguments: see `timm_models.create_model`.
        tensors: the weights, with or without a classifier.
        path: of the file, for messages.
        what: the model in words, for messages.
        names: of the classes.
    """
    count = sum(tensor.numel() for tensor in tensors.values())
    blank = timm_models.build_blank(name, arguments, count)
    weights, head = timm_models.split_classifier(blank, tensors)
    check_weights(blank, weights, path, what)
    spec = f"timm:model={name}"
    encoder = make_network(
        f"{spec},arguments={registry.spec_value(arguments)}" if arguments else spec
    )
    encoder.image.load_state_dict(weights, strict=False)  # see check_weights
    add_head(encoder, head, names, path)
    return encoder, what + (f" with its head of {len(head['weight'])} classes" if head else ""), []


def add_head(
    encoder: Encoder, weights: dict[str, Tensor], names: tuple[str, ...], path: str
) -> None:
    """Give an encoder a linear head, if there are weights for one. names: of the classes."""
    if not weights:
        return
    if weights["weight"].ndim != 2:
        raise UserError(f"{path}: expected a linear classifier")
    classes, width = weights["weight"].shape
    head = nn.Linear(width, classes, bias="bias" in weights)
    check_weights(head, weights, path, f"a classifier of {classes} classes")
    head.load_state_dict(weights)
    encoder.head = head
    usable = distinct_names(names) if len(names) == classes else map(str, range(classes))
    encoder.about["classes"] = list(usable)


def make_network(spec: str) -> Encoder:
    """A fresh encoder, without a warning of random weights: a file's weights will replace them."""
    network: Any = registry.make("network", spec)
    with open_clip_models.without_weight_warnings():
        encoder: Encoder = network()
    return encoder
