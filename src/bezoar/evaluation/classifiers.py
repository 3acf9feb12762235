"""Classifier: an encoder with a head that reads its vectors as classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, embed_images
from bezoar.errors import UserError
from bezoar.evaluation import heads, kmeans, success

Kind = Literal["auto", "own", "zero_shot", "linear", "mlp", "clusters"]
CLUSTERS = 12  # pseudo-classes where there are no classes


@dataclass(frozen=True)
class Classifier:
    """An encoder with a head.

    Attributes:
        encoder: gives the vectors.
        head: float32 (N, D) -> logits (N, C), differentiable.
        classes: names of the C classes.
        how: what the head is, in words.
        raw: whether the head reads the tower's vectors as they come, as a network's own last layer
            does, and not unit rows.
    """

    encoder: Encoder
    head: success.Head
    classes: tuple[str, ...]
    how: str
    raw: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits, float32 (B, C), of images uint8 or float 0..1 (B, 3, H, W).

        Differentiable by float images.
        """
        if not self.raw:
            return self.head(self.encoder.encode_images(x))
        with self.encoder.autocast():
            z = self.encoder.image(self.encoder.prepare_images(x))
        return self.head(z.float())

    @torch.no_grad()
    def predict(self, images: Tensor, batch: int = 512) -> Tensor:
        """Return the class of each image uint8 (N, 3, H, W), int64 (N,)."""
        return torch.cat([self(x).argmax(1) for x in images.split(batch)])


def own_classifier(encoder: Encoder) -> Classifier:
    """Return the encoder with the head that came with its weights. Raises UserError if none did."""
    head = getattr(encoder, "head", None)
    if head is None:
        raise UserError(
            "this encoder came without a head of its own; take zero_shot, linear or mlp"
        )
    classes = tuple(encoder.about["classes"])
    return Classifier(encoder, head, classes, "the network's own last layer", raw=True)


def zero_shot_classifier(
    encoder: Encoder, classes: Sequence[str], templates: str = "simple"
) -> Classifier:
    """Return the encoder with its text tower's head; `templates` are the zero-shot probe's.

    Raises UserError if there are no classes, or no text tower.
    """
    if not classes:
        raise UserError("a zero-shot head needs the names of classes; these data have none")
    probe = registry.make("probe", f'zero_shot:templates="{templates}"')
    rows = probe.head(encoder, classes).clone()  # (C, D)
    how = f"zero-shot, {len(classes)} classes"
    return Classifier(encoder, lambda z: 100 * z @ rows.T, tuple(classes), how)


def fit_classifier(encoder: Encoder, labelled: Pairs, kind: str = "linear") -> Classifier:
    """Fit a head on labelled records.

    kind: `linear`, `mlp`, or another probe that has `fit`. Raises UserError if the labels are of
    fewer than two classes.
    """
    records = success.select_labelled(labelled, labelled)
    assert records.labels is not None
    z = embed_images(encoder, records.images.to(encoder.device).split(512))
    y = records.labels.to(z.device)
    classes = records.classes
    if kind == "mlp":
        recipe = registry.make("probe", "mlp:epochs=100,seeds=1")
        head: success.Head = heads.fit(z, y, len(classes), recipe).one(0)
    else:
        head = registry.make("probe", kind).fit(z, y, len(classes))
    return Classifier(encoder, head, classes, f"{kind} head on {len(records)} labelled records")


def cluster_classifier(encoder: Encoder, data: Pairs) -> Classifier:
    """Return the encoder with a head that reads clusters of its own vectors as classes.

    Logits are -4 d^2 / s, where d is the distance to a centre of k-means and s the mean squared
    distance to the own centre. Raises UserError where the vectors do not make clusters.
    """
    z = embed_images(encoder, data.images.to(encoder.device).split(512))  # (N, D)
    count = min(CLUSTERS, len(z) // 4)
    centres = kmeans.cluster_centres(z, count, 0) if count >= 2 else z[:1]  # (C, D)
    squares = centres.square().sum(1)
    nearest = (2 * z @ centres.T - squares).max(1)
    if len(centres) < 2 or len(set(nearest.indices.tolist())) < 2:
        raise UserError(f"the vectors of {len(z)} images do not fall into clusters")
    spread = (z.square().sum(1) - nearest.values).mean().clamp(min=1e-6)
    names = tuple(f"cluster {i}" for i in range(len(centres)))
    how = f"{len(names)} clusters of {len(z)} images, in place of classes"
    return Classifier(encoder, lambda v: 4 / spread * (2 * v @ centres.T - squares), names, how)


def make_classifier(encoder: Encoder, data: Pairs, kind: Kind = "auto") -> Classifier:
    """Return the encoder with a head of the given kind.

    Args:
        encoder: gives the vectors.
        data: gives the classes, and for linear and mlp the labelled records.
        kind: `auto` takes the network's own head, else zero-shot if there are a text tower and
            classes, else linear.

    Raises:
        UserError: if there is no such head.
    """
    if kind == "auto":
        kind = _best_kind(encoder, data)
    if kind == "own":
        return own_classifier(encoder)
    if kind == "zero_shot":
        return zero_shot_classifier(encoder, data.classes)
    if kind == "clusters":
        return cluster_classifier(encoder, data)
    return fit_classifier(encoder, data, kind)


def _best_kind(encoder: Encoder, data: Pairs) -> Literal["own", "zero_shot", "linear"]:
    if getattr(encoder, "head", None) is not None:
        return "own"
    return "zero_shot" if encoder.text is not None and data.classes else "linear"
