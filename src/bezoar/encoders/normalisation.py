"""Finds the normalisation that a network was trained with, by its first batch norm.

No file of weights states its normalisation, but the first batch norm holds the mean and variance
of its inputs in training. With the right normalisation, clean images give nearly the same mean and
variance; with another one they do not.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.encoders.small_towers import MEAN_STD

IMAGES = 128  # clean images for the statistics
BATCH = 64  # images at a time
# A guess is kept if its divergence is within SLACK of the best. For scale: deviations that differ
# by a tenth have a divergence of .01, and other images or augmentation cause half of that.
SLACK = 0.005
DOUBT = 0.05  # a normalisation that the user stated is doubted beyond this
GUESS = "mean_std="  # the beginning of an assumption about the normalisation


class _FirstNormReached(Exception):
    """The first batch norm has read its input, so the forward pass can stop."""


def with_mean_std(preprocess: Preprocess, name: str) -> Preprocess:
    """The same preprocessing with a normalisation of `MEAN_STD`."""
    mean, std = MEAN_STD[name]
    return dataclasses.replace(preprocess, mean=mean, std=std)


def mean_std_name(preprocess: Preprocess) -> str:
    """The name of a normalisation in `MEAN_STD`; its numbers if it has no name."""
    pair = preprocess.mean, preprocess.std
    numbers = "/".join(f"{number:g}" for number in (*preprocess.mean, *preprocess.std))
    return next((name for name, values in MEAN_STD.items() if values == pair), numbers)


def measure_divergences(encoder: Encoder, images: Tensor) -> dict[str, float]:
    """How far each usual normalisation is from the statistics of the first batch norm.

    This is the median over channels of the symmetric Kullback-Leibler divergence of two normal
    distributions: one with the running statistics, one with the statistics on the images.

    Args:
        encoder: left as it was.
        images: uint8 (N, 3, H, W), clean; the first `IMAGES` are read.

    Returns:
        divergence by the names of `MEAN_STD`, the smallest first; empty for a network without
        running statistics.
    """
    has_statistics = [
        m for m in encoder.image.modules() if isinstance(m, _BatchNorm) and m.track_running_stats
    ]
    if not has_statistics or not len(images):
        return {}
    before, training = encoder.preprocess, encoder.training
    encoder.eval()
    divergences: dict[str, float] = {}
    try:
        for name in MEAN_STD:
            encoder.set_preprocess(with_mean_std(before, name))
            divergences[name] = _divergence(encoder, images[:IMAGES])
    finally:
        encoder.set_preprocess(before)
        encoder.train(training)
    return dict(sorted(divergences.items(), key=lambda item: item[1]))


@torch.no_grad()
def _divergence(encoder: Encoder, images: Tensor) -> float:
    """The divergence under the encoder's own normalisation; see `measure_divergences`."""
    norms: list[Any] = []
    inputs: list[Tensor] = []

    def stop(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        norms.append(module)
        inputs.append(arguments[0].detach().float())
        raise _FirstNormReached

    handles = [
        m.register_forward_pre_hook(stop)
        for m in encoder.image.modules()
        if isinstance(m, _BatchNorm)
    ]
    try:
        for part in images.split(BATCH):
            try:
                encoder.image(encoder.prepare_images(part))
            except _FirstNormReached:
                continue
            return float("inf")  # no norm was reached
    finally:
        for handle in handles:
            handle.remove()
    norm = norms[0]
    x = torch.cat(inputs).transpose(0, 1).flatten(1)  # (C, N * H * W)
    read_mean, read_var = x.mean(1), x.var(1, correction=0) + norm.eps
    kept_mean, kept_var = norm.running_mean, norm.running_var + norm.eps
    gap = (read_mean - kept_mean).square()
    divergences = (
        (read_var + gap) / kept_var + (kept_var + gap) / read_var
    ) / 4 - 0.5  # half of the sum of both directions
    return float(divergences.median())


def is_guessed(encoder: Encoder) -> bool:
    """Whether the normalisation of an imported encoder was guessed."""
    imported = encoder.about.get("imported") or {}
    return any(text.startswith(GUESS) for text in imported.get("assumed", ()))


def settle_mean_std(encoder: Encoder, images: Tensor) -> str:
    """Replace a guessed normalisation by the one that fits the first batch norm, and note it.

    A guess that fits about as well as the best is kept. A normalisation that was stated is always
    kept, but doubted if another one fits clearly better.

    Args:
        encoder: imported from a file; its normalisation and its `about` may change.
        images: uint8 (N, 3, H, W), clean.

    Returns:
        the doubt in a sentence, or "".
    """
    if not encoder.about.get("imported"):
        return ""
    name = mean_std_name(encoder.preprocess)
    divergences = measure_divergences(encoder, images)
    if not divergences:
        silent = "nothing in the network tells which normalisation is right (no batch norm)"
        return silent if is_guessed(encoder) else ""
    best = next(iter(divergences))
    if name not in divergences:
        divergences[name] = _divergence(encoder, images[:IMAGES])
    reason = _describe(divergences, best, name, min(len(images), IMAGES))
    if not is_guessed(encoder):
        if divergences[name] - divergences[best] <= DOUBT:
            return ""
        return f"the normalisation {name} does not fit the network: {reason}; say mean_std={best}"
    if divergences[name] - divergences[best] <= SLACK:
        best = name
    take_mean_std(encoder, best, reason if best == name else f"not the guess {name}: {reason}")
    return ""


def _describe(divergences: Mapping[str, float], best: str, name: str, count: int) -> str:
    """The divergence of the best normalisation, and of the guess or the runner-up, in words."""
    other = name if name != best else next(n for n in divergences if n != best)
    return (
        f"{best} is {divergences[best]:.3f} from the running statistics of the first batch norm on "
        f"{count} clean images, {other} {divergences[other]:.3f} (divergence)"
    )


def take_mean_std(encoder: Encoder, name: str, reason: str) -> None:
    """Change the normalisation of an imported encoder, and note the reason in its `about`."""
    encoder.set_preprocess(with_mean_std(encoder.preprocess, name))
    imported = encoder.about["imported"]
    others = [text for text in imported["assumed"] if not text.startswith(GUESS)]
    network: str = encoder.about["network"]
    mean, std = MEAN_STD[name]
    # The spec of `classifier` states numbers, that of `resnet` the name.
    text = "/".join(map(str, (*mean, *std))) if network.startswith("classifier:") else name
    encoder.about |= {
        "imported": imported | {"assumed": others, "mean_std": f"{name}: {reason}"},
        "network": re.sub(r"\bmean_std=[^,]*", f"mean_std={text}", network),
    }
