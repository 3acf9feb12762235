"""Classifier: an encoder with a head that reads its vectors as classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders import normalisation
from bezoar.encoders.encoder import Encoder, embed_records
from bezoar.encoders.small_towers import MEAN_STD
from bezoar.errors import UserError
from bezoar.evaluation import heads, kmeans, success
from bezoar.evaluation.scores import Measure, proportion

LOW_ACCURACY = 0.5  # of a network's own head: below it another normalisation is tried
CLEAR_GAIN = 0.05  # gain in accuracy from which another normalisation is called the right one
ALWAYS_CLEAR = 0.75  # accuracy that is no guess, however few classes there are
MOST_TRIED = 512  # images that it is tried on
CLUSTERS = 12  # pseudo-classes if there are no classes
ClassifierKind = Literal["auto", "own", "zero_shot", "linear", "mlp", "clusters"]


@dataclass(frozen=True)
class Classifier:
    """An encoder with a head."""

    encoder: Encoder
    head: success.Head  # float32 (N, D) -> logits (N, C), differentiable
    classes: tuple[str, ...]  # names of the C classes
    how: str  # the head in words
    # whether the head reads the tower's vectors before normalisation, like a network's own last
    # layer
    raw: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Differentiable logits, float32 (B, C), of images uint8 or float 0..1 (B, 3, H, W)."""
        encoder = self.encoder
        return self.head(encoder.raw_vectors(x) if self.raw else encoder.encode_images(x))

    @torch.no_grad()
    def predict(self, images: Tensor, batch: int = 512) -> Tensor:
        """Return the class of each image uint8 (N, 3, H, W), int64 (N,), in batches."""
        return torch.cat([self(x).argmax(1) for x in images.split(batch)])


@dataclass(frozen=True)
class LogitEncoder:
    """A classifier in the place of an encoder: its vectors are its logits."""

    classifier: Classifier

    def eval(self) -> LogitEncoder:
        """Put the encoder into evaluation mode."""
        self.classifier.encoder.eval()
        return self

    def encode_images(self, x: Tensor) -> Tensor:
        """Return logits, float32 (B, C), of images uint8 (B, 3, H, W)."""
        return self.classifier(x)


class ClassObjective(Protocol):
    """What changes of images are to do: the head reads all images of change i as class t_i."""

    def __call__(self, z: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The cross entropy (g,), and the share (g,) of images that are read so.

        Args:
            z: (g, n, D), the vectors of n images changed in g ways.
            indices: int64 (g,), the classes t.
        """


def reach_class(classifier: Classifier) -> ClassObjective:
    """The objective of changes that are to lead to classes, as the classifier reads images."""

    def objective(z: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        g, n, _ = z.shape
        logits = classifier.head(z.flatten(0, 1)).view(g, n, -1)  # (g, n, C)
        target = indices[:, None, None].expand(g, n, 1)
        loss = -logits.log_softmax(2).gather(2, target).mean((1, 2))
        return loss, (logits.argmax(2) == indices[:, None]).to(z.dtype).mean(1)

    return objective


def own_classifier(encoder: Encoder, classes: Sequence[str] = ()) -> Classifier:
    """Return the encoder with the head that came with its weights.

    Args:
        encoder: an encoder with a head.
        classes: classes of the data, which become the first columns, in their order; () keeps the
            head's columns. A head whose classes are numbers takes the names, if there are as many.

    Raises:
        UserError: if the encoder has no head, or the head lacks a class.
    """
    head = getattr(encoder, "head", None)
    if head is None:
        raise UserError(
            "this encoder came without a head of its own; take zero_shot, linear or mlp"
        )
    names = tuple(encoder.about["classes"])
    how = "the network's own last layer"
    if not classes or tuple(classes) == names:
        return Classifier(encoder, head, names, how, raw=True)
    columns, order = order_columns(names, classes)
    if order:
        names = tuple(classes)
    ordered = tuple(names[column] for column in columns)
    return Classifier(encoder, lambda z: head(z)[:, columns], ordered, how + order, raw=True)


def order_columns(head: Sequence[str], test: Sequence[str]) -> tuple[list[int], str]:
    """Order a head's columns: the test set's classes first, in their order.

    If the head's classes are numbers, and as many as the test set's, they keep their order.

    Args:
        head: names of the head's classes.
        test: names of the test set's classes.

    Returns:
        The columns, and a description of their order.

    Raises:
        UserError: if the head lacks a class of the test set.
    """
    is_unnamed = tuple(head) == tuple(map(str, range(len(head))))
    if is_unnamed and set(test) - set(head):
        if len(head) != len(test):
            raise UserError(
                f"the head has {len(head)} classes without names, the test set {len(test)}; "
                "name the head's"
            )
        return list(range(len(head))), ", taken in the test set's order"
    column_of = {name: column for column, name in enumerate(head)}
    if unknown := [name for name in test if name not in column_of]:
        listed = ", ".join(head[:8]) + (", ..." if len(head) > 8 else "")
        raise UserError(f"the head knows no class {unknown[0]!r}; it has {listed}")
    first = [column_of[name] for name in test]
    return first + sorted(set(range(len(head))) - set(first)), ""


def head_labels(encoder: Encoder, records: Pairs | StoredPairs) -> Tensor:
    """The labels of records as columns of an encoder's own head, int64 (N, 1) on its device.

    Raises UserError for an encoder without a head of these classes, and for records without labels.
    """
    if records.labels is None or not records.classes:
        raise UserError("supervised training needs data with labels and the names of classes")
    if bool((records.labels < 0).any()):
        raise UserError("supervised training needs a label for every record")
    if getattr(encoder, "head", None) is None:
        raise UserError("supervised training needs a network with a head of its own")
    columns, _ = order_columns(tuple(encoder.about["classes"]), records.classes)
    labels = torch.tensor(columns)[records.labels.cpu()]
    return labels[:, None].to(encoder.device)


def fits_own_head(encoder: Encoder, classes: Sequence[str]) -> bool:
    """Whether an encoder has its own head with these classes."""
    if getattr(encoder, "head", None) is None or not classes:
        return False
    try:
        own_classifier(encoder, classes)
    except UserError:
        return False
    return True


def measure_own_head(encoder: Encoder, labelled: Pairs) -> tuple[Measure | None, str]:
    """Measure a network's accuracy on clean images with its own head.

    Args:
        encoder: any encoder.
        labelled: clean records; those without a label are left out.

    Returns:
        top-1 accuracy, None for an encoder without a head of these classes, or without labels; and
        a warning or "": that the head has other classes, that accuracy is low, or that another
        usual normalisation raises it.
    """
    labels = labelled.labels
    if getattr(encoder, "head", None) is None or labels is None or not (labels >= 0).any():
        return None, ""
    try:
        classifier = own_classifier(encoder, labelled.classes)
    except UserError as error:
        return None, f"the accuracy of the network's own head was not measured: {error}"
    records = labelled.take((labels >= 0).nonzero()[:, 0])
    assert records.labels is not None
    truth = records.labels.to(encoder.device)
    n = len(truth)
    hits = int((classifier.predict(records.images) == truth).sum())
    accuracy = proportion(hits, n, f"clean images read as their class by {classifier.how}")
    if hits >= LOW_ACCURACY * n:
        return accuracy, ""
    warning = f"the network's own head reads {hits / n:.2f} of {n} clean images as their class"
    name, others = _best_mean_std(classifier, records.images[:MOST_TRIED], truth[:MOST_TRIED])
    if name:
        return (
            accuracy,
            f"{warning}, and {others:.2f} under the normalisation {name}: say mean_std={name}",
        )
    return accuracy, f"{warning}: labels, classes or preprocessing may be others than the network's"


def _best_mean_std(classifier: Classifier, images: Tensor, truth: Tensor) -> tuple[str, float]:
    """The usual normalisation with a clearly higher accuracy, and that; ("", 0.0) if none."""
    encoder = classifier.encoder
    before = encoder.preprocess
    shares = {}
    try:
        for name in MEAN_STD:
            encoder.set_preprocess(normalisation.with_mean_std(before, name))
            shares[name] = float((classifier.predict(images) == truth).float().mean())
    finally:
        encoder.set_preprocess(before)
    share = float((classifier.predict(images) == truth).float().mean())
    best = max(shares, key=lambda name: shares[name])
    # Twice the accuracy of guessing: labels in another order make any normalisation seem better.
    least = max(share + CLEAR_GAIN, min(2 / len(classifier.classes), ALWAYS_CLEAR))
    return (best, shares[best]) if shares[best] > least else ("", 0.0)


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
    z = embed_records(encoder, records.to(encoder.device))
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
    distance to the own centre. Raises UserError if the vectors do not form clusters.
    """
    z = embed_records(encoder, data.to(encoder.device))  # (N, D)
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


def make_classifier(encoder: Encoder, data: Pairs, kind: ClassifierKind = "auto") -> Classifier:
    """Return the encoder with a head of the given kind.

    Args:
        encoder: gives the vectors.
        data: gives the classes, and for linear and mlp the labelled records.
        kind: `auto` takes the network's own head, else zero-shot if there are a text tower and
            classes, else linear.

    Raises:
        UserError: if there is no such head.
    """
    if kind == "auto" and getattr(encoder, "head", None) is not None:
        kind = "own"
    elif kind == "auto":
        kind = "zero_shot" if encoder.text is not None and data.classes else "linear"
    if kind == "own":
        return own_classifier(encoder, data.classes if fits_own_head(encoder, data.classes) else ())
    if kind == "zero_shot":
        return zero_shot_classifier(encoder, data.classes)
    if kind == "clusters":
        return cluster_classifier(encoder, data)
    return fit_classifier(encoder, data, kind)
