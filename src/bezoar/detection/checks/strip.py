"""STRIP: put other images over an input; with a trigger the class stays what it was (Gao et al.
2019, ACSAC).
"""

from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.data.pairs import Pairs
from bezoar.data.randomness import sample_rows
from bezoar.detection.checks import IMAGES_AT_ONCE
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.classifiers import Classifier
from bezoar.evaluation.scores import Scores
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method


@method
class Strip:
    """Score: minus the mean entropy, in nats, of the posterior over blends clip(x + alpha c) with
    clean images c.

    Published code takes 64 to 100 of them, alpha 0.5 to 1. With a zero-shot or linear head on a
    contrastive encoder this is STRIP-CL.
    """

    count: Annotated[
        int, "clean images that are blended over each input, the same for all inputs"
    ] = 64
    alpha: Annotated[float, "brightness of the clean images"] = 1.0

    needs: ClassVar[tuple[str, ...]] = ("classifier", "clean", "report")

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.alpha <= 1:
            raise ValueError("needs count >= 1, alpha above 0 and at most 1")

    def __call__(
        self,
        encoder: Encoder,
        images: Pairs,
        classifier: Classifier,
        clean: Pairs,
        report: ProgressReport = no_report,
    ) -> Scores:
        """-> Scores. Raises UserError for too few clean images."""
        if len(clean) < self.count:
            raise UserError(
                f"strip blends {self.count} clean images; there are {len(clean)}: give more, or "
                f"count={len(clean)}"
            )
        encoder.eval()
        rows = np.sort(sample_rows(clean.ids, self.count, 0))
        overlays = clean.take(rows).images.to(encoder.device).float() / 255
        sides = images.images.shape[-2:]
        if overlays.shape[-2:] != sides:
            overlays = F.interpolate(overlays, sides, mode="bilinear", antialias=True)
        values: list[Tensor] = []
        done = 0
        for batch in images.batches(max(1, IMAGES_AT_ONCE // self.count)):
            x = batch.images.to(encoder.device).float() / 255
            values.append(-self.mean_entropy(classifier, x, overlays))
            done += len(batch)
            report(done, len(images), "blends")
        notes = {"clean": len(overlays), "head": classifier.how}
        return Scores(images.ids, torch.cat(values).cpu(), notes=notes)

    @torch.inference_mode()
    def mean_entropy(self, classifier: Classifier, x: Tensor, overlays: Tensor) -> Tensor:
        """Over the blends of x (B, 3, H, W) with overlays (C, 3, H, W): (B,), 0 to log(classes)."""
        blends = (x[:, None] + self.alpha * overlays).clamp(max=1)
        logs = classifier(blends.flatten(0, 1)).float().log_softmax(1)
        entropy = -(logs.exp() * logs).sum(1)
        return entropy.view(len(x), len(overlays)).mean(1)
