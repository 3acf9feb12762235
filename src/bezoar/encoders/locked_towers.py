"""Towers of a locked trunk and a linear map, and trainings on the trunks' vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.data.pairs import Pairs
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders.encoder import Encoder, check_finite, encode_by_length

AT_ONCE = 32  # images and captions that a trunk reads at once


class LockedTower(nn.Module):
    """map(x / |x|), x = trunk(input): (B, ...) -> (B, dim).

    The trunk stays in evaluation mode, so its batch norms keep their statistics.

    Args:
        trunk: the trained part, whose weights take no gradients.
        width: size of its vectors.
        dim: size of the map's vectors.
        unlocked: number of its last blocks whose weights are trained nevertheless.
    """

    def __init__(self, trunk: nn.Module, width: int, dim: int, unlocked: int = 0) -> None:
        super().__init__()
        self.trunk = trunk.requires_grad_(False)
        self.map = nn.Linear(width, dim)
        blocks = list_blocks(trunk)
        if unlocked > len(blocks):
            raise ValueError(f"the image trunk has {len(blocks)} blocks; cannot unlock {unlocked}")
        for block in blocks[len(blocks) - unlocked :]:
            for module in block:
                module.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Map the trunk's vectors of images or tokens."""
        z: Tensor = self.map(F.normalize(self.trunk(x), dim=-1))
        return z

    def train(self, mode: bool = True) -> LockedTower:
        """Set the mode of the map; the trunk stays in evaluation mode."""
        super().train(mode)
        self.trunk.eval()
        return self


def list_blocks(trunk: nn.Module) -> list[list[nn.Module]]:
    """The blocks of a trunk in order; a norm and the like belong to the block before them."""
    modules = [trunk]
    while any(is_opened(module, trunk) for module in modules):
        modules = [
            part
            for module in modules
            for part in (module.children() if is_opened(module, trunk) else (module,))
        ]
    blocks: list[list[nn.Module]] = []
    for module in modules:
        dimensions = [weight.ndim for weight in module.parameters()]
        if not dimensions:
            continue
        if max(dimensions) > 1 or not blocks:
            blocks.append([module])
        else:
            blocks[-1].append(module)
    return blocks


def is_opened(module: nn.Module, trunk: nn.Module) -> bool:
    """Whether `list_blocks` looks at a module's children in its place."""
    return module is trunk or isinstance(module, (nn.Sequential, nn.ModuleList))


# Training on the trunks' vectors


@dataclass(frozen=True)
class TrunkVectors:
    """The vectors of N records by two locked trunks, in place of their images and tokens."""

    images: Tensor  # float32 (N, D), unit rows
    captions: Tensor  # float32 (N, E), unit rows

    def __len__(self) -> int:
        return len(self.images)


class Maps(nn.Module):
    """The maps of an encoder with locked towers, which stand for it where vectors are read."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        assert isinstance(encoder.image, LockedTower) and isinstance(encoder.text, LockedTower)
        self.image, self.text = encoder.image.map, encoder.text.map
        self.autocast, self.device = encoder.autocast, encoder.device

    def encode_images(self, x: Tensor) -> Tensor:
        """The image trunk's vectors (B, D) -> float32 (B, dim), unit rows."""
        with self.autocast():
            z = self.image(x)
        return F.normalize(z.float(), dim=-1)

    def encode_tokens(self, x: Tensor) -> Tensor:
        """The text trunk's vectors (B, E) -> float32 (B, dim), unit rows."""
        with self.autocast():
            z = self.text(x)
        return F.normalize(z.float(), dim=-1)


def is_locked(encoder: Encoder) -> bool:
    """Whether both trunks are locked whole, so that their vectors never change."""
    towers = (encoder.image, encoder.text)
    return all(
        isinstance(tower, LockedTower)
        and not any(weight.requires_grad for weight in tower.trunk.parameters())
        for tower in towers
    )


@torch.no_grad()
def embed_trunks(
    encoder: Encoder, records: Pairs | StoredPairs, report: Callable[[int, int, str], None]
) -> TrunkVectors:
    """The trunks' vectors of all records; equal images, and equal captions, are read once.

    Args:
        encoder: its towers are `LockedTower`s.
        records: with images and captions.
        report: called with (records read, records, what is being done).
    """
    image, text = encoder.image, encoder.text
    assert isinstance(image, LockedTower) and isinstance(text, LockedTower)
    trunks = Encoder(image.trunk, encoder.preprocess, text.trunk, encoder.tokenizer).eval()
    trunks.precision = encoder.precision
    vectors: list[Tensor] = []
    places: dict[bytes, int] = {}  # content of an image -> row of its vector
    rows: list[int] = []
    for part in records.batches(AT_ONCE):
        fresh: list[int] = []
        for i, pixels in enumerate(part.images):
            content = hashlib.blake2b(pixels.contiguous().numpy(), digest_size=16).digest()
            if content not in places:
                places[content] = len(places)
                fresh.append(i)
            rows.append(places[content])
        if fresh:
            vectors.append(trunks.encode_images(part.images[fresh]))
        report(len(rows), len(records), "vectors of the image trunk")
    captions = list(dict.fromkeys(records.captions))
    numbers = {caption: i for i, caption in enumerate(captions)}
    of_captions = encode_by_length(trunks, captions, AT_ONCE)
    return TrunkVectors(
        check_finite(torch.cat(vectors))[rows],
        check_finite(of_captions)[[numbers[caption] for caption in records.captions]],
    )
