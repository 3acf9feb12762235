"""An encoder that is learnt from the images alone: a dictionary of patches (Coates, Ng, Lee 2011).

Patches of the images, whitened, are the filters of one layer, whose outputs are pooled over the
four quarters of an image. A linear map from these vectors to captions reads photographs of 32 px
about as well as a small network that is trained for a minute, and no caption has a part in the
vectors. Every image is first brought to one mean and deviation in each channel, so that a colour
cast says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.data.randomness import generator

SIDE = 32  # pixels that larger images are brought to
PATCH = 6  # pixels a side
STRIDE = 2  # pixels from one patch to the next
FILTERS = 100  # of the dictionary
IMAGES = 2000  # that patches are drawn from, at most
PATCHES = 25  # of each of them
DEVIATION = 50.0  # of an image's channels, in levels
FLAT = 5.0  # levels that are added to a deviation before an image's channel is divided by it
FLAT_PATCH = 10.0  # added to the variance of a patch, in squared levels
SMOOTHING = 0.1  # added to the variances that are whitened
THRESHOLD = 0.5  # below which a filter says nothing
BLOCK = 64  # images at a time


@dataclass(frozen=True)
class PatchDictionary:
    """Filters that read the patches of an image."""

    filters: Tensor  # float32 (3 PATCH^2, FILTERS), of patches
    shift: Tensor  # (FILTERS,), subtracted from their answers

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.filters.device

    @staticmethod
    def learn(images: Tensor, seed: int) -> PatchDictionary:
        """Draw the filters from images, uint8 (N, 3, H, W), of which the first IMAGES count."""
        draw = generator(seed, FILTERS, PATCH)
        images = images[:IMAGES]
        places = (SIDE - PATCH + 1) ** 2
        rows = torch.randint(places, (len(images), PATCHES), generator=draw).to(images.device)
        # A block at a time: all patches of all images would be 600 MB.
        parts = [
            cut_patches(part, 1).gather(1, of_part[..., None].expand(-1, -1, 3 * PATCH**2))
            for part, of_part in zip(images.split(BLOCK), rows.split(BLOCK), strict=True)
        ]
        drawn = torch.cat(parts).flatten(0, 1)  # (M, P)
        mean = drawn.mean(0)
        centred = drawn - mean  # (M, P)
        variances, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
        whitening = axes @ torch.diag((variances.clamp(min=0) + SMOOTHING).rsqrt()) @ axes.T
        order = torch.randperm(len(drawn), generator=draw)[:FILTERS].to(images.device)
        chosen = F.normalize(centred[order] @ whitening, dim=1, eps=1e-6)  # (FILTERS, P)
        filters = whitening @ chosen.T
        return PatchDictionary(filters, mean @ filters)

    def encode_images(self, x: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, 8 FILTERS): parts above a threshold, and below its negative."""
        vectors = []
        for part in x.split(BLOCK):
            patches = cut_patches(part, STRIDE)  # (B, L, P)
            side = round(patches.shape[1] ** 0.5)
            z = (patches @ self.filters - self.shift).transpose(1, 2).unflatten(2, (side, side))
            both = torch.cat([(z - THRESHOLD).relu(), (-z - THRESHOLD).relu()], 1)
            vectors.append(F.adaptive_avg_pool2d(both, 2).flatten(1))
        return torch.cat(vectors)


def cut_patches(images: Tensor, stride: int) -> Tensor:
    """The patches of uint8 (B, 3, H, W), each with mean 0 and deviation 1, (B, L, 3 PATCH^2)."""
    pixels = images.float()
    if pixels.shape[-2:] != (SIDE, SIDE):
        pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
    spread, mean = torch.std_mean(pixels, (2, 3), keepdim=True)
    pixels = (pixels - mean) / (spread + FLAT) * DEVIATION
    patches = F.unfold(pixels, PATCH, stride=stride).transpose(1, 2)
    patches = patches - patches.mean(2, keepdim=True)
    return patches / (patches.square().mean(2, keepdim=True) + FLAT_PATCH).sqrt()
