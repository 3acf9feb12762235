"""Dimensionality-aware outlier detection (Anderberg et al., SDM 2024), as used on CLIP by Huang et al., ICLR 2025."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from bezoar.neighbors import Density, pool_size
from bezoar.registry import method
from bezoar.scores import Scores


@method
class Dao:
    """DAO(x) = mean over the k neighbours y of ( kdist(x) / kdist(y) ) ^ LID(y), arXiv 2502.01385.

    `form` is what is reported of it: `mean_log`, the mean of LID(y) log(kdist(x) / kdist(y)), is what the published
    code scores; `log_mean`, the logarithm of DAO itself, is the formula. Neither overflows.
    """

    k: Annotated[int, "neighbours"] = 16
    pool: Annotated[int, "records compared against; 0 = k / (2 rate), at least 2 k"] = 0
    rate: Annotated[float, "largest poison rate to plan for; sets the pool"] = 0.01
    form: Annotated[Literal["mean_log", "log_mean"], "mean of the logarithms, or logarithm of the mean"] = "mean_log"
    seed: Annotated[int, "of the choice of the pool"] = 0

    def __post_init__(self) -> None:
        if self.k < 2 or self.pool < 0 or not 0 < self.rate <= 1:
            raise ValueError(f"needs k >= 2, pool >= 0, 0 < rate <= 1; got {self.k}, {self.pool}, {self.rate}")

    def __call__(self, encoder: Any, source: Any) -> Scores:
        """-> Scores, about 0 in even density; a record in a thinner place than its neighbours is suspicious."""
        e = encoder.embed(source)
        size = self.pool or pool_size(self.k, self.rate, len(e.ids))
        density = Density.measure(e.images.to(encoder.device), e.ids, self.k, size, self.seed)
        powers = density.lid * density.log_ratio
        score = powers.mean(1) if self.form == "mean_log" else powers.logsumexp(1) - math.log(self.k)
        return Scores(e.ids, score.float().cpu())
