"""Spectral signatures (Tran, Li, Madry, NeurIPS 2018) on pseudo-classes: far out along a class's strongest direction."""

from __future__ import annotations

from typing import Annotated, Any

from bezoar.detection import pseudo_classes
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

SMALLEST = 1e-12  # variances below it are rounding


@method
class Spectral:
    """<z - mu, v>^2 with mu the mean and v the top right singular vector of the record's class, over the class's mean of it.

    The paper ranks within a class and takes a share of each; the division (ours) makes one ranking of all. It supposes
    that the poisons of a class are its strongest direction, which classes of many kinds of images break.
    """

    classes: Annotated[
        pseudo_classes.How, "words of captions, clusters of images; auto: words where there are any"
    ] = "auto"
    count: Annotated[int, "pseudo-classes"] = 32
    seed: Annotated[int, "of the sample that the classes are found on"] = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"needs count >= 1; got {self.count}")

    def __call__(self, encoder: Any, source: Any) -> Scores:
        """-> Scores >= 0, of mean 1 within a class."""
        e = encoder.embed(source)
        if len(e.ids) < 2:
            raise UserError(f"detector 'spectral' needs at least 2 records; there are {len(e.ids)}")
        label = pseudo_classes.labels(encoder, source, e, self.classes, self.count, self.seed)
        mean, axis = pseudo_classes.axes(e.images, label, 1, encoder.device)
        squared = pseudo_classes.projections(e.images, label, mean, axis)[:, 0].double().square()
        whole = squared.new_zeros(len(mean)).index_add_(0, label, squared) / label.bincount(
            minlength=len(mean)
        ).clamp(min=1)
        return Scores(e.ids, (squared / whole.clamp(min=SMALLEST)[label]).float())
