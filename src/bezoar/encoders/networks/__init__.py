"""Networks (kind `network`): fresh encoders, and encoders with published weights."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn

from bezoar.encoders.encoder import Encoder, Preprocess


class Network(Protocol):
    """The interface of every network; `vocabulary` as defined here fits networks without texts."""

    def vocabulary(self, captions: Iterable[str]) -> tuple[str, ...]:
        """The vocabulary that a fresh text tower takes from the captions; () if it needs none."""
        return ()

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """Build the encoder; fresh weights come from torch's global generator.

        Args:
            size: side of the images in pixels, or 0 to take the network's own.
            vocabulary: the result of `vocabulary`.

        Raises:
            UserError: for weights or a size that do not fit.
            ValueError: for a size that the network does not take.
        """
        ...


def image_encoder(tower: nn.Module, preprocess: Preprocess, network: str) -> Encoder:
    """An encoder without a text tower. network: the spec that builds a fresh copy of the tower."""
    tower = tower.to(memory_format=torch.channels_last)
    return Encoder(tower, preprocess, about={"network": network, "vocabulary": []})
