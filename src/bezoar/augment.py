"""Batched per-sample augmentation on the device. One draw a sample, never one for a whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shift(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """uint8 (B, 3, H, W) moved by up to `most` pixels each way, borders repeated; one draw a sample."""
    if most == 0:
        return x
    b, _, h, w = x.shape
    moves = torch.randint(0, 2 * most + 1, (b, 2), generator=generator).to(x.device)
    padded = F.pad(x.float(), (most,) * 4, mode="replicate").to(x.dtype)
    rows = moves[:, :1] + torch.arange(h, device=x.device)
    columns = moves[:, 1:] + torch.arange(w, device=x.device)
    sample = torch.arange(b, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """(B, 3, H, W) mirrored left to right with probability `share`; one draw a sample."""
    if share == 0:
        return x
    chosen = (torch.rand(len(x), generator=generator) < share).to(x.device)
    return torch.where(chosen[:, None, None, None], x.flip(-1), x)
