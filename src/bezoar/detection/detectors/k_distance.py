"""Distance to the k-th nearest image: poisons sit alone (k-dist in Huang et al., ICLR 2025, arXiv
2502.01385).
"""

from typing import Annotated

from bezoar.detection import density
from bezoar.detection.detectors import RecordEncoder, Records
from bezoar.evaluation.scores import Scores
from bezoar.registry import method


@method
class KDistance:
    """k-dist(x) = r_k(x), Euclidean between image embeddings (unit rows), to a fixed pool of the
    scanned records.

    The score inverts once more than k poisons of one kind are in the pool; see
    `bezoar.detection.density.pool_size`.
    """

    k: Annotated[int, "which neighbour"] = 16
    pool: Annotated[int, "records compared against; 0: k / (2 rate), at least 2 k"] = 0
    rate: Annotated[float, "largest poison rate to plan for; sets the size of the pool"] = 0.01
    texts: Annotated[bool, "captions among the references too, as published for CLIP"] = False
    seed: Annotated[int, "seed of the random choice of the pool"] = 0

    def __post_init__(self) -> None:
        density.check_fields(self)

    def __call__(self, encoder: RecordEncoder, source: Records) -> Scores:
        """-> Scores in [0, 2]; a lonely record is suspicious."""
        return density.score_records(self, encoder, source, lambda near: near.distance)
