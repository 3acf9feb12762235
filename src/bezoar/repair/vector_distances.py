"""Distances of a student's vectors to a suspect's.

They are 1 - cosine, or a relative squared distance if the network has its own head.
"""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.encoders.encoder import Encoder


class SuspectLoss(nn.Module):
    """A loss of a student beside a frozen copy of its suspect, which stays in evaluation mode."""

    def __init__(self, student: Encoder, suspect: Encoder) -> None:
        super().__init__()
        self.encoder = student
        self.suspect = copy.deepcopy(suspect).requires_grad_(False)

    def train(self, mode: bool = True) -> SuspectLoss:
        """As of any module, but for the suspect."""
        super().train(mode)
        self.suspect.eval()
        return self


def read_vectors(encoder: Encoder, x: Tensor) -> Tensor:
    """Vectors of images (B, 3, H, W), float32 (B, D): unit rows, or the own head's inputs."""
    return encoder.encode_images(x) if encoder.head is None else encoder.raw_vectors(x)


def mean_distance(z: Tensor, targets: Tensor, own_head: bool) -> Tensor:
    """The mean distance of vectors from their targets, both (B, D).

    1 - cosine; before a head, which reads lengths too, the squared distance as a share of the
    targets' mean squared length.
    """
    if own_head:
        return F.mse_loss(z, targets) / targets.square().mean().clamp_min(1e-12)
    return 1 - (z * targets).sum(1).mean()
