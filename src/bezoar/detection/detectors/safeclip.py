"""SafeCLIP's split of the pairs into safe and risky (Yang et al., ICML 2024), as a score.

Image and text tower are first warmed up apart from each other, so that no caption can teach an image anything; one short
epoch with the CLIP loss then brings together what is alike anyway. Poisons, whose captions fit nothing but the trigger,
stay apart. Two Gaussians are fitted to the cosines of all pairs.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar import registry
from bezoar.detection import training_traces
from bezoar.detection.training_traces import SmallModel
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.heads import ProgressReport, no_report
from bezoar.evaluation.scores import Scores
from bezoar.registry import method
from bezoar.training.augmentation import Chance, Views
from bezoar.training.loop import FixedRecipe

ROUNDS, NARROWEST = 1000, 1e-6  # of the mixture: most rounds, least variance


class Apart(nn.Module):
    """Two views of an image find each other among the batch, and two thinned captions; image and text never meet."""

    def __init__(self, encoder: Encoder, temperature: float, drop: float) -> None:
        super().__init__()
        self.encoder, self.temperature, self.drop = encoder, temperature, drop
        self.views = Views(encoder.preprocess.size, scale=(0.5, 1.0))

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """images uint8 (B, 3, H, W), tokens int64 (B, L) -> sum of the two symmetric InfoNCE losses."""
        x = self.views(images, chance)
        z = self.encoder.encode_images(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        w = [self.encoder.encode_tokens(thinned(tokens, self.drop, chance)) for _ in range(2)]
        return self.contrast(z[:, 0], z[:, 1]) + self.contrast(*w)

    def contrast(self, a: Tensor, b: Tensor) -> Tensor:
        """Unit rows (B, D) twice; row i of one belongs to row i of the other."""
        logits, truth = a @ b.T / self.temperature, torch.arange(len(a), device=a.device)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


@method
class Safeclip:
    """Score = log odds of the mixture's component with the lower mean: log P(risky) / P(safe); over 0 = rather risky.

    SafeCLIP calls a pair safe where P(safe) > 0.9: a score below -2.2. Its warm-up has 5 epochs apart at 5e-4 and one
    together at 5e-6, with a bank of nearest neighbours as positives and richer changes of the text (EDA); ours
    has views of the same record alone, words dropped, and a rate for small sets, in which an epoch has few steps: at 5e-6
    the two towers never meet. On scenes with 5 % wrong captions, 5,000 clean records and 40 poisons of a backdoor, or 552 of
    several and of targeted victims: AUROC 0.81, 0.84; without the warm-up 0.50, 0.56.
    """

    epochs: Annotated[int, "of the warm-up, image and text apart"] = 5
    batch: Annotated[int, "records a step, in both phases"] = 128
    lr: Annotated[float, "of the warm-up"] = 5e-4
    together: Annotated[
        float, "learning rate of the one epoch with the CLIP loss; the paper's for 1M pairs: 5e-6"
    ] = 2e-3
    temperature: Annotated[float, "of the warm-up's softmax"] = 0.1
    drop: Annotated[float, "share of a caption's words that a view of it lacks"] = 0.2
    network: Annotated[str, "the small model: a spec"] = training_traces.NETWORK
    side: Annotated[int, "images are brought to this many pixels at most"] = training_traces.SIDE
    seed: Annotated[int, "of the training"] = 0

    needs: ClassVar[tuple[str, ...]] = ("report",)

    def __post_init__(self) -> None:
        if (
            self.epochs < 0
            or self.batch < 2
            or min(self.lr, self.together, self.temperature) <= 0
            or self.side < 1
        ):
            raise ValueError(
                "needs epochs >= 0, batch >= 2, lr, together and temperature > 0, side >= 1"
            )
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be in [0, 1); got {self.drop}")
        registry.make("network", self.network)

    def __call__(self, encoder: Any, source: Any, report: ProgressReport = no_report) -> Scores:
        """-> Scores, log odds; only the device is taken of the encoder."""
        study = SmallModel.build(source, self.network, self.seed, encoder.device, self.side)
        if self.epochs:
            apart = Apart(study.encoder, self.temperature, self.drop)
            study.train(
                apart,
                FixedRecipe(self.epochs, self.batch, self.lr, weight_decay=0.1),
                report,
                "safeclip: warm-up",
            )
        clip = registry.make("objective", f"clip:epochs=1,batch={self.batch},lr={self.together}")
        study.train(clip(study.encoder), clip, report, "safeclip: one epoch together")
        agreement, _ = study.measure_pairs()
        return Scores(study.ids, odds(agreement).float())


def thinned(tokens: Tensor, share: float, chance: Chance) -> Tensor:
    """int64 (B, L), 0 = padding -> the same with each token dropped with probability `share`, the others moved up.

    A row's largest token stays: it is the end mark in CLIP's vocabulary, and no caption becomes empty.
    """
    drawn = chance.uniform(*tokens.shape).to(tokens.device)
    keep = (tokens > 0) & ((drawn >= share) | (tokens == tokens.amax(1, keepdim=True)))
    return (tokens * keep).gather(1, keep.int().argsort(dim=1, descending=True, stable=True))


def odds(values: Tensor) -> Tensor:
    """log P(lower component) / P(higher component) of a mixture of two Gaussians: float64 (N,).

    Fitted by expectation maximisation from the halves below and above the median; of sorted values, so that their order
    cannot change a sum. Raises UserError where all values are equal.
    """
    x = values.double().sort().values
    if float(x[0]) == float(x[-1]):
        raise UserError(
            "detector 'safeclip': all pairs agree equally well; there is nothing to split"
        )
    high = (torch.arange(len(x), device=x.device) >= len(x) / 2).double()
    before = torch.full((6,), torch.inf, dtype=x.dtype)
    for _ in range(ROUNDS):
        r = torch.stack([1 - high, high])
        weight = r.sum(1).clamp(min=1e-9)
        mean = (r * x).sum(1) / weight
        variance = ((r * (x - mean[:, None]).square()).sum(1) / weight).clamp(min=NARROWEST)
        fitted = torch.cat([weight / len(x), mean, variance]).cpu()
        if (fitted - before).abs().max() < 1e-10:
            break
        before, high = fitted, torch.sigmoid(-_odds(x, fitted))
    share, mean, variance = fitted.to(values.device).view(3, 2)
    order = mean.argsort()
    return _odds(values.double(), torch.cat([share[order], mean[order], variance[order]]))


def _odds(x: Tensor, fitted: Tensor) -> Tensor:
    """log of the first component's density, weighted, less that of the second."""
    share, mean, variance = fitted.to(x.device).view(3, 2)[:, :, None]
    log = share.log() - variance.log() / 2 - (x - mean).square() / (2 * variance)
    return log[0] - log[1]
