"""Local intrinsic dimension of the place an image lies in (Ma et al., ICLR 2018; on CLIP in Huang
et al., ICLR 2025).
"""

from typing import Annotated

from bezoar.detection import density
from bezoar.detection.detectors import RecordEncoder, Records
from bezoar.evaluation.scores import Scores
from bezoar.registry import method


@method
class Lid:
    """LID(x) = -k / sum over i < k of log( r_i(x) / r_k(x) + 1e-4 ), maximum likelihood, arXiv
    2502.01385.

    A record far from everything sees all others at about one distance: a high dimension. Copies of
    one image see each other at none: a low one, so repeated poisons invert the score wherever
    several are in the pool (see `bezoar.detection.density.pool_size`). k is that of the other
    density detectors, whose search it shares; published configurations have 64.
    """

    k: Annotated[int, "how many neighbours"] = 16
    pool: Annotated[int, "records compared against; 0: k / (2 rate), at least 2 k"] = 0
    rate: Annotated[float, "largest poison rate to plan for; sets the size of the pool"] = 0.01
    texts: Annotated[bool, "captions among the references too, as published for CLIP"] = False
    seed: Annotated[int, "seed of the random choice of the pool"] = 0

    def __post_init__(self) -> None:
        density.check_fields(self, min_k=2)

    def __call__(self, encoder: RecordEncoder, source: Records) -> Scores:
        """-> Scores in (0, D]; a place of many dimensions is suspicious."""
        return density.score_records(self, encoder, source, lambda near: near.dimension)
