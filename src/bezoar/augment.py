"""Batched per-sample augmentation on the device. One draw a sample, never one for a whole batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Chance:
    """The randomness of one step. Drawn for the batch of all ranks, of which each takes its own rows in turn.

    Rank r of `world` holds rows r*b .. (r+1)*b of the global batch: two ranks see what one would have seen.
    """

    generator: torch.Generator
    rank: int = 0
    world: int = 1

    def uniform(self, rows: int, *shape: int) -> Tensor:
        """float32 (rows, *shape) in [0, 1), on the CPU: those of this rank's rows."""
        return torch.rand(rows * self.world, *shape, generator=self.generator)[self.rank * rows : (self.rank + 1) * rows]

    def integers(self, high: int, rows: int, *shape: int) -> Tensor:
        """int64 (rows, *shape) in 0..high-1, on the CPU: those of this rank's rows."""
        drawn = torch.randint(0, high, (rows * self.world, *shape), generator=self.generator)
        return drawn[self.rank * rows : (self.rank + 1) * rows]


def shift(x: Tensor, most: int, chance: Chance) -> Tensor:
    """uint8 (B, 3, H, W) moved by up to `most` pixels each way, borders repeated; one draw a sample."""
    if most == 0:
        return x
    b, _, h, w = x.shape
    moves = chance.integers(2 * most + 1, b, 2).to(x.device)
    padded = F.pad(x.float(), (most,) * 4, mode="replicate").to(x.dtype)
    rows = moves[:, :1] + torch.arange(h, device=x.device)
    columns = moves[:, 1:] + torch.arange(w, device=x.device)
    sample = torch.arange(b, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(x: Tensor, share: float, chance: Chance) -> Tensor:
    """(B, 3, H, W) mirrored left to right with probability `share`; one draw a sample."""
    if share == 0:
        return x
    chosen = (chance.uniform(len(x)) < share).to(x.device)
    return torch.where(chosen[:, None, None, None], x.flip(-1), x)
