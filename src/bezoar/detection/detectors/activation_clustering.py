"""Activation clustering (Chen et al., SafeAI 2019, arXiv 1811.03728) on pseudo-classes: the smaller
half of a class.
"""

from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import k_means

from bezoar.detection import pseudo_classes
from bezoar.detection.detectors import RecordEncoder, Records
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

MAX_ROUNDS = 50  # of Lloyd's algorithm
MIN_DISTANCE = 1e-9  # distances are not divided by less


@method
class ActivationClustering:
    """Each class's vectors on its `dims` principal axes, cut in two by 2-means; the smaller part is
    suspicious.

    The paper flags whole parts, by their relative size or by the silhouette of the cut. Here (ours)
    both weigh a score of each record: (d - d') / max(d, d') x (mean silhouette) x (1 - 2 share), d
    the distance to the centre of the larger part, d' to that of the smaller, share the smaller
    part's share of the class. Silhouettes are the simplified ones, to centres. 2-means starts from
    a cut across each axis and keeps the best.
    """

    classes: Annotated[
        pseudo_classes.ClassKind,
        "by words of captions or clusters of images; auto: words where there are any",
    ] = "auto"
    count: Annotated[int, "how many pseudo-classes"] = 32
    dims: Annotated[int, "how many principal axes of a class are used"] = 10
    seed: Annotated[int, "seed of the sample that the classes are found on"] = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.dims < 1:
            raise ValueError(f"needs count >= 1 and dims >= 1; got {self.count}, {self.dims}")

    def __call__(self, encoder: RecordEncoder, source: Records) -> Scores:
        """-> Scores in [-1, 1]; above 0 in the smaller part of a class."""
        embedded = encoder.embed(source)
        images, n = embedded.images, len(embedded.ids)
        if n < 2:
            raise UserError(
                f"detector 'activation_clustering' needs at least 2 records; there are {n}"
            )
        classes = pseudo_classes.assign_classes(
            encoder, source, embedded, self.classes, self.count, self.seed
        )
        dims = min(self.dims, images.shape[1])
        means, axes = pseudo_classes.principal_axes(images, classes, dims, encoder.device)
        y = pseudo_classes.project_records(images, classes, means, axes).double().numpy()
        values = torch.zeros(n)
        for i in classes.unique().tolist():
            rows = (classes == i).nonzero()[:, 0]
            values[rows] = torch.from_numpy(score_class(y[rows.numpy()])).float()
        return Scores(embedded.ids, values)


def score_class(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """The scores (n,) of one class's vectors (n, d)."""
    smaller, larger = split_in_two(y)
    to_smaller = np.linalg.norm(y - smaller, axis=1)
    to_larger = np.linalg.norm(y - larger, axis=1)
    farther = np.maximum(to_smaller, to_larger).clip(min=MIN_DISTANCE)
    nearness: NDArray[np.float64] = (to_larger - to_smaller) / farther
    nearness *= np.abs(nearness).mean() * (1 - 2 * (nearness > 0).mean())
    return nearness


def split_in_two(
    y: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """2-means of (n, d): the centres (d,) of the smaller and of the larger part; both are the mean
    when all vectors are equal.

    It starts once for each axis, from the means of the vectors above 0 on that axis and of the
    others, so that neither a seed nor the order of the records has an influence.
    """
    best, centres = np.inf, (y.mean(0), y.mean(0))
    for upper in (y > 0).T:
        if not upper.any() or upper.all():
            continue
        start = np.stack([y[upper].mean(0), y[~upper].mean(0)])
        means, part, inertia = k_means(y, 2, init=start, n_init=1, max_iter=MAX_ROUNDS, tol=0)
        if inertia < best:
            smaller = np.bincount(part, minlength=2).argmin()
            best, centres = inertia, (means[smaller], means[1 - smaller])
    return centres
