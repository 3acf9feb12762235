"""Supervised training of a classifier: cross-entropy of the class that a caption names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.encoders.encoder import Encoder, split_words
from bezoar.errors import UserError
from bezoar.registry import method
from bezoar.training import augmentation, loop
from bezoar.training.augmentation import Chance
from bezoar.training.loop import require


class Loss(nn.Module):
    """-1/B sum_i log softmax(head(f(x_i)))_{y_i}; it owns the encoder and its head."""

    def __init__(self, encoder: Encoder, recipe: Supervised) -> None:
        super().__init__()
        self.encoder = encoder
        self.recipe = recipe

    def begin(self, data: Any, tokens: Tensor) -> Tensor:
        """The class of every record in place of its tokens, int64 (N, 1)."""
        records = getattr(data, "records", data)  # a Prefetcher's, or Pairs
        labels = torch.full((len(records),), -1) if records.labels is None else records.labels
        named = name_classes(records.captions, records.classes, labels)
        classes = self.encoder.about["classes"]
        if int(named.max()) >= len(classes):
            raise UserError(
                f"the head reads {len(classes)} classes, and the data have {len(records.classes)}; "
                "name them all: classifier:classes=A+B+..."
            )
        if int(named.min()) < 0:
            raise UserError("objective supervised needs the class of every record; some have none")
        return named[:, None].to(tokens.device)

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """The loss of a batch; see `Objective`. Tokens are the classes of `begin`, (B, 1)."""
        assert self.encoder.head is not None
        x = augmentation.random_shift(images, self.recipe.shift, chance)
        x = augmentation.random_flip(x, self.recipe.flip, chance)
        with self.encoder.autocast():
            z = self.encoder.image(self.encoder.prepare_images(x))
        logits = self.encoder.head(z.float())  # (B, C)
        return F.cross_entropy(logits, tokens[:, 0], label_smoothing=self.recipe.smoothing)


def name_classes(captions: Sequence[str], classes: Sequence[str], labels: Tensor) -> Tensor:
    """The class that a record is trained as, int64 (N,): the one that its caption names.

    A poisoned record keeps its label and has another caption. Where a caption names no class, or
    its own among others, the label stands.

    Args:
        captions: N texts, or none.
        classes: names.
        labels: int64 (N,), -1 where the class is not known.
    """
    result = labels.cpu().clone()
    phrases = [f" {' '.join(split_words(name))} " for name in classes]
    named: dict[str, list[int]] = {}
    for caption in set(captions):
        text = f" {' '.join(split_words(caption))} "
        named[caption] = [
            i for i, phrase in enumerate(phrases) if phrase.strip() and phrase in text
        ]
    for row, caption in enumerate(captions):
        if named[caption] and int(result[row]) not in named[caption]:
            result[row] = named[caption][0]
    return result


@method
class Supervised:
    """For networks with a head of their own. SGD with momentum and a cosine (Zagoruyko and Komodakis 2016)."""

    epochs: Annotated[int, "passes over the data"] = 10
    batch: Annotated[int, "images a step"] = 128
    lr: Annotated[float, "highest learning rate"] = 0.1
    weight_decay: Annotated[float, "of SGD, on all weights"] = 5e-4
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.1
    momentum: Annotated[float, "of SGD"] = 0.9
    smoothing: Annotated[float, "share of the target that is spread over all classes"] = 0.0
    shift: Annotated[int, "augmentation: images moved by up to this many pixels"] = 4
    flip: Annotated[float, "augmentation: share of images mirrored"] = 0.5

    captions = False
    optimizer = "sgd"

    def __post_init__(self) -> None:
        loop.check_recipe(self)
        require(0 <= self.momentum < 1, "momentum in 0..1, below 1")
        require(0 <= self.smoothing < 1, "smoothing in 0..1, below 1")
        require(self.shift >= 0, "shift >= 0")
        require(0 <= self.flip <= 1, "flip in 0..1")

    def __call__(self, encoder: Encoder) -> Loss:
        """The loss, which owns the encoder. Raises UserError for one without a head."""
        if encoder.head is None:
            raise UserError(
                "objective supervised trains a network's own head; take network classifier"
            )
        return Loss(encoder, self)
