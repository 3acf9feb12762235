"""The candidates of a neighbour search: what may be among the k smallest of inexact distances."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 16  # distances that are looked at together, by the smallest of them
CROWD = 512  # most candidates of a query that are measured one by one
ROUNDING = 2e-6  # relative error of a limit that is computed in float32


class Candidates:
    """The references that may be among the k nearest of B queries, collected tile by tile.

    Distances are looked at in groups, and only groups whose smallest one is small enough are read
    in full: a minimum over a matrix costs a tenth of a selection from it.

    Attributes:
        best: (B, k), the smallest distances so far, in no order.
        crowded: bool (B,), queries with too many candidates, which are no longer collected.
    """

    def __init__(
        self,
        queries: int,
        references: int,
        k: int,
        slack: Tensor,
        most: int = CROWD,
        rounding: float = ROUNDING,
    ) -> None:
        """Start without candidates.

        Args:
            queries: B.
            references: number of references.
            k: number of neighbours.
            slack: (B,), how much larger than the k-th smallest an inexact distance may be and
                count.
            most: number of candidates from which on a query is crowded.
            rounding: relative error of the distances' last rounding.
        """
        self.most = most
        self.rounding = rounding
        self.queries, self.references = queries, references
        self.slack = slack
        self.best = torch.full((queries, k), torch.inf, dtype=slack.dtype, device=slack.device)
        self.crowded = torch.zeros(queries, dtype=torch.bool, device=slack.device)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # queries, references, distances

    def add(self, tile: Tensor, start: int) -> None:
        """Take the candidates of a tile.

        Args:
            tile: inexact squared distances (B, W), of any strides; infinity marks what does not
                count. W is a multiple of GROUP.
            start: number of its first reference.
        """
        minima = tile.unflatten(1, (GROUP, -1)).amin(1).contiguous()  # (B, G), of columns m G + g
        minima = minima.to(self.best.dtype)
        groups = minima.shape[1]
        bound = self.best.amax(1)
        if not self._parts:
            bound = torch.minimum(bound, bound_kth(tile, minima, self.best.shape[1]).to(bound))
        limit = self._limits(bound)
        flat = (minima <= limit[:, None]).view(-1).nonzero()[:, 0]
        query = flat // groups
        group = flat - query * groups
        distance = _read_groups(tile, query, group, groups).to(self.best.dtype)  # (P, GROUP)
        hit = (distance <= limit.index_select(0, query)[:, None]).view(-1).nonzero()[:, 0]
        pair = hit // GROUP
        member = hit - pair * GROUP
        query, reference = query[pair], group[pair] + member * groups + start
        distance = distance.view(-1)[hit]

        counts = query.bincount(minlength=self.queries)
        if int(counts.max()) > self.most:
            self.crowded |= counts > self.most
            stays = ~self.crowded[query]
            query, reference, distance = query[stays], reference[stays], distance[stays]
        if len(query):
            distances = torch.cat([self.best, pack_rows(distance, query, self.queries)], 1)
            k = self.best.shape[1]
            self.best = distances.topk(k, largest=False, sorted=False).values
        self._parts.append((query, reference, distance))

    def collect(self) -> tuple[Tensor, Tensor]:
        """Return uncrowded candidates: their queries (P,), ascending, and references (P,)."""
        query, reference, distance = (
            torch.cat(columns) for columns in zip(*self._parts, strict=True)
        )
        limit = self._limits(self.best.amax(1)).index_select(0, query)
        near = (distance <= limit).nonzero()[:, 0]
        key = (query[near] * self.references + reference[near]).sort().values
        query = key // self.references
        self.crowded |= query.bincount(minlength=self.queries) > self.most
        stays = (~self.crowded[query]).nonzero()[:, 0]
        return query[stays], key[stays] - query[stays] * self.references

    def clear(self) -> None:
        """Forget all candidates."""
        self._parts.clear()

    def _limits(self, bound: Tensor) -> Tensor:
        """Return up to which distance (B,) references count, given bounds on the k-th smallest.

        It is below infinity, and nothing counts in crowded rows.
        """
        limit = bound + bound.abs() * self.rounding + self.slack
        limit = limit.clamp(max=torch.finfo(bound.dtype).max)
        return limit.masked_fill(self.crowded, -torch.inf)


def bound_kth(tile: Tensor, minima: Tensor, k: int) -> Tensor:
    """Bound the k-th smallest of each row of a tile (B, W) by its groups' minima (B, G): (B,)."""
    width = max(64, 4 * k)
    if minima.shape[1] >= 2 * width:
        whole = minima.shape[1] // width * width
        minima = minima[:, :whole].unflatten(1, (-1, width)).amin(1)
    values = minima if minima.shape[1] >= k else tile
    return values.topk(min(k, values.shape[1]), largest=False).values[:, -1]


def pack_rows(values: Tensor, row: Tensor, rows: int, least: int = 0) -> Tensor:
    """Arrange values (P,) of ascending rows (P,) as a matrix, filled up with infinity.

    Returns (rows, W), W being the most values of a row, or `least` if that is more.
    """
    size = row.bincount(minlength=rows)
    start = size.cumsum(0) - size
    shape = (rows, max(least, int(size.max())))
    out = torch.full(shape, torch.inf, dtype=values.dtype, device=values.device)
    out[row, torch.arange(len(row), device=row.device) - start[row]] = values
    return out


def pad_to_group(tile: Tensor, dim: int) -> Tensor:
    """Append rows (dim 0) or columns (dim 1) of infinity up to a multiple of GROUP."""
    missing = -tile.shape[dim] % GROUP
    if not missing:
        return tile
    padding = (0, 0, 0, missing) if dim == 0 else (0, missing)
    return F.pad(tile, padding, value=torch.inf)


def _read_groups(tile: Tensor, row: Tensor, group: Tensor, groups: int) -> Tensor:
    """Read some of a tile's groups, (P, GROUP), straight from its storage."""
    across, along = tile.stride()
    member = torch.arange(GROUP, device=row.device) * (groups * along)
    offsets = (row * across + group * along)[:, None] + member
    reach = 1 + (tile.shape[0] - 1) * across + (tile.shape[1] - 1) * along
    return tile.as_strided((reach,), (1,)).index_select(0, offsets.view(-1)).view(-1, GROUP)
