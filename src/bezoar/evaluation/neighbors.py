"""Exact k-nearest neighbours on a device, in bounded memory.

Candidates come from blocked matrix products in float32, which are fast and lose small distances to
cancellation. All candidates within the products' rounding error of the k-th are measured again, as
differences in float64. A query with a crowd of candidates is searched again by a product of more
bits, up to float64. Where the processor multiplies bfloat16, its products come first. The answer is exact, ties go to the lower index, and the sizes of blocks cannot change it.

faiss's flat index is about as fast on a CPU (benchmarks/density.py), but loses small distances to
the same cancellation, and is no dependency.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bezoar.data.blocks import blocks
from bezoar.encoders import fast_linear
from bezoar.errors import UserError
from bezoar.evaluation import narrow_products
from bezoar.evaluation.neighbor_candidates import CROWD, GROUP, Candidates, pack_rows, pad_to_group
from bezoar.evaluation.neighbor_references import NOT_FINITE, References

CELLS = {"cpu": 1 << 21, "cuda": 1 << 28}  # largest temporary matrix, in elements
BLOCK = {"cpu": 1 << 13, "cuda": 1 << 16}  # references of one matrix product
# Elements of one block of differences; on a CPU they fit into a core's cache.
MEASURED = {"cpu": 1 << 18, "cuda": 1 << 26}
# Types of products, each searched again by the next where a query has a crowd of candidates.
NEXT = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
MOST_CROWDED = 0.2  # share of the queries from which on bfloat16 is not worth its while
FEW_REFERENCES = 4096  # for which it is not either
SYMMETRIC = 1 << 17  # most references whose products with one another are computed once for both


@dataclass(frozen=True)
class Neighbors:
    """The nearest references of N queries.

    Attributes:
        distance: float32 (N, k), ascending.
        index: int64 (N, k), rows of the references.
    """

    distance: Tensor
    index: Tensor


def nearest_neighbors(
    queries: Tensor,
    references: Tensor,
    k: int,
    exclude_self: bool | Tensor = False,
    device: torch.device | str | None = None,
) -> Neighbors:
    """Find the k references nearest to each query by Euclidean distance, ties to the lower index.

    Args:
        queries: float (N, D); may be a CPU tensor over a memory-mapped file.
        references: float (R, D); may be the same.
        k: number of neighbours.
        exclude_self: True if query i is reference i; or the references that are no neighbours of
            each query, int64 (N,) or (N, M), -1 for none.
        device: where blocks are computed; by default the queries' own.

    Returns:
        The neighbours, on the queries' device.

    Raises:
        UserError: if there are fewer than k references, or vectors that are not finite.
    """
    n, home = len(queries), queries.device
    excluded = _excluded_references(exclude_self, n, home)
    most_excluded = int((excluded >= 0).sum(1).max()) if excluded.numel() else 0
    usable = len(references) - most_excluded
    if not 1 <= k <= usable:
        raise UserError(
            f"{k} nearest neighbours asked for; there are {usable} records to choose from"
        )
    search = Index(references, k, excluded.shape[1], device or home)
    if exclude_self is True and queries is references and search.symmetric:
        parts = search.search_references()
    else:
        parts = (
            (rows, *search.search(queries[rows], excluded[rows])) for rows in blocks(n, search.step)
        )
    distance = torch.empty(n, k, device=home)
    index = torch.empty(n, k, dtype=torch.long, device=home)
    for rows, part_distance, part_index in parts:
        distance[rows] = part_distance.to(home)
        index[rows] = part_index.to(home)
    return Neighbors(distance, index)


def _excluded_references(exclude_self: bool | Tensor, n: int, device: torch.device) -> Tensor:
    """Return the references that each query leaves out, int64 (N, M)."""
    if isinstance(exclude_self, Tensor):
        return exclude_self.to(device).reshape(n, -1)
    if exclude_self:
        return torch.arange(n, device=device)[:, None]
    return torch.empty(n, 0, dtype=torch.long, device=device)


class Index:
    """References made ready to be searched for k nearest neighbours.

    Attributes:
        step: number of queries to search at a time.
        symmetric: whether `search_references` can be used: all references lie on the device, none
            was dropped as a copy, and they are not too many.
    """

    def __init__(
        self,
        references: Tensor,
        k: int,
        excluded: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepare references (R, D), of which a query leaves out at most `excluded`.

        Raises UserError if they are not finite.
        """
        self.k = k
        self.device = torch.device(device)
        self.references = References(references, k + excluded, self.device)
        largest = CELLS[self.device.type]
        on_device = self.references.on_device
        n, d = self.references.n, self.references.dimension
        self.width = _even_width(n, BLOCK[self.device.type] if on_device else math.isqrt(largest))
        self.step = max(1, largest // max(self.width, d))
        self.symmetric = on_device and self.references.numbers is None and n <= SYMMETRIC
        self.first = torch.float32
        many = self.device.type == "cpu" and on_device and n >= FEW_REFERENCES
        if many and narrow_products.available():
            self.first = torch.bfloat16
            self._narrow, self._narrow_error = self.references.widen()

    @torch.no_grad()
    def search(self, queries: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Search for the neighbours of queries (B, D).

        Args:
            queries: float (B, D).
            excluded: references that each query leaves out, int64 (B, M), -1 for none.

        Returns:
            Distances float32 (B, k), ascending, and references int64 (B, k), where the queries lie.
        """
        if excluded is None:
            excluded = torch.empty(len(queries), 0, dtype=torch.long)
        excluded = self.references.to_places(excluded.to(self.device))
        with full_precision(self.device):
            distance, index = self._search(queries.to(self.device), excluded, self.first)
        return self._finish(distance, index, queries.device)

    @torch.no_grad()
    def search_references(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Search for the neighbours of the references themselves, block by block.

        A block of products serves both its rows and its columns. Only if `symmetric`.

        Yields rows, and their distances and neighbours as of `search`, each without itself.
        """
        n, norms, centred = self.references.n, self.references.norms, self.references.centred
        assert centred is not None and self.symmetric
        parts = blocks(n, _even_width(n, math.isqrt(CELLS[self.device.type])))
        candidates = [
            Candidates(
                part.stop - part.start, n, self.k, self._slack(norms[part].double(), torch.float32)
            )
            for part in parts
        ]
        for i, rows in enumerate(parts):
            x, length = -2 * centred[rows], norms[rows]
            with full_precision(self.device):
                for j, columns in enumerate(parts[i:], i):
                    tile = self._tile(x, length, columns, torch.float32)
                    if i == j:
                        tile.fill_diagonal_(torch.inf)
                    candidates[i].add(tile, columns.start)
                    if i != j:
                        turned = pad_to_group(tile, 0).T[: columns.stop - columns.start]
                        candidates[j].add(turned, rows.start)
                itself = torch.arange(rows.start, rows.stop, device=self.device)[:, None]
                distance, index = self._measure(self.references.rows(rows), itself, candidates[i])
            candidates[i].clear()
            yield rows, *self._finish(distance, index, self.device)

    def _finish(
        self, distance: Tensor, index: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the result with references as they were numbered, on the caller's device."""
        if not torch.isfinite(distance).all():
            raise UserError(NOT_FINITE)
        return distance.to(device), self.references.to_numbers(index).to(device)

    def _slack(self, length: Tensor, dtype: torch.dtype) -> Tensor:
        """Return by how much (B,) a squared distance may exceed the k-th and still be nearer.

        Twice the error of a dot product of D terms, the norms and their sums (Higham 2002, section
        3.1), of rounded inputs. length: squared lengths of the queries, float64 (B,).
        """
        terms = (self.references.dimension + 4) * 4
        slack = (length + self.references.norms.max()) * terms * torch.finfo(dtype).eps
        return slack.to(dtype)

    def _tile(self, x: Tensor, length: Tensor, block: slice, dtype: torch.dtype) -> Tensor:
        """Return squared distances by product, (B, W), of queries to a block of references.

        x: -2 times the centred queries, (B, D). length: their squared lengths, (B,).
        """
        references, norms = self.references.centred_block(block, dtype)
        distances = fast_linear.linear(x, references, norms).add_(length[:, None])
        return pad_to_group(distances, 1)

    def _search(self, q: Tensor, excluded: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return distances and references (B, k), with candidates by products in `dtype`."""
        centred = q.double() - self.references.centre
        length = centred.square().sum(1)
        n = self.references.n
        if dtype == torch.bfloat16:
            x, error = narrow_products.widen_queries(centred, length)
            longest = float(self.references.norms.max().sqrt())
            error = narrow_products.bound_error(length, error, longest, self._narrow_error)
            slack = self._slack(length, torch.float32) + (2.1 * error).float()
            rounding = narrow_products.ROUNDING
            candidates = Candidates(len(q), n, self.k, slack, CROWD, rounding)
        else:
            slack = self._slack(length, dtype)
            most = CROWD if dtype == torch.float32 else n
            candidates = Candidates(len(q), n, self.k, slack, most)
            x, length = (-2 * centred).to(dtype), length.to(dtype)
        for block in blocks(n, self.width):
            if dtype == torch.bfloat16:
                tile = pad_to_group(x @ self._narrow[block].T, 1)
            else:
                tile = self._tile(x, length, block, dtype)
            in_block = (excluded >= block.start) & (excluded < block.stop)
            query, column = in_block.nonzero().unbind(1)
            tile[query, excluded[query, column] - block.start] = torch.inf
            candidates.add(tile, block.start)
        return self._measure(q, excluded, candidates, dtype)

    def _measure(
        self,
        q: Tensor,
        excluded: Tensor,
        candidates: Candidates,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Return the distances and references (B, k) of the nearest candidates, exactly.

        Queries that are crowded after products in `dtype` are searched again, by those of more bits.
        """
        query, reference = candidates.collect()
        distance, index = self._measure_pairs(q, query, reference)
        crowded = candidates.crowded.nonzero()[:, 0]
        if dtype == torch.bfloat16 and len(crowded) > MOST_CROWDED * len(q):
            self.first = torch.float32
        step = max(1, CELLS[q.device.type] // max(self.references.n, q.shape[1]))
        for part in blocks(len(crowded), step):
            rows = crowded[part]
            distance[rows], index[rows] = self._search(q[rows], excluded[rows], NEXT[dtype])
        return distance, index

    def _measure_pairs(self, q: Tensor, query: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Return the k nearest (B, k) of pairs of a query (P,), ascending, and a reference (P,).

        Where a query has fewer than k, which only crowded ones have, the rest is at infinity.
        """
        if not len(query):
            shape = (len(q), self.k)
            no_index = torch.zeros(shape, dtype=torch.long, device=q.device)
            return torch.full(shape, torch.inf, device=q.device), no_index
        squares = []
        for part in blocks(len(query), max(1, MEASURED[q.device.type] // q.shape[1])):
            rows = self.references.rows(reference[part]).double()
            squares.append(rows.sub_(q.index_select(0, query[part])).square_().sum(1))
        # Distances that round to the same float32 are ties, and go to the lower index.
        packed = pack_rows(torch.cat(squares).sqrt_().float(), query, len(q), self.k)
        distance, place = packed.sort(dim=1, stable=True)
        counts = query.bincount(minlength=len(q))
        start = counts.cumsum(0) - counts
        index = reference[(start[:, None] + place[:, : self.k]).clamp(max=len(reference) - 1)]
        return distance[:, : self.k], index


def _even_width(n: int, width: int) -> int:
    """Return the width of equal blocks of n, about `width` and a multiple of GROUP."""
    return GROUP * math.ceil(n / math.ceil(n / width) / GROUP)


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
