"""Objectives (kind `objective`): losses that train an encoder, each with its recipe."""

from typing import Protocol

from torch import nn

from bezoar.encoders.encoder import Encoder
from bezoar.training.loop import Recipe


class Objective(Recipe, Protocol):
    """The interface of an objective: the fields of the loop, and a loss.

    An objective with `captions = False` reads no captions and trains networks without a text tower.
    If it also has `labels = True`, it is called with labels, int64 (B, 1), instead of tokens:
    columns of the encoder's head. One with `as_stored` true sees images and captions unchanged,
    and reads nothing of the encoder but `encode_images`, `encode_tokens` and `device`: it may be
    trained on the vectors of locked trunks (see `locked_towers`).
    """

    def __call__(self, encoder: Encoder) -> nn.Module:
        """A module that owns the encoder, for `loop.fit`: (images, tokens, chance) -> scalar loss.

        images: uint8 (B, 3, H, W). tokens: int64 (B, L). chance: a `Chance`, the source of all
        randomness, so that ranks agree. The loss is that of these rows against those of all ranks.
        A loss that must see all records first has `begin(data, tokens) -> tokens`.
        """
        ...
