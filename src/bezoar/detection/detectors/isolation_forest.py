"""Isolation forest (Liu, Ting, Zhou, ICDM 2008) on image embeddings: records that few random cuts
set apart.
"""

from typing import Annotated

import numpy as np
import torch
from sklearn import ensemble

from bezoar.data.blocks import blocks
from bezoar.data.randomness import sample_rows
from bezoar.detection.detectors import RecordEncoder, Records, require_texts
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

BLOCK = 1 << 14  # records scored at a time


@method
class IsolationForest:
    """2^(-mean depth at which a tree isolates x / expected depth), by scikit-learn's forest."""

    trees: Annotated[int, "how many trees the forest has"] = 100
    cut: Annotated[int, "how many records a tree is grown on"] = 256
    pool: Annotated[int, "how many records the trees draw theirs from"] = 16384
    texts: Annotated[bool, "whether captions are among them, as published for CLIP"] = False
    seed: Annotated[int, "seed of the pool and of the trees"] = 0

    def __post_init__(self) -> None:
        if self.trees < 1 or self.cut < 2 or self.pool < 2:
            raise ValueError(
                f"needs trees >= 1, cut >= 2, pool >= 2; got {self.trees}, {self.cut}, {self.pool}"
            )

    def __call__(self, encoder: RecordEncoder, source: Records) -> Scores:
        """-> Scores in (0, 1); a record that is set apart early is suspicious."""
        embedded = encoder.embed(source)
        ids, kinds = embedded.ids, [embedded.images]
        if self.texts:
            kinds.append(require_texts(embedded, "'isolation_forest' with texts=true"))
        if len(ids) < 2:
            raise UserError(
                f"detector 'isolation_forest' needs at least 2 records; there are {len(ids)}"
            )
        rows = torch.as_tensor(sample_rows(ids, self.pool, self.seed))
        sample = np.concatenate([z[rows.to(z.device)].float().cpu().numpy() for z in kinds])
        forest = ensemble.IsolationForest(
            n_estimators=self.trees,
            max_samples=min(self.cut, len(sample)),
            random_state=self.seed % 2**32,
        ).fit(sample)
        parts = [
            -forest.score_samples(embedded.images[block].float().cpu().numpy())
            for block in blocks(len(ids), BLOCK)
        ]
        return Scores(ids, torch.as_tensor(np.concatenate(parts), dtype=torch.float32))
