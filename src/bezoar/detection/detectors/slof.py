"""Simplified local outlier factor: k-distance over that of the neighbours (Schubert 2014; Huang et
al. 2025).
"""

from typing import Annotated

from bezoar.detection import density
from bezoar.detection.detectors import RecordEncoder, Records
from bezoar.evaluation.scores import Scores
from bezoar.registry import method


@method
class Slof:
    """SLOF(x) = mean over the k neighbours y of kdist(x) / kdist(y), arXiv 2502.01385.

    The published code looks the neighbours up one column off for half of the rows; this looks up
    the neighbours. The score inverts once more than k poisons of one kind are in the pool; see
    `bezoar.detection.density.pool_size`.
    """

    k: Annotated[int, "how many neighbours"] = 16
    pool: Annotated[int, "records compared against; 0: k / (2 rate), at least 2 k"] = 0
    rate: Annotated[float, "largest poison rate to plan for; sets the size of the pool"] = 0.01
    texts: Annotated[bool, "captions among the references too, as published for CLIP"] = False
    seed: Annotated[int, "seed of the random choice of the pool"] = 0

    def __post_init__(self) -> None:
        density.check_fields(self)

    def __call__(self, encoder: RecordEncoder, source: Records) -> Scores:
        """-> Scores > 0, about 1 in even density, larger where it is thinner than around."""
        return density.score_records(
            self, encoder, source, lambda near: near.log_ratio.exp().mean(1)
        )
