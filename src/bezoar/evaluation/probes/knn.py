"""k nearest neighbours by cosine, their votes weighted by similarity (Wu et al. 2018, section 3.4)."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation import success
from bezoar.evaluation.neighbors import nearest_neighbors
from bezoar.evaluation.scores import Measure
from bezoar.registry import method


@method
class Knn:
    """A neighbour of cosine s votes for its class with weight exp(s / temperature), or with 1.

    k as in the paper; its temperature is 0.07, that of the monitors that go with SimCLR reimplementations 0.5.
    """

    k: Annotated[int, "neighbours that vote"] = 200
    vote: Annotated[Literal["weighted", "majority"], "by similarity, or one neighbour one vote"] = (
        "weighted"
    )
    temperature: Annotated[float, "of the weights; lower trusts the nearest more"] = 0.5
    limit: Annotated[int | None, "labelled records at most, a fixed sample"] = None
    batch: Annotated[int, "images at a time"] = 512

    needs = ("train",)

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
    ) -> dict[str, Measure]:
        """Everything that `success` defines, as `knn.*`. Raises UserError without labelled data, or with fewer than k."""
        seen = success.TestViews.of(encoder, test, goals, victims, self.batch)
        known = success.embed_labelled(encoder, train, test, goals, self.limit, self.batch)
        how = f"; {self.vote} vote of the {self.k} nearest of {len(known)} labelled records"
        found = seen.measures(
            lambda q: self.votes(q, known.z, known.labels, len(test.classes)), how
        )
        return {f"knn.{name}": m for name, m in found.items()}

    def votes(self, queries: Tensor, references: Tensor, labels: Tensor, classes: int) -> Tensor:
        """Unit rows (N, D) and (R, D), labels int64 (R,) -> votes float64 (N, C), ties among neighbours to the lower row."""
        near = nearest_neighbors(queries, references, self.k)
        weight = torch.ones_like(near.distance, dtype=torch.float64)
        if self.vote == "weighted":
            cosine = 1 - near.distance.double().square() / 2
            weight = (
                (cosine - cosine[:, :1]) / self.temperature
            ).exp()  # of the nearest: 1, so that nothing overflows
        return weight.new_zeros(len(queries), classes).scatter_add_(1, labels[near.index], weight)

    def __post_init__(self) -> None:
        if self.k < 1 or not self.temperature > 0 or self.batch < 1:
            raise ValueError("needs k >= 1, temperature > 0, batch >= 1")
        if self.limit is not None and self.limit < 2:
            raise ValueError("limit must be at least 2")
