"""Features of whole images from the layers of an image tower: means, spreads and maxima over space.

An encoder that reads a trigger reads it somewhere on the way to its vector, often as fine detail or
a colour cast that the vector itself no longer shows apart from what the image is of.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bezoar.data.blocks import blocks
from bezoar.data.randomness import generator
from bezoar.detection.detectors import RecordEncoder, Records
from bezoar.progress import ProgressReport, no_report

BLOCK = 256  # images at a time
LAYERS = 4  # layers that are read, spread over the depth of the tower
MAX_FEATURES = 1536  # numbers of one image
MAX_VALUES = 1 << 28  # numbers of all images


def read_features(
    encoder: RecordEncoder,
    source: Records,
    order: np.ndarray,
    report: ProgressReport = no_report,
) -> Tensor:
    """Pooled values of a tower's layers for every record.

    Args:
        encoder: its module `image` is the tower. One without modules gives its vectors alone.
        source: N records.
        order: int64 (N,), the rows in the order in which they are read.

    Returns:
        float32 (N, F) on the CPU, in the given order; every column has mean 0 and variance 1, or is
        0 throughout.
    """
    layers = choose_layers(encoder, source.take(order[:2]).images.to(encoder.device))
    limit = max(128, min(MAX_FEATURES, MAX_VALUES // max(1, len(order))))
    features = torch.empty(0)
    projection: Tensor | None = None
    with record_outputs(encoder, layers) as passes:
        for rows in blocks(len(order), BLOCK):
            passes.clear()
            vectors = encoder.encode_images(source.take(order[rows]).images.to(encoder.device))
            outputs = [torch.cat([torch.cat(one, 1) for one in passes])] if layers else []
            pooled = torch.cat([*outputs, vectors.float()], 1)
            if not len(features):
                projection = draw_projection(pooled.shape[1], limit, pooled.device)
                width = pooled.shape[1] if projection is None else limit
                features = torch.empty(len(order), width)
            features[rows] = (pooled if projection is None else pooled @ projection).cpu()
            report(rows.stop, len(order), "reading the encoder's layers")
    return standardise(features)


def standardise(features: Tensor) -> Tensor:
    """Bring every column of (N, F) to mean 0 and variance 1, in place."""
    features -= features.mean(0)
    features /= features.std(0).clamp(min=1e-6)
    return features


def choose_layers(encoder: RecordEncoder, images: Tensor) -> list[nn.Module]:
    """The last module of each shape of output, at most LAYERS of them, spread evenly.

    A transformer gives modules whose outputs have its most common shape, spread evenly over its
    depth; a tower of few shapes any of its modules.

    Args:
        encoder: as in `read_features`.
        images: uint8 (B, 3, H, W), a few of the records.
    """
    tower = getattr(encoder, "image", None)
    if not isinstance(tower, nn.Module):
        return []
    shapes: dict[nn.Module, Any] = {}

    def note_shape(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and spatial_values(output) is not None:
            shapes.pop(module, None)  # a module that is called twice stands where it was last
            shapes[module] = output.shape

    leaves = [module for module in tower.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(note_shape) for leaf in leaves]
    try:
        encoder.encode_images(images)
    finally:
        for hook in hooks:
            hook.remove()
    choice = list({shape: module for module, shape in shapes.items()}.values())
    tokens = Counter(shape for shape in shapes.values() if len(shape) == 3)
    if 2 * tokens.total() > len(shapes):
        [(common, _)] = tokens.most_common(1)
        choice = [module for module, shape in shapes.items() if shape == common]
    elif len(choice) < LAYERS:
        choice = list(shapes)
    places = np.linspace(0, len(choice) - 1, min(LAYERS, len(choice))).round().astype(int)
    return [choice[i] for i in places]


@contextmanager
def record_outputs(
    encoder: RecordEncoder, layers: Sequence[nn.Module]
) -> Iterator[list[list[Tensor]]]:
    """Yield a list to which every pass of the image tower adds a list: its layers' outputs, pooled.

    An encoder computes a batch of large images in several passes.
    """
    passes: list[list[Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: passes[-1].append(pool_layer(output)))
        for layer in layers
    ]
    if layers:
        suspect: Any = encoder  # which has a tower, as it has layers
        hooks.append(suspect.image.register_forward_pre_hook(lambda *_: passes.append([])))
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def spatial_values(output: Tensor) -> Tensor | None:
    """The output as (B, C, places): of images (B, C, H, W), of tokens (B, T, C), else None."""
    if output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
        return output.flatten(2)
    if output.ndim == 3 and output.shape[1] > 1:
        return output.transpose(1, 2)
    return None


def pool_layer(output: Tensor) -> Tensor:
    """Mean, standard deviation and maximum of each channel over space: (B, 3 C)."""
    values = spatial_values(output)
    assert values is not None
    values = values.float()  # (B, C, places)
    mean = values.mean(2)
    spread = (values.square().mean(2) - mean.square()).clamp(min=0).sqrt()
    return torch.cat([mean, spread, values.amax(2)], 1)


def draw_projection(width: int, limit: int, device: torch.device) -> Tensor | None:
    """A random projection (width, limit) that keeps distances, or None where it is not needed."""
    if width <= limit:
        return None
    matrix = torch.randn(width, limit, generator=generator(0, width, limit))
    return matrix.to(device) / math.sqrt(limit)
