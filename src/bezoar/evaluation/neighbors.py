"""Exact k-nearest neighbours on a device, in bounded memory, of vectors that may lie in memory-mapped files.

Candidates come from a blocked matrix product, which is fast and loses small distances to cancellation. All that lie
within the product's rounding error of the k-th are measured again as differences in float64. Where they are a crowd, a
product in float64 thins it, and what that leaves undecided is measured in full: the answer is exact, ties go to the
lower index, and block sizes cannot change it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.data.blocks import blocks
from bezoar.encoders import fast_linear
from bezoar.errors import UserError

CELLS = {"cpu": 1 << 21, "cuda": 1 << 28}  # largest temporary matrix, in elements
WIDE = {"cpu": 1 << 13, "cuda": 1 << 16}  # references of one matrix product
MEASURED = {
    "cpu": 1 << 18,
    "cuda": 1 << 26,
}  # elements of one block of differences; a core's cache holds them
HELD = (
    1 << 28
)  # elements of the references that are kept on the device; what is larger is read again for each block
GROUP = 16  # references of which the nearest stands for all, until it is near enough
TWOFOLD = (
    1 << 17
)  # references up to which their distances to one another are computed once for both sides
CROWD = 512  # candidates from which on a row is searched by a better way
NOT_FINITE = "NaN or infinite vectors among the embeddings; neighbours are defined for finite ones"


@dataclass(frozen=True)
class Neighbors:
    """distance: float32 (N, k), ascending. index: int64 (N, k), rows of the references."""

    distance: Tensor
    index: Tensor


def nearest_neighbors(
    queries: Tensor,
    references: Tensor,
    k: int,
    exclude_self: bool | Tensor = False,
    cells: int | None = None,
    device: torch.device | str | None = None,
) -> Neighbors:
    """The k references nearest to each query by Euclidean distance, ties to the lower index.

    queries: float (N, D). references: float (R, D). Both may be CPU tensors over files; blocks move to `device` (the
    queries' own by default), the result lies where the queries lie. exclude_self: True when query i is reference i, or
    int64 (N,) or (N, M) of references that are no neighbours of the query (-1: none). cells: bound on a temporary's
    elements; no effect on the result. Raises UserError when there are too few references, or vectors that are not finite.
    """
    n, where = len(queries), queries.device
    if isinstance(exclude_self, Tensor):
        own = exclude_self.to(where).reshape(n, -1)
    else:
        own = (
            torch.arange(n, device=where)[:, None]
            if exclude_self
            else torch.empty(n, 0, dtype=torch.long, device=where)
        )
    usable = len(references) - int((own >= 0).sum(1).max() if own.numel() else 0)
    if not 1 <= k <= usable:
        raise UserError(
            f"{k} nearest neighbours asked for; there are {usable} records to choose from"
        )
    index = Index(references, k, own.shape[1], cells, device or where)
    distance = torch.empty(n, k, device=where)
    found = torch.empty(n, k, dtype=torch.long, device=where)
    if exclude_self is True and queries is references and index.twofold and cells is None:
        for rows, near, which in index.mutual():
            distance[rows], found[rows] = near.to(where), which.to(where)
    else:
        for rows in blocks(n, index.step):
            distance[rows], found[rows] = index.search(queries[rows], own[rows])
    return Neighbors(distance, found)


class Index:
    """References (R, D) made ready to be searched for the k nearest, with up to `excluded` of them left out a query.

    No more than k + excluded copies of a vector can be among the k nearest, so further ones are dropped: a million
    identical images are a few. step: how many queries to search at a time.
    """

    def __init__(
        self,
        references: Tensor,
        k: int,
        excluded: int = 0,
        cells: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device, self.k, self.n, d = (
            torch.device(device),
            k,
            len(references),
            references.shape[1],
        )
        self.kept: Tensor | None = (
            None  # what `_drop` leaves, and for each reference given its row there, or -1
        )
        self.place: Tensor | None = None
        self.held = references.numel() <= HELD
        self.rows = references.to(self.device) if self.held else references
        parts = blocks(self.n, max(1, CELLS["cpu"] // d))
        self.centre: Tensor = sum(self._rows(b).sum(0, dtype=torch.float64) for b in parts) / self.n  # type: ignore[assignment]
        if not torch.isfinite(self.centre).all():
            raise UserError(NOT_FINITE)
        self.norms = torch.empty(self.n, device=self.device)
        self.centred = torch.empty(self.n, d, device=self.device) if self.held else None
        key = torch.empty_like(self.norms)
        weights = torch.randn(d, generator=torch.Generator().manual_seed(0)).to(self.device)
        for b in parts:
            r = (self._rows(b).double() - self.centre).float()
            self.norms[b], key[b] = r.square().sum(1), (r * weights).sum(1)
            if self.centred is not None:
                self.centred[b] = r
        self._drop(torch.stack([self.norms, key], 1).cpu().numpy(), k + excluded)
        width = WIDE[self.device.type] if self.held else math.isqrt(CELLS[self.device.type])
        self.width = GROUP * math.ceil(self.n / math.ceil(self.n / width) / GROUP)
        self.step = max(1, (cells or CELLS[self.device.type]) // max(self.width, d))
        self.twofold = self.held and self.kept is None and self.n <= TWOFOLD

    @torch.no_grad()
    def search(self, queries: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries (B, D), own int64 (B, M) or nothing -> float32 (B, k) ascending, int64 (B, k), where the queries lie."""
        left = torch.empty(len(queries), 0, dtype=torch.long) if own is None else own
        left = left.to(self.device)
        if self.place is not None:
            left = torch.where(left >= 0, self.place[left.clamp(min=0)], -1)
        with full_precision(self.device):
            distance, found = self._search(queries.to(self.device), left, torch.float32)
        return self._given(distance, found, queries.device)

    @torch.no_grad()
    def mutual(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """`search` for the references themselves, each but itself, block by block: a product serves both its sides.

        Only where `twofold`: the references are held on the device, none was dropped, and they are not too many.
        """
        assert self.centred is not None and self.twofold
        parts = blocks(
            self.n,
            GROUP
            * math.ceil(self.n / math.ceil(self.n / math.isqrt(CELLS[self.device.type])) / GROUP),
        )
        found = [
            Picks(
                b.stop - b.start, self.n, self.k, self._slack(self.norms[b].double(), torch.float32)
            )
            for b in parts
        ]
        for i, rows in enumerate(parts):
            x, length = -2 * self.centred[rows], self.norms[rows]
            with full_precision(self.device):
                for j, columns in enumerate(parts[i:], i):
                    tile = self._tile(x, length, columns, torch.float32)
                    if i == j:
                        tile.fill_diagonal_(torch.inf)
                    found[i].add(tile, columns.start)
                    if i != j:
                        found[j].add(padded(tile, 0).T[: columns.stop - columns.start], rows.start)
                own = torch.arange(rows.start, rows.stop, device=self.device)[:, None]
                distance, index = self._settled(self.rows[rows], own, found[i], torch.float32)
            found[i].clear()
            yield rows, *self._given(distance, index, self.device)

    def _given(
        self, distance: Tensor, found: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The result as the caller numbers the references, where the caller wants it."""
        if not torch.isfinite(distance).all():
            raise UserError(NOT_FINITE)
        return distance.to(device), (found if self.kept is None else self.kept[found]).to(device)

    def _rows(self, which: slice | Tensor) -> Tensor:
        """Some of the references as they were given, on the device."""
        if self.held:
            return (
                self.rows[which] if isinstance(which, slice) else self.rows.index_select(0, which)
            )
        rows = (
            torch.arange(which.start, which.stop, device=self.device)
            if isinstance(which, slice)
            else which
        )
        rows = rows if self.kept is None else self.kept[rows]
        return self.rows[rows.to(self.rows.device)].to(self.device)

    def _drop(self, keys: np.ndarray, copies: int) -> None:
        """Leave out the references of which `copies` equal ones came before. keys: float32 (R, 2), equal for equal rows."""
        _, member, size = np.unique(
            keys.view(np.int64)[:, 0], return_inverse=True, return_counts=True
        )
        many = np.flatnonzero(size[member] > copies)
        many = many[np.argsort(member[many], kind="stable")]
        if not len(many):
            return
        group = member[many]
        opens = np.flatnonzero(np.diff(group, prepend=-1))
        opening = np.repeat(opens, np.diff(opens, append=len(many)))
        same = np.ones(len(size), bool)
        for b in blocks(
            len(many), max(1, CELLS["cpu"] // self.rows.shape[1])
        ):  # equal keys are not yet equal vectors
            one, first = (
                self._rows(torch.as_tensor(many[r], device=self.device)) for r in (b, opening[b])
            )
            np.logical_and.at(same, group[b], (one == first).all(1).cpu().numpy())
        stays = np.ones(self.n, bool)
        stays[many[(np.arange(len(many)) - opening >= copies) & same[group]]] = False
        if stays.all():
            return
        kept = torch.as_tensor(np.flatnonzero(stays), device=self.device)
        place = torch.full((self.n,), -1, dtype=torch.long, device=self.device)
        place[kept] = torch.arange(len(kept), device=self.device)
        self.n, self.norms, self.kept, self.place = len(kept), self.norms[kept], kept, place
        if self.centred is not None:
            self.centred, self.rows = self.centred[kept], self.rows[kept]

    def _slack(self, length: Tensor, dtype: torch.dtype) -> Tensor:
        """How much further (B,) than the k-th a squared distance by product may seem, and be nearer.

        Twice the error of a dot product of length D, the norms and their sums (Higham 2002, section 3.1), inputs rounded.
        """
        return (
            (length + self.norms.max()) * (self.rows.shape[1] + 4) * 4 * torch.finfo(dtype).eps
        ).to(dtype)

    def _tile(self, x: Tensor, length: Tensor, block: slice, dtype: torch.dtype) -> Tensor:
        """Squared distances by product of queries, x = -2 q (B, D), |q|^2 (B,), to references: (B, block, padded)."""
        if dtype == torch.float32 and self.centred is not None:
            r, norms = self.centred[block], self.norms[block]
        else:
            r = (self._rows(block).double() - self.centre).to(dtype)
            norms = r.square().sum(1)
        return padded(fast_linear.linear(x, r, norms).add_(length[:, None]), 1)

    def _search(self, q: Tensor, own: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Distances and indices (B, k), candidates by products in `dtype`."""
        x = q.double() - self.centre
        length = x.square().sum(1)
        found = Picks(len(q), self.n, self.k, self._slack(length, dtype))
        x, length = (-2 * x).to(dtype), length.to(dtype)
        for block in blocks(self.n, self.width):
            tile = self._tile(x, length, block, dtype)
            row, column = ((own >= block.start) & (own < block.stop)).nonzero().unbind(1)
            tile[row, own[row, column] - block.start] = torch.inf
            found.add(tile, block.start)
        return self._settled(q, own, found, dtype)

    def _settled(
        self, q: Tensor, own: Tensor, found: Picks, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The k nearest of what was picked, by differences in float64; rows with too many picks by a better way."""
        row, ref, crowded = found.picked()
        parts = []
        for b in blocks(len(row), max(1, MEASURED[q.device.type] // q.shape[1])):
            r = self._rows(ref[b]).double().sub_(q.index_select(0, row[b]))
            parts.append(r.square_().sum(1))
        # distances are compared as float32: those that round to the same are ties, and go to the lower index
        distance, place = packed(torch.cat(parts).sqrt_().float(), row, len(q), self.k).sort(
            dim=1, stable=True
        )
        start = row.bincount(minlength=len(q)).cumsum(0).roll(1)
        start[0] = 0
        index = ref[(start[:, None] + place[:, : self.k]).clamp(max=len(ref) - 1)]
        distance = distance[:, : self.k]
        many = crowded.nonzero()[:, 0]
        first = dtype == torch.float32
        for b in blocks(len(many), max(1, CELLS[q.device.type] // max(self.n, q.shape[1]))):
            some = many[b]
            again = (
                self._search(q[some], own[some], torch.float64)
                if first
                else self._plain(q[some], own[some])
            )
            distance[some], index[some] = again
        return distance, index

    def _plain(self, q: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Distances and indices (B, k) by differences in float64 over every reference."""
        distance = torch.empty(len(q), self.n, dtype=torch.float64, device=q.device)
        for block in blocks(self.n, max(1, CELLS[q.device.type] // (len(q) * q.shape[1]))):
            distance[:, block] = (q[:, None].double() - self._rows(block)).square_().sum(-1)
        row, column = (own >= 0).nonzero().unbind(1)
        distance[row, own[row, column]] = torch.inf
        distance, index = distance.sqrt().float().sort(dim=1, stable=True)
        return distance[:, : self.k], index[:, : self.k]


class Picks:
    """Of B rows that are shown tile by tile, every value that may be among the k smallest, `slack` (B,) considered.

    Values are taken together in groups; only groups whose smallest is small enough are looked into, because reading a
    matrix for minima costs a tenth of selecting from it. best: (B, k), the smallest so far.
    """

    def __init__(self, rows: int, references: int, k: int, slack: Tensor) -> None:
        self.rows, self.references, self.slack = rows, references, slack
        self.best = torch.full((rows, k), torch.inf, dtype=slack.dtype, device=slack.device)
        self.crowded = torch.zeros(rows, dtype=torch.bool, device=slack.device)
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def limit(self, bound: Tensor) -> Tensor:
        """Up to where a value (B,) may count: below infinity, which marks what is left out; nowhere in crowded rows."""
        limit = (bound * (1 + 2e-6) + self.slack).clamp(max=torch.finfo(bound.dtype).max)
        return limit.masked_fill(self.crowded, -torch.inf)

    def add(self, tile: Tensor, start: int) -> None:
        """A tile (B, W), W a multiple of GROUP, of references from `start` on; strides are as they come."""
        low = tile.unflatten(1, (GROUP, -1)).amin(1).contiguous()
        groups, bound = low.shape[1], self.best.amax(1)
        if not self.parts:
            bound = torch.minimum(bound, upper(tile, low, self.best.shape[1]))
        limit = self.limit(bound)
        flat = (low <= limit[:, None]).view(-1).nonzero()[:, 0]
        row = flat // groups
        across, along = tile.stride()
        at = (row * across + (flat - row * groups) * along)[:, None] + torch.arange(
            GROUP, device=row.device
        ) * (groups * along)
        reach = 1 + (tile.shape[0] - 1) * across + (tile.shape[1] - 1) * along
        value = tile.as_strided((reach,), (1,)).index_select(0, at.view(-1)).view(-1, GROUP)
        hit = (value <= limit.index_select(0, row)[:, None]).view(-1).nonzero()[:, 0]
        pair = hit // GROUP
        row, ref = row[pair], (flat % groups)[pair] + (hit - pair * GROUP) * groups + start
        value = value.view(-1)[hit]
        often = row.bincount(minlength=self.rows)
        if int(often.max()) > CROWD:
            self.crowded |= often > CROWD
            stays = ~self.crowded[row]
            row, ref, value = row[stays], ref[stays], value[stays]
        if len(row):
            seen = torch.cat([self.best, packed(value, row, self.rows)], 1)
            self.best = seen.topk(self.best.shape[1], largest=False, sorted=False).values
        self.parts.append((row, ref, value))

    def picked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and references of what may be among the k smallest, by row, then reference; and which rows hold too many."""
        row, ref, value = (torch.cat(part) for part in zip(*self.parts, strict=True))
        near = (value <= self.limit(self.best.amax(1)).index_select(0, row)).nonzero()[:, 0]
        key = (row[near] * self.references + ref[near]).sort().values
        row = key // self.references
        self.crowded |= row.bincount(minlength=self.rows) > CROWD
        stays = (~self.crowded[row]).nonzero()[:, 0]
        return row[stays], key[stays] - row[stays] * self.references, self.crowded

    def clear(self) -> None:
        """Forget what was seen."""
        self.parts.clear()


def upper(tile: Tensor, low: Tensor, k: int) -> Tensor:
    """A value (B,) that at least k of each row of a tile (B, W) do not exceed; low: (B, G), its groups' minima."""
    wide = max(64, 4 * k)
    if low.shape[1] >= 2 * wide:
        low = low[:, : low.shape[1] // wide * wide].unflatten(1, (-1, wide)).amin(1)
    level = low if low.shape[1] >= k else tile
    return level.topk(min(k, level.shape[1]), largest=False).values[:, -1]


def packed(values: Tensor, row: Tensor, rows: int, least: int = 0) -> Tensor:
    """Values (P,) that belong to ascending rows (P,) -> (rows, most of a row or `least`), filled up with infinity."""
    size = row.bincount(minlength=rows)
    start = size.cumsum(0) - size
    out = torch.full(
        (rows, max(least, int(size.max()))), torch.inf, dtype=values.dtype, device=values.device
    )
    out[row, torch.arange(len(row), device=row.device) - start[row]] = values
    return out


def padded(tile: Tensor, dim: int) -> Tensor:
    """A tile, its last rows (dim 0) or columns (dim 1) infinity, as many as make them a multiple of GROUP."""
    missing = -tile.shape[dim] % GROUP
    return (
        F.pad(tile, (0, 0, 0, missing) if dim == 0 else (0, missing), value=torch.inf)
        if missing
        else tile
    )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, float32 products are float32's: the bound on their error holds for nothing less."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
