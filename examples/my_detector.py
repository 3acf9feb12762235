"""A detector of my own, in one file: images that are nearly the same but have unlike captions.

python examples/my_detector.py DATA ENCODER
bezoar scan DATA --encoder ENCODER --detector examples/my_detector.py:k=4 duplicates
"""

import sys
from typing import Annotated

from bezoar import Scan, Settings, execute
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.registry import method


@method
class MyDetector:
    """How unlike a record's caption is to the captions of its nearest images."""

    k: Annotated[int, "neighbours"] = 8

    def __call__(self, encoder: Encoder, source: Pairs) -> Scores:
        embedded = encoder.embed(source)  # images and texts: float32 (N, D), unit rows
        if embedded.texts is None:
            raise UserError("my_detector needs an encoder with a text tower, and captions")
        similarity = embedded.images @ embedded.images.T  # (N, N)
        nearest = similarity.fill_diagonal_(-1).topk(self.k, dim=1).indices  # (N, k)
        mean_caption = embedded.texts[nearest].mean(1)  # (N, D)
        return Scores(embedded.ids, 1 - (embedded.texts * mean_caption).sum(1))


def main(data: str, encoder: object, settings: Settings | None = None) -> None:
    scan = execute(Scan(data, encoder, (f"{__file__}:k=4", "duplicates")), settings)
    print(scan.manifest["notes"]["verdict"])


if __name__ == "__main__":
    main(*sys.argv[1:])
