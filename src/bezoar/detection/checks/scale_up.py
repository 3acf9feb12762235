"""SCALE-UP: brighten an input many times over; with a trigger the class stays what it was (Guo et al. 2023, ICLR)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from bezoar.data.pairs import Pairs
from bezoar.detection.checks import IMAGES_AT_ONCE
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation.classifiers import Classifier
from bezoar.evaluation.scores import Scores
from bezoar.registry import method


@method
class ScaleUp:
    """Scaled prediction consistency: the share of the factors n at which clip(n x) is read as x is;
    the paper's threshold is 0.5. It has as many values as there are factors, and one.
    """

    factors: Annotated[tuple[int, ...], "factors of the brightness"] = (3, 5, 7, 9, 11)

    needs: ClassVar[tuple[str, ...]] = ("classifier",)

    def __post_init__(self) -> None:
        if not self.factors or min(self.factors) < 2:
            raise ValueError("factors must be at least one number of 2 and more")

    def __call__(self, encoder: Encoder, images: Pairs, classifier: Classifier) -> Scores:
        """-> Scores, 0 to 1."""
        encoder.eval()
        size = max(1, IMAGES_AT_ONCE // (1 + len(self.factors)))
        values = [
            self.consistency(classifier, batch.images.to(encoder.device))
            for batch in images.batches(size)
        ]
        return Scores(images.ids, torch.cat(values).cpu(), notes={"head": classifier.how})

    @torch.inference_mode()
    def consistency(self, classifier: Classifier, x: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B,)."""
        factors = torch.tensor((1, *self.factors), device=x.device).view(1, -1, 1, 1, 1)
        scaled = (x[:, None].float() / 255 * factors).clamp(max=1)
        classes = classifier(scaled.flatten(0, 1)).argmax(1).view(len(x), -1)
        return (classes[:, 1:] == classes[:, :1]).float().mean(1)
