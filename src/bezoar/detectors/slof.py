"""Simplified local outlier factor: k-distance over that of the neighbours (Schubert 2014; Huang et al. 2025)."""

from __future__ import annotations

from typing import Annotated, Any

from bezoar.neighbors import Density, pool_size
from bezoar.registry import method
from bezoar.scores import Scores


@method
class Slof:
    """SLOF(x) = mean over the k neighbours y of kdist(x) / kdist(y), arXiv 2502.01385.

    The published code looks the neighbours up one column off for half of the rows; this looks up the neighbours.
    """

    k: Annotated[int, "neighbours"] = 16
    pool: Annotated[int, "records compared against; 0 = k / (2 rate), at least 2 k"] = 0
    rate: Annotated[float, "largest poison rate to plan for; sets the pool"] = 0.01
    seed: Annotated[int, "of the choice of the pool"] = 0

    def __post_init__(self) -> None:
        if self.k < 1 or self.pool < 0 or not 0 < self.rate <= 1:
            raise ValueError(f"needs k >= 1, pool >= 0, 0 < rate <= 1; got {self.k}, {self.pool}, {self.rate}")

    def __call__(self, encoder: Any, source: Any) -> Scores:
        """-> Scores > 0, about 1 in even density; a record in a thinner place than its neighbours is suspicious."""
        e = encoder.embed(source)
        size = self.pool or pool_size(self.k, self.rate, len(e.ids))
        density = Density.measure(e.images.to(encoder.device), e.ids, self.k, size, self.seed)
        return Scores(e.ids, density.log_ratio.exp().mean(1).float().cpu())
