"""evaluation.kmeans"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 50  # of Lloyd's algorithm at most


def cluster_centres(x: Tensor, count: int, seed: int) -> Tensor:
    """Centres (at most `count`, D) of k-means, Lloyd's algorithm from a k-means++ start (Arthur & Vassilvitskii 2007)."""
    generator = torch.Generator().manual_seed(seed)
    centres, far = x[:1], torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    for _ in range(min(count, len(x)) - 1):
        far = torch.minimum(far, (x - centres[-1]).double().square().sum(1))
        if not float(far.sum()) > 1e-9 * len(x):
            break  # fewer different vectors than classes
        at = torch.rand((), generator=generator, dtype=torch.float64).to(x.device) * far.sum()
        centres = torch.cat(
            [centres, x[torch.searchsorted(far.cumsum(0), at).clamp(max=len(x) - 1)][None]]
        )
    before = None
    for _ in range(ROUNDS):
        nearest = (x @ centres.T - centres.square().sum(1) / 2).argmax(1)
        if before is not None and torch.equal(nearest, before):
            break
        before, member = nearest, torch.nn.functional.one_hot(nearest, len(centres)).float()
        size = member.sum(0)[:, None]
        centres = torch.where(size > 0, member.T @ x / size.clamp(min=1), centres)
    return centres
