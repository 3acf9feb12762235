"""Squared distances by one product in bfloat16, where the processor multiplies it twice as fast.

Vectors are rounded to bfloat16 and given six columns more, so that the product itself is the
squared distance: -2 x . r, the squared length of r in three pieces of bfloat16 beside three ones,
and that of x likewise. What rounding can do to it is bounded by the lengths of the rounding errors,
which are measured (Cauchy and Schwarz). So the distances are a sieve, never an answer.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

UNIT = 2.0**-8  # the largest relative error of a number that is rounded to bfloat16
# How far above the k-th smallest of such distances another may be, for the rounding of the product.
ROUNDING = (1 + UNIT) / (1 - UNIT) - 1
PIECES = 3  # of a squared length: 24 bits
ALIGNED = 16  # columns that the product takes at a time


@functools.cache
def available() -> bool:
    """Whether this processor multiplies bfloat16 and torch uses it."""
    info = Path("/proc/cpuinfo")
    has_instructions = info.exists() and "avx512_bf16" in info.read_text()
    return has_instructions and torch.backends.mkldnn.is_available()


def widen_references(centred: Tensor, norms: Tensor) -> tuple[Tensor, float]:
    """References ready for the product.

    Args:
        centred: float32 (R, D).
        norms: their squared lengths, float32 (R,).

    Returns:
        bfloat16 (R, K), and the length of the largest rounding error of a reference.
    """
    narrow = centred.bfloat16()
    error = float((narrow.double() - centred.double()).norm(dim=1).max())
    return _append(narrow, split_in_pieces(norms), last=False), error


def widen_queries(centred: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Queries ready for the product.

    Args:
        centred: float64 (B, D).
        length: their squared lengths, float64 (B,).

    Returns:
        bfloat16 (B, K), and the length of the rounding error of each query, float64 (B,).
    """
    narrow = centred.bfloat16()
    error = (narrow.double() - centred).norm(dim=1)
    return _append(-2 * narrow, split_in_pieces(length.float()), last=True), error


def split_in_pieces(values: Tensor) -> Tensor:
    """Numbers (N,) as sums of PIECES numbers of bfloat16: (N, PIECES)."""
    pieces = []
    rest = values.double()
    for _ in range(PIECES):
        pieces.append(rest.bfloat16())
        rest = rest - pieces[-1].double()
    return torch.stack(pieces, 1)


def bound_error(length: Tensor, query_error: Tensor, longest: float, error: float) -> Tensor:
    """By how much (B,) the product may be off before it is rounded, float64.

    -2 (x . r - x' . r') where x' and r' are rounded: 2 (|x - x'| |r| + |x'| |r - r'|) at most. The
    sums in float32 and the pieces come on top; `Index` knows them.

    Args:
        length: Squared lengths of the queries, float64 (B,).
        query_error: Lengths of their rounding errors, (B,).
        longest: The length of the longest reference.
        error: Of the largest rounding error of a reference.
    """
    return 2 * (query_error * longest + (length.sqrt() + query_error) * error)


def _append(narrow: Tensor, pieces: Tensor, last: bool) -> Tensor:
    """Vectors (N, D) with their pieces beside ones, and zeros up to a multiple of ALIGNED."""
    ones = torch.ones_like(pieces)
    columns = [ones, pieces] if last else [pieces, ones]
    width = narrow.shape[1] + 2 * PIECES
    zeros = narrow.new_zeros(len(narrow), -width % ALIGNED)
    return torch.cat([narrow, *columns, zeros], 1)
