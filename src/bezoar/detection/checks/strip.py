"""STRIP: put other images over an input; with a trigger the class stays what it was (Gao et al. 2019, ACSAC)."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.data.pairs import Pairs
from bezoar.data.randomness import sample_rows
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.classifiers import Classifier
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

AT_ONCE = 1024  # images through the classifier


@method
class Strip:
    """Score: minus the mean entropy, in nats, of the posterior over blends clip(x + alpha c) with clean images c.

    Published code takes 64 to 100 of them, alpha 0.5 to 1. With a zero-shot or linear head on a contrastive encoder this is
    STRIP-CL.
    """

    count: Annotated[int, "clean images that are blended over each input, the same for all"] = 64
    alpha: Annotated[float, "brightness of the clean images"] = 1.0

    needs: ClassVar[tuple[str, ...]] = ("classifier", "clean", "report")

    def __call__(
        self,
        encoder: Encoder,
        images: Pairs,
        classifier: Classifier,
        clean: Pairs,
        report: Callable[[int, int, str], Any] | None = None,
    ) -> Scores:
        """-> Scores. Raises UserError for too few clean images, or of another size."""
        if len(clean) < self.count:
            raise UserError(
                f"strip blends {self.count} clean images; there are {len(clean)}: give more, or count={len(clean)}"
            )
        encoder.eval()
        chosen = (
            clean.take(np.sort(sample_rows(clean.ids, self.count, 0)))
            .images.to(encoder.device)
            .float()
            / 255
        )
        if chosen.shape[-2:] != images.images.shape[-2:]:
            chosen = F.interpolate(
                chosen, images.images.shape[-2:], mode="bilinear", antialias=True
            )
        values: list[Tensor] = []
        for part in images.batches(max(1, AT_ONCE // self.count)):
            x = part.images.to(encoder.device).float() / 255
            values.append(-self.entropy(classifier, x, chosen))
            if report is not None:
                report(sum(map(len, values)), len(images), "blends")
        return Scores(
            images.ids,
            torch.cat(values).cpu(),
            notes={"clean": len(chosen), "head": classifier.how},
        )

    @torch.inference_mode()
    def entropy(self, classifier: Classifier, x: Tensor, clean: Tensor) -> Tensor:
        """Mean over the blends of x float (B, 3, H, W) with clean (C, 3, H, W): float32 (B,), 0 to log(classes)."""
        blends = (x[:, None] + self.alpha * clean).clamp(max=1)
        logs = classifier(blends.flatten(0, 1)).float().log_softmax(1)
        return -(logs.exp() * logs).sum(1).unflatten(0, (len(x), len(clean))).mean(1)

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.alpha <= 1:
            raise ValueError("needs count >= 1, alpha above 0 and at most 1")
