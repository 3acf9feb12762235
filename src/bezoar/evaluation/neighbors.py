"""Exact k-nearest neighbours on a device, in bounded memory.

Blocked matrix products give the squared distances of a block of queries. The smallest few beyond k
are measured again, as differences in float64. All others are farther than the k-th neighbour by
more than the rounding error of the products. A query for which this is uncertain is searched again
with products in float64, and finally with differences alone. So the result is exact, ties go to the
lower index, and the sizes of blocks do not matter.

faiss's flat index loses small distances to cancellation, and is no dependency
(benchmarks/density.py compares the two).
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.data.blocks import blocks
from bezoar.errors import UserError

CELLS = {"cpu": 1 << 21, "cuda": 1 << 28}  # largest matrix of distances, in elements
BLOCK = {"cpu": 1 << 13, "cuda": 1 << 16}  # references of one matrix product
# Elements of one block of differences; on a CPU they fit into a core's cache.
MEASURED = {"cpu": 1 << 18, "cuda": 1 << 26}
HELD = 1 << 28  # elements that are kept on the device; larger ones are read again for each block
READ_CELLS = 1 << 21  # elements that are read at a time
SPARE = 8  # neighbours beyond k that are measured
GROUP = 16  # distances that are looked at together, by the smallest of them
TIE = 1e-6  # relative difference of squared distances that float32 may not distinguish
NOT_FINITE = "NaN or infinite vectors among the embeddings; neighbours are defined for finite ones"


@dataclass(frozen=True)
class Neighbors:
    """The nearest references of N queries."""

    distance: Tensor  # float32 (N, k), ascending
    index: Tensor  # int64 (N, k), rows of the references


def nearest_neighbors(
    queries: Tensor, references: Tensor, k: int, exclude_self: bool | Tensor = False
) -> Neighbors:
    """Find the k references nearest to each query by Euclidean distance, ties to the lower index.

    Args:
        queries: float (N, D); may be a CPU tensor over a memory-mapped file.
        references: float (R, D); may be the same.
        k: number of neighbours.
        exclude_self: True if query i is reference i; or the references that are no neighbours of
            each query, int64 (N,) or (N, M), -1 for none.

    Returns:
        The neighbours, on the queries' device.

    Raises:
        UserError: if there are fewer than k references, or vectors that are not finite.
    """
    n, device = len(queries), queries.device
    excluded = torch.empty(n, 0, dtype=torch.long, device=device)
    if isinstance(exclude_self, Tensor):
        excluded = exclude_self.to(device).reshape(n, -1)
    elif exclude_self:
        excluded = torch.arange(n, device=device)[:, None]
    most_excluded = int((excluded >= 0).sum(1).max()) if excluded.numel() else 0
    usable = len(references) - most_excluded
    if not 1 <= k <= usable:
        raise UserError(
            f"{k} nearest neighbours asked for; there are {usable} records to choose from"
        )
    search = Index(references, k, excluded.shape[1], device)
    distance = torch.empty(n, k, device=device)
    index = torch.empty(n, k, dtype=torch.long, device=device)
    for rows in blocks(n, search.step):
        distance[rows], index[rows] = search.search(queries[rows], excluded[rows])
    return Neighbors(distance, index)


class Index:
    """References prepared for the search of k nearest neighbours.

    At most k + M copies of a vector can be among the k nearest of a query that excludes M
    references, so further copies are dropped: a million identical images become a few.

    Attributes:
        step: number of queries to search at a time.
        numbers: int64 (n,), rows of the given references that are searched.
    """

    def __init__(
        self,
        references: Tensor,
        k: int,
        excluded: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepare references (R, D). excluded: most references that a query excludes.

        Raises UserError if they are not finite.
        """
        self.k = k
        self.device = torch.device(device)
        self.numbers = drop_surplus_copies(references, k + excluded).to(self.device)
        self.n, self.dimension = len(self.numbers), references.shape[1]
        self.keep = min(self.n, k + excluded + SPARE)
        self.row_of = torch.full((len(references),), -1, device=self.device)
        self.row_of[self.numbers] = torch.arange(self.n, device=self.device)
        self.on_device = references.numel() <= HELD
        self.vectors = references.to(self.device) if self.on_device else references
        self.parts = blocks(self.n, max(1, READ_CELLS // self.dimension))
        total = torch.zeros(self.dimension, dtype=torch.float64, device=self.device)
        for part in self.parts:
            total += self._read(part).sum(0, dtype=torch.float64)
        self.centre = total / self.n
        if not torch.isfinite(self.centre).all():
            raise UserError(NOT_FINITE)
        self.norms = torch.empty(self.n, device=self.device)
        self.centred = torch.empty(
            self.n if self.on_device else 0, self.dimension, device=self.device
        )
        for part in self.parts:
            centred = (self._read(part).double() - self.centre).float()
            self.norms[part] = centred.square().sum(1)
            if self.on_device:
                self.centred[part] = centred
        largest = CELLS[self.device.type]
        width = BLOCK[self.device.type] if self.on_device else math.isqrt(largest)
        self.width = math.ceil(self.n / math.ceil(self.n / width))
        self.step = max(1, largest // max(self.width, self.dimension))

    @torch.no_grad()
    def search(self, queries: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Search for the neighbours of queries.

        Args:
            queries: float (B, D).
            excluded: references that each query leaves out, int64 (B, M), -1 for none.

        Returns:
            Distances float32 (B, k), ascending, and references int64 (B, k), where the queries lie.
        """
        if excluded is None:
            excluded = torch.empty(len(queries), 0, dtype=torch.long)
        excluded = excluded.to(self.device)
        excluded = torch.where(excluded >= 0, self.row_of[excluded.clamp(min=0)], -1)
        with full_precision(self.device):
            distance, row = self._search(queries.to(self.device), excluded, torch.float32)
        if not torch.isfinite(distance).all():
            raise UserError(NOT_FINITE)
        return distance.to(queries.device), self.numbers[row].to(queries.device)

    def _read(self, which: slice | Tensor) -> Tensor:
        """Return some of the references, on the device."""
        return self.vectors[self.numbers[which].to(self.vectors.device)].to(self.device)

    def _search(
        self, q: Tensor, excluded: Tensor, dtype: torch.dtype, every: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return distances and rows (B, k) of the references nearest to queries (B, D).

        Args:
            q: the queries.
            excluded: rows that each leaves out, int64 (B, M), -1 for none.
            dtype: of the products that candidates are chosen by.
            every: whether all references are candidates.
        """
        keep = self.n if every else self.keep
        centred = q.double() - self.centre
        # Twice the error of a dot product of D terms, the norms and their sums (Higham 2002,
        # section 3.1), of rounded inputs.
        terms = (self.dimension + 4) * 4
        length = centred.square().sum(1) + self.norms.max()
        error = (length * terms * torch.finfo(dtype).eps)[:, None]  # (B, 1)
        products, row = self._nearest_by_product(centred.to(dtype), excluded, keep)
        kth = products[:, self.k - 1 : self.k].double()
        near = products.isfinite() & (products.double() <= kth * (1 + TIE) + error)
        distance, row = self._measure(q, near, row)
        if keep == self.n:
            return distance, row
        kth = distance[:, -1:].double().square()
        farthest = products[:, -1:].double()
        unsure = (farthest - error <= kth * (1 + TIE)).nonzero()[:, 0]
        step = max(1, self.step * self.width // self.n)
        for part in blocks(len(unsure), step):
            rows = unsure[part]
            distance[rows], row[rows] = self._search(
                q[rows], excluded[rows], torch.float64, every=dtype == torch.float64
            )
        return distance, row

    def _nearest_by_product(self, q: Tensor, excluded: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """The smallest squared distances by product, and rows, (B, keep) each; excluded ones at
        infinity.
        """
        length = q.square().sum(1, keepdim=True)
        best = q.new_full((len(q), keep), torch.inf)
        row = torch.zeros(best.shape, dtype=torch.long, device=q.device)
        for block in blocks(self.n, self.width):
            if q.dtype == torch.float32 and self.on_device:
                references = self.centred[block]
            else:
                references = (self._read(block).double() - self.centre).to(q.dtype)
            norms = references.square().sum(1) if q.dtype == torch.float64 else self.norms[block]
            tile = F.linear(-2 * q, references, norms).add_(length)  # (B, W)
            inside = (excluded >= block.start) & (excluded < block.stop)
            query, column = inside.nonzero().unbind(1)
            tile[query, excluded[query, column] - block.start] = torch.inf
            values, columns = smallest(tile, keep)
            values, order = torch.cat([best, values], 1).topk(keep, largest=False)
            row = torch.cat([row, columns + block.start], 1).gather(1, order)
            best = values
        return best, row

    def _measure(self, q: Tensor, near: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distances by differences and the rows of the k nearest candidates, (B, k).

        near: bool (B, V), which of the candidates `row` (B, V) may be among them.
        """
        row, order = row.sort(1)
        near = near.gather(1, order)
        query, column = near.nonzero().unbind(1)
        reference = row[query, column]
        squares = torch.empty(len(query), dtype=torch.float64, device=q.device)
        for part in blocks(len(query), max(1, MEASURED[q.device.type] // self.dimension)):
            differences = self._read(reference[part]).double().sub_(q.index_select(0, query[part]))
            squares[part] = differences.square_().sum(1)
        distance = torch.full(row.shape, torch.inf, device=q.device)
        # Distances that round to the same float32 are ties, which go to the lower row.
        distance[query, column] = squares.sqrt_().float()
        distance, order = distance.sort(dim=1, stable=True)
        return distance[:, : self.k], row.gather(1, order[:, : self.k])


def smallest(tile: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return values (B, V) of a tile (B, W), its `count` smallest among them, and their columns.

    Only the groups with the smallest minima are read: a minimum over a matrix costs a tenth of a
    selection from it. Columns beyond W are at infinity.
    """
    padded = F.pad(tile, (0, -tile.shape[1] % GROUP), value=torch.inf)
    groups = padded.shape[1] // GROUP
    if groups <= count:
        return tile, torch.arange(tile.shape[1], device=tile.device).expand_as(tile)
    minima = padded.unflatten(1, (GROUP, groups)).amin(1)  # (B, G), of columns m G + g
    group = minima.topk(count, largest=False, sorted=False).indices
    members = groups * torch.arange(GROUP, device=tile.device)[:, None]
    columns = (group[:, None] + members).flatten(1)  # (B, GROUP count)
    return padded.gather(1, columns), columns


def drop_surplus_copies(vectors: Tensor, copies: int) -> Tensor:
    """Return the rows of vectors (R, D) with fewer than `copies` equal ones before them."""
    digests = []
    for part in blocks(len(vectors), max(1, READ_CELLS // max(1, vectors.shape[1]))):
        content = vectors[part].contiguous().view(torch.uint8).cpu().numpy()
        digests += [hashlib.blake2b(row, digest_size=16).digest() for row in content]
    _, group, sizes = np.unique(np.array(digests), return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")  # group by group, each ascending
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return torch.from_numpy(np.sort(order[place < copies]))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 products in float32: the bound on their error holds for nothing less."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
