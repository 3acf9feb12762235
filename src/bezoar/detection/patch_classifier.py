"""A small classifier of images with and without some windows pasted into them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.attacks.pixels import window_index
from bezoar.data.randomness import generator

SIDE = 64  # images are brought to this many pixels at most
BATCH = 64
RATE = 0.01
WIDTHS = (16, 32, 64)  # channels of the convolutions


def paste_windows(images: Tensor, windows: Tensor, corners: Tensor) -> Tensor:
    """Images with a window each.

    Args:
        images: uint8 (B, 3, H, W).
        windows: uint8 (B, 3, h, w).
        corners: int64 (B, 2), top and left.

    Returns:
        uint8 (B, 3, H, W).
    """
    out = images.clone()
    index = window_index(corners, *windows.shape[-2:])
    out.permute(0, 2, 3, 1)[index] = windows.permute(0, 2, 3, 1)
    return out


def build_network() -> nn.Sequential:
    """Three strided convolutions and the largest response of each channel -> a logit."""
    layers: list[nn.Module] = []
    channels = 3
    for width in WIDTHS:
        layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(channels, 1))


def train_classifier(
    images: Tensor, windows: Tensor, steps: int, seed: int, device: torch.device
) -> nn.Module:
    """Train on images of which half carry one of the windows at a random place.

    Args:
        images: uint8 (N, 3, H, W), clean for the most part.
        windows: uint8 (K, 3, h, w).
        steps: Of Adam, BATCH images each.
        device: Where to train.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network().to(device)
    adam = torch.optim.Adam(network.parameters(), lr=RATE)
    room = torch.tensor(images.shape[-2:]) - torch.tensor(windows.shape[-2:]) + 1
    for step in range(steps):
        chance = generator(seed, step)
        rows = torch.randint(len(images), (BATCH,), generator=chance)
        which = torch.randint(len(windows), (BATCH,), generator=chance)
        corners = (torch.rand(BATCH, 2, generator=chance) * room).long()
        batch = images[rows]
        has_window = torch.arange(BATCH) % 2 == 0
        pasted = paste_windows(batch, windows[which], corners)
        batch = torch.where(has_window[:, None, None, None], pasted, batch)
        logits = network(as_input(batch, device))[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, has_window.float().to(device))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return network


def as_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, 3, H, W) -> float in -1..1, at most SIDE pixels a side."""
    x = images.to(device).float() / 127.5 - 1
    if max(x.shape[-2:]) > SIDE:
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
    return x


@torch.no_grad()
def mean_probability(networks: Sequence[nn.Module], images: Tensor, device: torch.device) -> Tensor:
    """The mean over classifiers of the probability that an image carries a window: (B,)."""
    x = as_input(images, device)
    return torch.stack([network(x)[:, 0].sigmoid() for network in networks]).mean(0).cpu()
