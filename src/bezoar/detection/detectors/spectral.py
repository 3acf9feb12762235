"""Spectral signatures (Tran, Li, Madry, NeurIPS 2018) on pseudo-classes: far out along a class's
strongest direction.
"""

from typing import Annotated

from bezoar.detection import pseudo_classes
from bezoar.detection.detectors import RecordEncoder, Records
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

MIN_VARIANCE = 1e-12  # smaller ones are rounding


@method
class Spectral:
    """<z - mu, v>^2 with mu the mean and v the top right singular vector of the record's class,
    over the class's mean of it.

    The paper ranks within a class and takes a share of each; the division (ours) makes one ranking
    of all. It supposes that the poisons of a class are its strongest direction, which classes of
    many kinds of images break.
    """

    classes: Annotated[
        pseudo_classes.ClassKind,
        "by words of captions or clusters of images; auto: words where there are any",
    ] = "auto"
    count: Annotated[int, "how many pseudo-classes"] = 32
    seed: Annotated[int, "seed of the sample that the classes are found on"] = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"needs count >= 1; got {self.count}")

    def __call__(self, encoder: RecordEncoder, source: Records) -> Scores:
        """-> Scores >= 0, of mean 1 within a class."""
        embedded = encoder.embed(source)
        images, n = embedded.images, len(embedded.ids)
        if n < 2:
            raise UserError(f"detector 'spectral' needs at least 2 records; there are {n}")
        classes = pseudo_classes.assign_classes(
            encoder, source, embedded, self.classes, self.count, self.seed
        )
        means, axes = pseudo_classes.principal_axes(images, classes, 1, encoder.device)
        projections = pseudo_classes.project_records(images, classes, means, axes)
        squares = projections[:, 0].double().square()
        sizes = classes.bincount(minlength=len(means)).clamp(min=1)
        variances = squares.new_zeros(len(means)).index_add_(0, classes, squares) / sizes
        scores = squares / variances.clamp(min=MIN_VARIANCE)[classes]
        return Scores(embedded.ids, scores.float())
