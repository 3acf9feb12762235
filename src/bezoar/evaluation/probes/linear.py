"""Linear probe: logistic regression on frozen image features (Radford et al. 2021, appendix A.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation import success
from bezoar.evaluation.scores import Measure
from bezoar.registry import method

CELLS = 1 << 26  # largest matrix of logits, in elements
FLATTEST = 1e-5  # largest entry of the gradient at which the fit is done


@method
class Linear:
    """Features are the encoder's unit vectors, scaled to variance 1 each by the labelled records' own mean and deviation.

    Minimises c * (sum of cross-entropies) + |W|^2 / 2, the bias left free, by L-BFGS from zero; c as in scikit-learn.
    """

    c: Annotated[
        float, "weight of the data against the penalty; CLIP's published example has 0.316"
    ] = 0.316
    standardise: Annotated[
        bool, "scale every feature to mean 0 and variance 1; false keeps unit vectors"
    ] = True
    iterations: Annotated[int, "of L-BFGS, at most"] = 1000
    limit: Annotated[int | None, "labelled records at most, a fixed sample"] = None
    batch: Annotated[int, "images at a time"] = 512

    needs = ("train",)

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
    ) -> dict[str, Measure]:
        """Everything that `success` defines, as `linear.*`. Raises UserError without labelled data."""
        seen = success.TestViews.of(encoder, test, goals, victims, self.batch)
        known = success.embed_labelled(encoder, train, test, goals, self.limit, self.batch)
        found = self.fit(known.z, known.labels, len(test.classes))
        how = f"; linear head on {len(known)} labelled records, {found.about}"
        return {f"linear.{name}": m for name, m in seen.measures(found, how).items()}

    def fit(self, x: Tensor, y: Tensor, classes: int) -> "Head":
        """Features float32 (N, D) and their classes int64 (N,) -> the head."""
        mean, scale = (
            x.mean(0, dtype=torch.float64),
            torch.ones(x.shape[1], dtype=torch.float64, device=x.device),
        )
        if self.standardise:
            spread = (x.double() - mean).square().mean(0).sqrt()
            scale = torch.where(spread > 1e-9, spread, scale)
        else:
            mean = torch.zeros_like(mean)
        found = minimise(((x - mean) / scale).to(x.dtype), y, classes, self.c, self.iterations)
        weight = found.weight.double() / scale
        return Head(
            weight.to(x.dtype), (found.bias.double() - weight @ mean).to(x.dtype), found.about
        )

    def __post_init__(self) -> None:
        if not self.c > 0 or self.iterations < 1 or self.batch < 1:
            raise ValueError("needs c > 0, iterations >= 1, batch >= 1")
        if self.limit is not None and self.limit < 2:
            raise ValueError("limit must be at least 2")


@dataclass(frozen=True)
class Head:
    """weight: float32 (C, D). bias: float32 (C,). about: how the fit ended."""

    weight: Tensor
    bias: Tensor
    about: str = ""

    def __call__(self, z: Tensor) -> Tensor:
        """(N, D) -> logits (N, C)."""
        return torch.addmm(self.bias, z, self.weight.T)


def minimise(x: Tensor, y: Tensor, classes: int, c: float, iterations: int) -> Head:
    """Multinomial logistic regression of y int64 (N,) on x float32 (N, D).

    Products run where x is; L-BFGS is scipy's, as in scikit-learn: its state, float64 C (D + 1), stays on the CPU.
    """
    from scipy.optimize import minimize

    n, penalty = len(x), 1 / (c * len(x))
    blocks = [slice(i, i + max(1, CELLS // classes)) for i in range(0, n, max(1, CELLS // classes))]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean cross-entropy with the penalty, and its gradient."""
        w = torch.from_numpy(flat).view(classes, -1).to(x.device)
        weight, bias = w[:, :-1].to(x.dtype), w[:, -1].to(x.dtype)
        loss, slope = penalty / 2 * w[:, :-1].square().sum(), torch.zeros_like(w)
        for rows in blocks:
            logs = torch.addmm(bias, x[rows], weight.T).log_softmax(1)
            truth = y[rows, None]
            loss = loss - logs.gather(1, truth).double().sum() / n
            surplus = logs.exp_()
            surplus.scatter_add_(1, truth, torch.full_like(truth, -1, dtype=x.dtype))
            slope[:, :-1] += surplus.T @ x[rows] / n
            slope[:, -1] += surplus.sum(0, dtype=torch.float64) / n
        slope[:, :-1] += penalty * w[:, :-1]
        return float(loss), slope.cpu().numpy().ravel()

    start = np.zeros(classes * (x.shape[1] + 1))
    options = {"maxiter": iterations, "maxfun": 10 * iterations, "gtol": FLATTEST, "ftol": 0.0}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    w = torch.from_numpy(found.x).view(classes, -1).to(x)
    steepest = float(np.abs(found.jac).max())
    return Head(
        w[:, :-1].contiguous(),
        w[:, -1].contiguous(),
        f"{found.nit} iterations, gradient at most {steepest:.0e}",
    )
