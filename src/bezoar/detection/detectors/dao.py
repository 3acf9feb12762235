"""Dimensionality-aware outlier detection (Anderberg et al., SDM 2024), as used on CLIP by Huang et
al., ICLR 2025.
"""

import math
from typing import Annotated, Literal

from torch import Tensor

from bezoar.detection import density
from bezoar.detection.detectors import RecordEncoder, Records
from bezoar.evaluation.scores import Scores
from bezoar.registry import method


@method
class Dao:
    """DAO(x) = mean over the k neighbours y of (kdist(x) / kdist(y)) ^ LID(y), arXiv 2502.01385.

    `form` chooses what is reported of it. The published code scores `mean_log`, the mean of LID(y)
    log(kdist(x) / kdist(y)); the formula is `log_mean`, the logarithm of DAO itself. Neither
    overflows. The score inverts once more than k poisons of one kind are in the pool; see
    `bezoar.detection.density.pool_size`.
    """

    k: Annotated[int, "how many neighbours"] = 16
    pool: Annotated[int, "records compared against; 0: k / (2 rate), at least 2 k"] = 0
    rate: Annotated[float, "largest poison rate to plan for; sets the size of the pool"] = 0.01
    form: Annotated[
        Literal["mean_log", "log_mean"], "mean of the logarithms, or logarithm of the mean"
    ] = "mean_log"
    texts: Annotated[bool, "captions among the references too, as published for CLIP"] = False
    seed: Annotated[int, "seed of the random choice of the pool"] = 0

    def __post_init__(self) -> None:
        density.check_fields(self, min_k=2)

    def __call__(self, encoder: RecordEncoder, source: Records) -> Scores:
        """-> Scores, about 0 in even density; places thinner than their neighbours are worse."""
        return density.score_records(self, encoder, source, self.formula)

    def formula(self, near: density.Neighbourhood) -> Tensor:
        """(B,), in the chosen form."""
        powers = near.neighbour_dimensions * near.log_ratio
        return powers.mean(1) if self.form == "mean_log" else powers.logsumexp(1) - math.log(self.k)
