"""Classifier: an encoder and a head that reads its vectors as classes. Neural Cleanse inverts it, a certificate reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, embed_images
from bezoar.errors import UserError
from bezoar.evaluation import heads, success

Kind = Literal["auto", "own", "zero_shot", "linear", "mlp"]


@dataclass(frozen=True)
class Classifier:
    """head: float32 (N, D) -> logits (N, C), differentiable. raw: whether it reads the tower's vectors as they come (a
    network's own last layer), not unit rows. how: what the head is, in words.
    """

    encoder: Encoder
    head: success.Head
    classes: tuple[str, ...]
    how: str
    raw: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """uint8 or float 0..1 (B, 3, H, W) -> logits float32 (B, C). Differentiable for floats."""
        return self.head(self.vectors(x))

    def vectors(self, x: Tensor) -> Tensor:
        """uint8 or float 0..1 (B, 3, H, W) -> float32 (B, D), what the head reads."""
        if not self.raw:
            return self.encoder.encode_images(x)
        with self.encoder.autocast():
            return self.encoder.image(self.encoder.prepare_images(x)).float()

    @torch.no_grad()
    def predict(self, images: Tensor, batch: int = 512) -> Tensor:
        """uint8 (N, 3, H, W) -> int64 (N,), the class of each."""
        return torch.cat([self(x).argmax(1) for x in images.split(batch)])


def own_classifier(encoder: Encoder) -> Classifier:
    """The head that came with a network's weights. Raises UserError where none did."""
    head: Any = getattr(encoder, "head", None)
    if head is None:
        raise UserError(
            "this encoder came without a head of its own; take zero_shot, linear or mlp"
        )
    return Classifier(
        encoder, head, tuple(encoder.about["classes"]), "the network's own last layer", raw=True
    )


def zero_shot_classifier(
    encoder: Encoder, classes: Sequence[str], templates: str = "simple"
) -> Classifier:
    """The text tower's head. Raises UserError for an encoder without one, or without classes."""
    if not classes:
        raise UserError("a zero-shot head needs the names of classes; these data have none")
    rows = (
        registry.make("probe", f'zero_shot:templates="{templates}"').head(encoder, classes).clone()
    )
    return Classifier(
        encoder, lambda z: 100 * z @ rows.T, tuple(classes), f"zero-shot, {len(classes)} classes"
    )


def fit_classifier(encoder: Encoder, labelled: Pairs, kind: str = "linear") -> Classifier:
    """A head fitted on labelled records. Raises UserError without labels of at least two classes."""
    known = success.select_labelled(labelled, labelled)
    assert known.labels is not None
    z = embed_images(encoder, known.images.to(encoder.device).split(512))
    y, many = known.labels.to(z.device), len(known.classes)
    if kind == "mlp":
        head: success.Head = heads.fit(
            z, y, many, registry.make("probe", "mlp:epochs=100,seeds=1")
        ).one(0)
    else:
        head = registry.make("probe", kind).fit(z, y, many)
    return Classifier(encoder, head, known.classes, f"{kind} head on {len(known)} labelled records")


def make_classifier(encoder: Encoder, data: Pairs, kind: Kind = "auto") -> Classifier:
    """The head of a kind. auto: the network's own, else zero-shot where there are a text tower and classes, else linear.

    data: gives the classes, and for linear and mlp the labelled records. Raises UserError where the head cannot be had.
    """
    if kind == "auto":
        has_text = encoder.text is not None and bool(data.classes)
        kind = (
            "own"
            if getattr(encoder, "head", None) is not None
            else "zero_shot"
            if has_text
            else "linear"
        )
    if kind == "own":
        return own_classifier(encoder)
    return (
        zero_shot_classifier(encoder, data.classes)
        if kind == "zero_shot"
        else fit_classifier(encoder, data, kind)
    )
