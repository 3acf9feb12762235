"""Ridge regression whose strength is chosen by what it predicts of left-out rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bezoar.detection.pseudo_classes import vector_blocks
from bezoar.errors import UserError

# Strengths of the ridge that are tried, in units of the mean eigenvalue of the references'
# covariance.
STRENGTHS = tuple(10.0**power for power in range(-6, 3))


@dataclass(frozen=True)
class RidgeFit:
    """A ridge regression of y (N, E) on x (N, D). All are float64."""

    means: tuple[Tensor, Tensor]  # (D,) and (E,), of x and of y
    weights: Tensor  # (D, E)
    left_out: Tensor  # (N, E), what is left of each row of y by the regression without it

    def predict(self, x: Tensor) -> Tensor:
        """(M, D) -> (M, E)."""
        return self.means[1] + (x - self.means[0]) @ self.weights


def fit_ridge(x: Tensor, y: Tensor) -> RidgeFit:
    """Fit a ridge regression, with the one of `STRENGTHS` that errs least on left-out rows.

    An intercept is fitted and not shrunk. With the hat matrix H of the regression, the residual of
    record i without it is (y - H y)_i / (1 - H_ii): one decomposition serves all records and all
    strengths.

    Args:
        x: Float64 (N, D).
        y: Float64 (N, E).

    Raises:
        UserError: For vectors that are not finite.
    """
    n, means = len(x), (x.mean(0), y.mean(0))
    x, y = x - means[0], y - means[1]
    values, axes = torch.linalg.eigh(x.T @ x)  # (D,), (D, D)
    turned = x @ axes  # (N, D)
    products = turned.T @ y  # (D, E)
    best: RidgeFit | None = None
    least = torch.inf
    for strength in STRENGTHS:
        shrunk = 1 / (values.clamp(min=0) + strength * values.mean().clamp(min=1e-12))  # (D,)
        leverage = 1 / n + (turned.square() * shrunk).sum(1)  # (N,)
        slopes = shrunk[:, None] * products  # (D, E), along the axes
        left_out = (y - turned @ slopes) / (1 - leverage).clamp(min=1e-6)[:, None]
        error = float(left_out.square().mean())
        if error < least:
            best, least = RidgeFit(means, axes @ slopes, left_out), error
    if best is None:
        raise UserError("NaN or infinite vectors; a regression is defined for finite ones")
    return best


def stack_float64(vectors: Tensor, device: torch.device) -> Tensor:
    """Vectors (N, D), which may lie in a file, in float64 on the device."""
    return torch.cat([part.double() for part in vector_blocks(vectors, device)])
