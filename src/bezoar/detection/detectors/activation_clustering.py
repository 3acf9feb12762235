"""Activation clustering (Chen et al., SafeAI 2019, arXiv 1811.03728) on pseudo-classes: the smaller half of a class."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from bezoar.detection import pseudo_classes
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

ROUNDS = 50  # of Lloyd's algorithm at most
SMALLEST = 1e-9  # distances are not divided by less


@method
class ActivationClustering:
    """Each class's vectors on its `dims` principal axes, cut in two by 2-means; the smaller part is suspicious.

    The paper flags whole parts, by their relative size or by the silhouette of the cut. Here (ours) both weigh a score of
    each record: (d - d') / max(d, d') x (mean silhouette) x (1 - 2 share), d the distance to the centre of the larger
    part, d' to that of the smaller, share the smaller part's share of the class. Silhouettes are the simplified ones, to
    centres. 2-means starts from a cut across each axis and keeps the best.
    """

    classes: Annotated[
        pseudo_classes.How, "words of captions, clusters of images; auto: words where there are any"
    ] = "auto"
    count: Annotated[int, "pseudo-classes"] = 32
    dims: Annotated[int, "principal axes of a class that are kept"] = 10
    seed: Annotated[int, "of the sample that the classes are found on"] = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.dims < 1:
            raise ValueError(f"needs count >= 1 and dims >= 1; got {self.count}, {self.dims}")

    def __call__(self, encoder: Any, source: Any) -> Scores:
        """-> Scores in [-1, 1]; above 0 in the smaller part of a class."""
        e = encoder.embed(source)
        if len(e.ids) < 2:
            raise UserError(
                f"detector 'activation_clustering' needs at least 2 records; there are {len(e.ids)}"
            )
        label = pseudo_classes.labels(encoder, source, e, self.classes, self.count, self.seed)
        mean, axis = pseudo_classes.axes(
            e.images, label, min(self.dims, e.images.shape[1]), encoder.device
        )
        y = pseudo_classes.projections(e.images, label, mean, axis)
        values = torch.zeros(len(y))
        for i in label.unique().tolist():
            rows = (label == i).nonzero()[:, 0]
            values[rows] = suspicion(y[rows].to(encoder.device).double()).float().cpu()
        return Scores(e.ids, values)


def suspicion(y: Tensor) -> Tensor:
    """Scores (n,) of one class's vectors (n, d)."""
    smaller, larger = halves(y)
    to = torch.stack([(y - smaller).norm(dim=1), (y - larger).norm(dim=1)])
    nearness = (to[1] - to[0]) / to.amax(0).clamp(min=SMALLEST)
    return nearness * nearness.abs().mean() * (1 - 2 * float((nearness > 0).double().mean()))


def halves(y: Tensor) -> tuple[Tensor, Tensor]:
    """2-means of float64 (n, d): the centres (d,) of the smaller and of the larger part."""
    upper = (y.T > 0).double()  # one start an axis: (d, n), 1 where a record is in the first part
    total = y.sum(0)
    for _ in range(ROUNDS):
        size = upper.sum(1, keepdim=True)
        one, two = upper @ y / size.clamp(min=1), (total - upper @ y) / (len(y) - size).clamp(min=1)
        again = (
            (one - two) @ y.T > (one.square() - two.square()).sum(1, keepdim=True) / 2
        ).double()
        if torch.equal(again, upper):
            break
        upper = again
    size = upper.sum(1)
    # the spread between the parts, which is what 2-means makes largest
    between = (one - two).square().sum(1) * size * (len(y) - size)
    best = int(between.argmax())
    return (one[best], two[best]) if size[best] * 2 <= len(y) else (two[best], one[best])
