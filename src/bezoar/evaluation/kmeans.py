"""k-means: Lloyd's algorithm from a k-means++ start (Arthur and Vassilvitskii 2007).

It runs on the vectors' device. The shipped bank's values of `ssl_cleanse` depend on its draws,
which scikit-learn's k-means does not reproduce.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS = 50  # of Lloyd's algorithm, at most
LEAST_SPREAD = 1e-9  # mean squared distance to the centres below which all vectors are centres


def cluster_centres(x: Tensor, count: int, seed: int) -> Tensor:
    """Find the centres of k-means clusters.

    Args:
        x: float32 (N, D).

    Returns:
        float32 (K, D); K is less than `count` if there are fewer distinct vectors.
    """
    centres = _initial_centres(x, count, seed)
    previous = None
    for _ in range(ITERATIONS):
        nearest = nearest_centres(x, centres)
        if previous is not None and torch.equal(nearest, previous):
            break
        previous = nearest
        member = F.one_hot(nearest, len(centres)).float()  # (N, K)
        size = member.sum(0)[:, None]
        centres = torch.where(size > 0, member.T @ x / size.clamp(min=1), centres)
    return centres


def nearest_centres(x: Tensor, centres: Tensor) -> Tensor:
    """Return which of (K, D) centres is nearest to each of (N, D) vectors, int64 (N,)."""
    return (x @ centres.T - centres.square().sum(1) / 2).argmax(1)


def _initial_centres(x: Tensor, count: int, seed: int) -> Tensor:
    """Draw centres with probabilities proportional to the squared distance to those so far."""
    generator = torch.Generator().manual_seed(seed)
    centres = x[:1]
    distance = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    for _ in range(min(count, len(x)) - 1):
        distance = torch.minimum(distance, (x - centres[-1]).double().square().sum(1))
        total = distance.sum()
        if not float(total) > LEAST_SPREAD * len(x):
            break
        u = torch.rand((), generator=generator, dtype=torch.float64).to(x.device) * total
        row = torch.searchsorted(distance.cumsum(0), u).clamp(max=len(x) - 1)
        centres = torch.cat([centres, x[row][None]])
    return centres
