"""The references of a neighbour search: centred, with their lengths, and without surplus copies."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bezoar.data.blocks import blocks
from bezoar.errors import UserError
from bezoar.evaluation import narrow_products

HELD = 1 << 28  # elements that are kept on the device; larger ones are read again for each block
READ_CELLS = 1 << 21  # elements that are read at a time
NOT_FINITE = "NaN or infinite vectors among the embeddings; neighbours are defined for finite ones"


class References:
    """Vectors that may lie in memory-mapped files, made ready for blocked products.

    At most k + M copies of a vector can be among the k nearest of a query that leaves M references
    out, so further copies are dropped: a million identical images are a few.

    Attributes:
        n: number of references that are left.
        dimension: D.
        centre: float64 (D,), the mean of all references.
        norms: float32 (n,), squared distances from the centre.
        centred: float32 (n, D), the references less the centre, if they are kept on the device.
        numbers: int64 (n,), the number under which each was given; None if none was dropped.
    """

    def __init__(self, vectors: Tensor, copies: int, device: torch.device) -> None:
        """Prepare vectors (R, D), of which each may occur `copies` times.

        Raises UserError if they are not finite.
        """
        self.device = device
        self.n, self.dimension = vectors.shape
        self.on_device = vectors.numel() <= HELD
        self.vectors = vectors.to(device) if self.on_device else vectors
        self.numbers: Tensor | None = None
        self._places: Tensor | None = None  # where each given reference stands now, -1 if dropped
        parts = blocks(self.n, max(1, READ_CELLS // self.dimension))
        total = torch.zeros(self.dimension, dtype=torch.float64, device=device)
        for part in parts:
            total += self.rows(part).sum(0, dtype=torch.float64)
        self.centre = total / self.n
        if not torch.isfinite(self.centre).all():
            raise UserError(NOT_FINITE)

        self.norms = torch.empty(self.n, device=device)
        self.centred = torch.empty(vectors.shape, device=device) if self.on_device else None
        projections = torch.empty_like(self.norms)
        axis = torch.randn(self.dimension, generator=torch.Generator().manual_seed(0)).to(device)
        for part in parts:
            centred = (self.rows(part).double() - self.centre).float()
            self.norms[part] = centred.square().sum(1)
            projections[part] = (centred * axis).sum(1)
            if self.centred is not None:
                self.centred[part] = centred
        keys = torch.stack([self.norms, projections], 1).cpu().numpy()
        surplus = self._find_surplus_copies(keys, copies)
        if len(surplus):
            self._drop(surplus)

    def rows(self, which: slice | Tensor) -> Tensor:
        """Return some of the references as they were given, on the device."""
        if self.on_device:
            if isinstance(which, slice):
                return self.vectors[which]
            return self.vectors.index_select(0, which)
        if isinstance(which, slice):
            which = torch.arange(which.start, which.stop, device=self.device)
        if self.numbers is not None:
            which = self.numbers[which]
        return self.vectors[which.to(self.vectors.device)].to(self.device)

    def centred_block(self, block: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a block of references less the centre, (B, D), and their squared lengths, (B,)."""
        if dtype == torch.float32 and self.centred is not None:
            return self.centred[block], self.norms[block]
        centred = (self.rows(block).double() - self.centre).to(dtype)
        return centred, centred.square().sum(1)

    def widen(self) -> tuple[Tensor, float]:
        """The references for products in bfloat16; see `narrow_products.widen_references`."""
        assert self.centred is not None
        return narrow_products.widen_references(self.centred, self.norms)

    def to_places(self, numbers: Tensor) -> Tensor:
        """Translate given numbers to rows here; -1 for those that were dropped, and for -1."""
        if self._places is None:
            return numbers
        return torch.where(numbers >= 0, self._places[numbers.clamp(min=0)], -1)

    def to_numbers(self, rows: Tensor) -> Tensor:
        """Translate rows here to the numbers under which the references were given."""
        return rows if self.numbers is None else self.numbers[rows]

    def _find_surplus_copies(self, keys: np.ndarray, copies: int) -> np.ndarray:
        """Return the rows before which `copies` equal ones stand, int64 (S,).

        keys: float32 (R, 2), equal for equal vectors. Equal keys alone do not make vectors equal.
        """
        _, group_of, sizes = np.unique(
            keys.view(np.int64)[:, 0], return_inverse=True, return_counts=True
        )
        rows = np.flatnonzero(sizes[group_of] > copies)
        rows = rows[np.argsort(group_of[rows], kind="stable")]  # group by group, each ascending
        if not len(rows):
            return rows
        group = group_of[rows]
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        first = np.repeat(
            starts, np.diff(starts, append=len(rows))
        )  # where each one's group starts
        all_equal = np.ones(len(sizes), bool)
        for part in blocks(len(rows), max(1, READ_CELLS // self.dimension)):
            ours = self.rows(torch.as_tensor(rows[part], device=self.device))
            firsts = self.rows(torch.as_tensor(rows[first[part]], device=self.device))
            equal = (ours == firsts).all(1).cpu().numpy()
            np.logical_and.at(all_equal, group[part], equal)
        surplus = (np.arange(len(rows)) - first >= copies) & all_equal[group]
        return rows[surplus]

    def _drop(self, surplus: np.ndarray) -> None:
        stays = np.ones(self.n, bool)
        stays[surplus] = False
        numbers = torch.as_tensor(np.flatnonzero(stays), device=self.device)
        places = torch.full((self.n,), -1, dtype=torch.long, device=self.device)
        places[numbers] = torch.arange(len(numbers), device=self.device)
        self.n = len(numbers)
        self.norms = self.norms[numbers]
        self.numbers, self._places = numbers, places
        if self.centred is not None:
            self.centred = self.centred[numbers]
            self.vectors = self.vectors[numbers]
