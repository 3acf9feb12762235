"""k nearest neighbours by cosine, with votes weighted by similarity (Wu et al. 2018, 3.4)."""

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation import success
from bezoar.evaluation.neighbors import nearest_neighbors
from bezoar.evaluation.probes import add_prefix, check_limit
from bezoar.evaluation.scores import Measure
from bezoar.registry import method


@method
class Knn:
    """A neighbour of cosine s votes for its class with weight exp(s / temperature).

    k is the paper's. Its temperature is 0.07; monitors of SimCLR reimplementations use 0.5.
    """

    k: Annotated[int, "neighbours that vote"] = 200
    temperature: Annotated[float, "of the weights; lower trusts the nearest more"] = 0.5
    limit: Annotated[int | None, "labelled records at most, a fixed sample"] = None

    needs = ("train",)

    def __post_init__(self) -> None:
        if self.k < 1 or not self.temperature > 0:
            raise ValueError("needs k >= 1, temperature > 0")
        check_limit(self.limit)

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
    ) -> dict[str, Measure]:
        """Return the measures of `TestViews.measures` as `knn.*`; see `Probe`.

        Raises UserError if there are fewer than k labelled records.
        """
        views = success.TestViews.of(encoder, test, goals, victims)
        labelled = success.embed_labelled(encoder, train, test, goals, self.limit)
        how = f"; weighted vote of the {self.k} nearest of {len(labelled)} labelled records"
        measures = views.measures(
            lambda z: self.votes(z, labelled.z, labelled.labels, len(test.classes)), how
        )
        return add_prefix("knn", measures)

    def votes(self, queries: Tensor, references: Tensor, labels: Tensor, classes: int) -> Tensor:
        """Count the votes for each class; ties among neighbours go to the lower row.

        Args:
            queries: unit rows (N, D).
            references: unit rows (R, D).
            labels: int64 (R,), the references' classes.

        Returns:
            float64 (N, C).
        """
        neighbors = nearest_neighbors(queries, references, self.k)
        cosine = 1 - neighbors.distance.double().square() / 2
        # Relative to the nearest, whose weight is 1, so that nothing overflows.
        weight = ((cosine - cosine[:, :1]) / self.temperature).exp()
        votes = weight.new_zeros(len(queries), classes)
        return votes.scatter_add_(1, labels[neighbors.index], weight)
