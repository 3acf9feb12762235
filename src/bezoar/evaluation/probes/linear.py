"""Linear probe: logistic regression on frozen image features (Radford et al. 2021, A.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from bezoar.attacks.plan import Goal
from bezoar.data.blocks import blocks
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation import success
from bezoar.evaluation.probes import add_prefix, check_limit
from bezoar.evaluation.scores import Measure
from bezoar.registry import method

CELLS = 1 << 26  # largest matrix of logits, in elements
ITERATIONS = 1000  # of L-BFGS, at most
TOLERANCE = 1e-5  # largest entry of the gradient at which the fit is done
CONSTANT = 1e-9  # standard deviation below which a feature is not scaled


@method
class Linear:
    """Logistic regression on unit vectors, scaled by the labelled records' own deviation.

    Minimises c * (sum of cross-entropies) + |W|^2 / 2, with the bias left free, by L-BFGS from
    zero.
    """

    c: Annotated[
        float, "weight of the data against the penalty; CLIP's published example has 0.316"
    ] = 0.316
    standardise: Annotated[
        bool, "scale every feature to mean 0 and variance 1; false keeps unit vectors"
    ] = True
    limit: Annotated[int | None, "labelled records at most, a fixed sample"] = None

    needs = ("train",)

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError("needs c > 0")
        check_limit(self.limit)

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
    ) -> dict[str, Measure]:
        """Return the measures of `TestViews.measures` as `linear.*`; see `Probe`."""
        views = success.TestViews.of(encoder, test, goals, victims)
        labelled = success.embed_labelled(encoder, train, test, goals, self.limit)
        head = self.fit(labelled.z, labelled.labels, len(test.classes))
        how = f"; linear head on {len(labelled)} labelled records, {head.about}"
        return add_prefix("linear", views.measures(head, how))

    def fit(self, x: Tensor, y: Tensor, classes: int) -> "LinearHead":
        """Fit a head.

        Args:
            x: features, float (N, D).
            y: int64 (N,), their classes.

        Returns:
            The head, on the features' device.
        """
        mean = x.mean(0, dtype=torch.float64)
        scale = torch.ones_like(mean)
        if self.standardise:
            deviation = (x.double() - mean).square().mean(0).sqrt()
            scale = torch.where(deviation > CONSTANT, deviation, scale)
        else:
            mean = torch.zeros_like(mean)
        features = ((x - mean) / scale).to(x.dtype)
        head = fit_logistic(features, y, classes, self.c)
        weight = head.weight.double() / scale
        bias = head.bias.double() - weight @ mean
        return LinearHead(weight.to(x.dtype), bias.to(x.dtype), head.about)


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier.

    Attributes:
        weight: float (C, D).
        bias: float (C,).
        about: how the fit ended.
    """

    weight: Tensor
    bias: Tensor
    about: str = ""

    def __call__(self, z: Tensor) -> Tensor:
        """Return logits (N, C) of vectors (N, D)."""
        return torch.addmm(self.bias, z, self.weight.T)


def fit_logistic(x: Tensor, y: Tensor, classes: int, c: float) -> LinearHead:
    """Fit multinomial logistic regression of y int64 (N,) on x float (N, D).

    The optimiser is scipy's L-BFGS. scikit-learn's class uses the same, but runs on CPUs only,
    takes 1.5 times as long for the same accuracy, and has no logit for a class without records.

    c: weight of the data against the penalty.
    """
    n = len(x)
    penalty = 1 / (c * n)
    row_blocks = blocks(n, max(1, CELLS // classes))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Return mean cross-entropy with the penalty, and its gradient."""
        w = torch.from_numpy(flat).view(classes, -1).to(x.device)  # (C, D + 1), the bias last
        weight, bias = w[:, :-1].to(x.dtype), w[:, -1].to(x.dtype)
        loss = penalty / 2 * w[:, :-1].square().sum()
        gradient = torch.zeros_like(w)
        for rows in row_blocks:
            log_softmax = torch.addmm(bias, x[rows], weight.T).log_softmax(1)
            truth = y[rows, None]
            loss = loss - log_softmax.gather(1, truth).double().sum() / n
            surplus = log_softmax.exp_()  # softmax - one-hot, (B, C)
            surplus.scatter_add_(1, truth, torch.full_like(truth, -1, dtype=x.dtype))
            gradient[:, :-1] += surplus.T @ x[rows] / n
            gradient[:, -1] += surplus.sum(0, dtype=torch.float64) / n
        gradient[:, :-1] += penalty * w[:, :-1]
        return float(loss), gradient.cpu().numpy().ravel()

    start = np.zeros(classes * (x.shape[1] + 1))
    options = {"maxiter": ITERATIONS, "maxfun": 10 * ITERATIONS, "gtol": TOLERANCE, "ftol": 0.0}
    result = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    w = torch.from_numpy(result.x).view(classes, -1).to(x)
    steepest = float(np.abs(result.jac).max())
    about = f"{result.nit} iterations, gradient at most {steepest:.0e}"
    return LinearHead(w[:, :-1].contiguous(), w[:, -1].contiguous(), about)
