"""SafeCLIP's split of the pairs into safe and risky (Yang et al., ICML 2024), as a score.

Image and text tower are first warmed up apart from each other, so that no caption can teach an
image anything; one short epoch with the CLIP loss then brings together what is alike anyway.
Poisons, whose captions fit nothing but the trigger, stay apart. Two Gaussians are fitted to the
cosines of all pairs.
"""

import warnings
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from bezoar import registry
from bezoar.detection import training_traces
from bezoar.detection.detectors import RecordEncoder, Records
from bezoar.detection.training_traces import SmallModel
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method
from bezoar.training.augmentation import Chance, Views
from bezoar.training.loop import FixedRecipe

MAX_ROUNDS = 1000  # of the mixture's fit, which is slow where the components overlap much
MIN_VARIANCE = 1e-8  # of its components


class SeparateContrast(nn.Module):
    """Two views of an image find each other, and two of a caption; image and text never meet."""

    def __init__(self, encoder: Encoder, temperature: float, drop: float) -> None:
        super().__init__()
        self.encoder, self.temperature, self.drop = encoder, temperature, drop
        self.views = Views(encoder.preprocess.size, scale=(0.5, 1.0))

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """uint8 (B, 3, H, W), int64 tokens (B, L) -> sum of the two symmetric InfoNCE losses."""
        x = self.views(images, chance)  # (B, 2, 3, S, S)
        z = self.encoder.encode_images(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        first, second = (
            self.encoder.encode_tokens(drop_tokens(tokens, self.drop, chance)) for _ in range(2)
        )
        return self.contrast(z[:, 0], z[:, 1]) + self.contrast(first, second)

    def contrast(self, a: Tensor, b: Tensor) -> Tensor:
        """Symmetric InfoNCE of unit rows a and b, (B, D), of which row i belongs to row i."""
        logits, truth = a @ b.T / self.temperature, torch.arange(len(a), device=a.device)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


@method
class Safeclip:
    """Score = log odds of the mixture's component with the lower mean: log P(risky) / P(safe); over
    0 = rather risky.

    SafeCLIP calls a pair safe where P(safe) > 0.9: a score below -2.2. Its warm-up has 5 epochs
    apart at 5e-4 and one together at 5e-6, with a bank of nearest neighbours as positives and
    richer changes of the text (EDA); ours has views of the same record alone, words dropped, and a
    rate for small sets, in which an epoch has few steps: at 5e-6 the two towers never meet. On
    scenes with 5 % wrong captions, 5,000 clean records and 40 poisons of a backdoor, or 552 of
    several and of targeted victims: AUROC 0.81, 0.84; without the warm-up 0.50, 0.56.
    """

    epochs: Annotated[int, "epochs of the warm-up, in which image and text are apart"] = 5
    batch: Annotated[int, "records a step, in both phases"] = 128
    lr: Annotated[float, "learning rate of the warm-up"] = 5e-4
    together: Annotated[
        float, "learning rate of the one epoch with the CLIP loss; the paper's for 1M pairs: 5e-6"
    ] = 2e-3
    temperature: Annotated[float, "temperature of the warm-up's softmax"] = 0.1
    drop: Annotated[float, "share of a caption's words that a view of it lacks"] = 0.2
    network: Annotated[str, "spec of the small model"] = training_traces.NETWORK
    side: Annotated[int, "images are reduced to this many pixels a side"] = training_traces.SIDE
    seed: Annotated[int, "seed of the training"] = 0

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

    def __call__(
        self, encoder: RecordEncoder, source: Records, report: ProgressReport = no_report
    ) -> Scores:
        """-> Scores, log odds. Of the encoder only the device is used."""
        model = SmallModel.build(source, self.network, self.seed, encoder.device, self.side)
        if self.epochs:
            warm_up = SeparateContrast(model.encoder, self.temperature, self.drop)
            recipe = FixedRecipe(self.epochs, self.batch, self.lr, weight_decay=0.1)
            model.train(warm_up, recipe, report, "safeclip: warm-up")
        clip = registry.make("objective", f"clip:epochs=1,batch={self.batch},lr={self.together}")
        model.train(clip(model.encoder), clip, report, "safeclip: one epoch together")
        agreement, _ = model.measure_pairs()
        odds = lower_component_odds(agreement.double().numpy())
        return Scores(model.ids, torch.from_numpy(odds).float())


def drop_tokens(tokens: Tensor, share: float, chance: Chance) -> Tensor:
    """Drop each token with probability `share` and move the others up: int64 (B, L), 0 = padding.

    A row's largest token stays: it is the end mark in CLIP's vocabulary, and no caption becomes
    empty.
    """
    uniform = chance.uniform(*tokens.shape).to(tokens.device)
    keep = (tokens > 0) & ((uniform >= share) | (tokens == tokens.amax(1, keepdim=True)))
    return (tokens * keep).gather(1, keep.int().argsort(dim=1, descending=True, stable=True))


def lower_component_odds(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """log P(lower component) / P(higher component) of a mixture of two Gaussians fitted to values
    (N,): (N,).

    Expectation maximisation starts from the halves below and above the median, of sorted values, so
    that their order cannot change a sum.

    Raises:
        UserError: When all values are equal.
    """
    x = np.sort(values)
    if x[0] == x[-1]:
        raise UserError(
            "detector 'safeclip': all pairs agree equally well; there is nothing to split"
        )
    halves = np.array_split(x, 2)
    variances = [max(half.var(), MIN_VARIANCE) for half in halves]
    mixture = GaussianMixture(
        2,
        tol=1e-12,
        max_iter=MAX_ROUNDS,
        reg_covar=MIN_VARIANCE,
        weights_init=[0.5, 0.5],
        means_init=[[half.mean()] for half in halves],
        precisions_init=[[[1 / v]] for v in variances],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(x[:, None])
    order = mixture.means_[:, 0].argsort()
    weight, mean = mixture.weights_[order], mixture.means_[order, 0]
    variance = mixture.covariances_[order, 0, 0]
    log_density: NDArray[np.float64] = (
        np.log(weight) - np.log(variance) / 2 - (values[:, None] - mean) ** 2 / (2 * variance)
    )  # (N, 2)
    return log_density[:, 0] - log_density[:, 1]
