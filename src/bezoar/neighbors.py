"""Exact k-nearest neighbours on the device, in bounded memory, and the local densities built on them.

Candidates come from a blocked matrix product, which is fast and loses small distances to cancellation. The best k and a
margin are measured again as differences in float64. A row whose k-th distance is not clear of the worst candidate by
more than the product's rounding error is searched again by differences alone, so the answer is exact, ties go to the
lower index, and block sizes cannot change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bezoar.errors import UserError
from bezoar.pairs import draws

MARGIN = 8  # candidates beyond k that are measured again
CELLS = 1 << 24  # largest temporary matrix, in elements
WIDEST = 1 << 16  # references of one matrix product
SMALLEST = 1e-6  # distances are not divided by less


@dataclass(frozen=True)
class Neighbors:
    """distance: float32 (N, k), ascending. index: int64 (N, k), rows of the references."""

    distance: Tensor
    index: Tensor


def nearest(queries: Tensor, references: Tensor, k: int, exclude_self: bool | Tensor = False, cells: int = CELLS) -> Neighbors:
    """The k references nearest to each query by Euclidean distance, ties to the lower index.

    queries: float (N, D). references: float (R, D). exclude_self: True when query i is reference i, or int64 (N,) the
    reference that is the query itself (-1: none). cells: bound on a temporary's elements; no effect on the result.
    Raises UserError when there are too few references.
    """
    own = _own(exclude_self, len(queries), queries.device)
    usable = len(references) - int(bool((own >= 0).any()))
    if not 1 <= k <= usable:
        raise UserError(f"{k} nearest neighbours asked for; there are {usable} records to choose from")
    centre = references.mean(0, dtype=torch.float64)
    centred = (references - centre).float()
    parts = [
        _exact(queries[rows], references, centred, centre, k, own[rows], cells)
        for rows in _blocks(len(queries), max(1, cells // min(len(references), WIDEST)))
    ]
    return Neighbors(torch.cat([d for d, _ in parts]).float(), torch.cat([i for _, i in parts]))


def pool(ids: Sequence[str], size: int, seed: int) -> np.ndarray:
    """Rows of a fixed sample of the records, int64 (min(size, N),), in an order that belongs to the records.

    The `size` records with the smallest draw: which they are depends on (seed, ids) and on nothing else.
    """
    return np.lexsort((np.asarray(ids), draws(seed, ids, 1, "pool")[:, 0]))[:size]


def pool_size(k: int, rate: float, n: int) -> int:
    """How many references let a poison's k-th neighbour be clean: k / (2 rate), at least 2 k and at most n.

    Poisons of one backdoor are each other's neighbours. Once rate x pool exceeds k they look denser than clean records
    and every density score inverts; half of that leaves room for chance.
    """
    return min(n, max(2 * k, round(k / (2 * rate))))


@dataclass(frozen=True)
class Density:
    """Local distances of N records to a pool of P of them, a record never its own neighbour.

    distance: float64 (N, k), ascending. index: int64 (N, k), rows of the pool. pooled: float64 (P, k), the pool's own
    distances to its other members. dimension: D of the embedding.
    """

    distance: Tensor
    index: Tensor
    pooled: Tensor
    dimension: int

    @staticmethod
    def measure(z: Tensor, ids: Sequence[str], k: int, size: int, seed: int) -> Density:
        """Of embeddings z (N, D) against the `pool` of that size and seed."""
        rows = torch.as_tensor(pool(ids, size, seed), device=z.device)
        own = torch.full((len(z),), -1, dtype=torch.long, device=z.device)
        own[rows] = torch.arange(len(rows), device=z.device)
        found = nearest(z, z[rows], k, own)
        distance = found.distance.double().clamp(min=SMALLEST)
        return Density(distance, found.index, distance[rows], z.shape[1])

    @property
    def log_ratio(self) -> Tensor:
        """log( kdist(x) / kdist(y) ) for the k neighbours y of each record x: float64 (N, k)."""
        return self.distance[:, -1:].log() - self.pooled[:, -1].log()[self.index]

    @property
    def lid(self) -> Tensor:
        """Local intrinsic dimension of the neighbours, float64 (N, k), in (0, D].

        -k / sum over i < k of log(r_i / r_k + 1e-4) (maximum likelihood), cut at the dimension D of the embedding.
        """
        k = self.pooled.shape[1]
        logs = (self.pooled[:, :-1] / self.pooled[:, -1:] + 1e-4).log().sum(1)
        return (k / (-logs).clamp(min=k / self.dimension))[self.index]


def _own(exclude_self: bool | Tensor, n: int, device: torch.device) -> Tensor:
    if isinstance(exclude_self, Tensor):
        return exclude_self.to(device)
    return torch.arange(n, device=device) if exclude_self else torch.full((n,), -1, dtype=torch.long, device=device)


def _blocks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _exact(q: Tensor, r: Tensor, centred: Tensor, centre: Tensor, k: int, own: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Queries (B, D), references (R, D) and the same less their mean -> distances (B, k) and indices (B, k)."""
    near, candidates, error = _candidates(q.double() - centre, centred, min(k + MARGIN, len(r)), own)
    distance = torch.cat(
        [
            (q[rows, None].double() - r[candidates[rows]]).square().sum(-1)
            for rows in _blocks(len(q), max(1, cells // (candidates.shape[1] * q.shape[1])))
        ]
    )
    distance[candidates == own[:, None]] = torch.inf
    distance, index = _ascending(distance.sqrt().float(), candidates, k)
    if candidates.shape[1] == len(r):
        return distance, index
    reach = distance[:, -1].double().square() * (1 + 1e-6) + error
    unsure = (reach > near[:, -1]).nonzero()[:, 0]
    for rows in _blocks(len(unsure), max(1, cells // len(r))):
        some = unsure[rows]
        distance[some], index[some] = _plain(q[some], r, k, own[some], cells)
    return distance, index


def _candidates(q: Tensor, r: Tensor, count: int, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By matrix product, centred float64 queries and float32 references: the `count` smallest squared distances,
    ascending float64 (B, count), their indices, and a bound (B,) on the rounding error of every product of a row.
    """
    q32, norms = q.float(), r.square().sum(1)
    best = torch.empty(len(q), 0, device=q.device)
    index = torch.empty(len(q), 0, dtype=torch.long, device=q.device)
    for block in _blocks(len(r), WIDEST):
        partial = torch.addmm(norms[block], q32, r[block].T, alpha=-2)
        inside = ((own >= block.start) & (own < block.stop)).nonzero()[:, 0]
        partial[inside, own[inside] - block.start] = torch.inf
        value, column = partial.topk(min(count, partial.shape[1]), largest=False)
        best, index = torch.cat([best, value], 1), torch.cat([index, column + block.start], 1)
        if best.shape[1] > count:
            best, order = best.topk(count, largest=False)
            index = index.gather(1, order)
    best, order = best.sort(1)
    length = q.square().sum(1)
    # a float32 dot product of length D, the norm and their sum (Higham 2002, section 3.1), inputs rounded to float32
    error = (length + norms.max()) * (q.shape[1] + 4) * 2.0**-22
    return best.double() + length[:, None], index.gather(1, order), error


def _plain(q: Tensor, r: Tensor, k: int, own: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Distances (B, k) and indices (B, k) by differences in float64 over every reference."""
    distance = torch.empty(len(q), len(r), dtype=torch.float64, device=q.device)
    for block in _blocks(len(r), max(1, cells // (len(q) * q.shape[1]))):
        distance[:, block] = (q[:, None].double() - r[None, block]).square().sum(-1)
    known = (own >= 0).nonzero()[:, 0]
    distance[known, own[known]] = torch.inf
    return _ascending(distance.sqrt().float(), torch.arange(len(r), device=q.device).expand(len(q), -1), k)


def _ascending(distance: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row, ties to the lower index."""
    by_index = index.argsort(1)
    distance, index = distance.gather(1, by_index), index.gather(1, by_index)
    distance, order = distance.sort(dim=1, stable=True)
    return distance[:, :k], index.gather(1, order[:, :k])
