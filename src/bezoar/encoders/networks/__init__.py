"""Networks (kind `network`): fresh encoders, and encoders with published weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn

from bezoar.encoders.encoder import Encoder, Preprocess


class Network(Protocol):
    """What every network offers. A method may inherit from this class, and then reads no text."""

    def vocabulary(self, captions: Iterable[str]) -> tuple[str, ...]:
        """The words of the captions that the text tower will know.

        There are none without a text tower, or for one with a tokenizer of its own.
        """
        return ()

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """Build the encoder; fresh weights come from torch's global generator.

        Args:
            size: side of the images in pixels; 0 where the network states its own.
            vocabulary: what `vocabulary` gave.

        Raises:
            UserError: for weights or a size that do not fit.
            ValueError: for a size that the network does not take.
        """
        ...


def image_encoder(tower: nn.Module, preprocess: Preprocess, network: str) -> Encoder:
    """An encoder without a text tower. network: the spec that builds the tower again, fresh."""
    tower = tower.to(memory_format=torch.channels_last)
    return Encoder(tower, preprocess, about={"network": network, "vocabulary": []})
