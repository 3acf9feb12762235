"""SCALE-UP: brighten an input many times over; with a trigger the class stays what it was (Guo et
al. 2023, ICLR).
"""

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
    """Scaled prediction consistency: of F factors n, the k at which clip(n x) is read as x is.

    The paper's score is k / F, its threshold 0.5. It has F + 1 values, of which many clean images
    have the largest, and no image is above a threshold that they set. So images of equal k are
    ranked by how surely the class holds, the mean margin m of its logit over the next at all n:
    score = (k + (1 + m / (1 + |m|)) / 2) / (F + 1).
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
        logits = classifier(scaled.flatten(0, 1)).double().view(len(x), factors.shape[1], -1)
        own_class = logits[:, :1].argmax(2, keepdim=True)  # (B, 1, 1)
        logits = logits[:, 1:]  # (B, F, C)
        index = own_class.expand(-1, logits.shape[1], 1)
        others = logits.scatter(2, index, -torch.inf).amax(2)
        margins = logits.gather(2, index)[:, :, 0] - others  # (B, F), above 0 where the class holds
        margin = margins.clamp(max=1e6).mean(1)  # of a head of one class it is infinite
        surety = (1 + margin / (1 + margin.abs())) / 2
        return (((margins > 0).double().sum(1) + surety) / (1 + logits.shape[1])).float()
