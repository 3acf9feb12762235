"""Fields, captions of class names and downloads of the labelled image sets."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from bezoar.data.files.images import SMALLEST, centred_square
from bezoar.data.files.skipped import ReadReport
from bezoar.data.pairs import Pairs
from bezoar.errors import UserError

TEMPLATE = "a photo of a {c}"
MAX_SIZE = 4096  # pixels a side
RESIZED = 1024  # images at a time
T = TypeVar("T")


class NamedClasses(NamedTuple):
    """Classes, and the class of each label."""

    classes: tuple[str, ...]  # their names, which are distinct
    numbers: dict[int, int]  # for each label that is used and has a name, the number of its class


def name_classes(names: Mapping[int, str]) -> NamedClasses:
    """Make classes of labels and their names, in the order of the labels.

    A class exists only where a label has a name: numbers that are not in use, as between labels
    100 and 200, would compete in zero-shot and in heads. Labels without a name are unknown (-1).
    """
    named = [label for label in sorted(names) if names[label]]
    classes = distinct_names([names[label] for label in named])
    return NamedClasses(classes, {label: number for number, label in enumerate(named)})


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """Number classes of one name, as ImageNet's cranes: the second `crane` becomes `crane (2)`."""
    used_names = set(names)
    counts: Counter[str] = Counter()
    distinct = []
    for name in names:
        counts[name] += 1
        new = name
        while new in used_names and counts[name] > 1:
            new = f"{name} ({counts[name]})"
            counts[name] += new in used_names
        used_names.add(new)
        distinct.append(new)
    return tuple(distinct)


def check_fields(size: int | None, limit: int | None, template: str = TEMPLATE) -> None:
    """Check the fields that data methods share. Raises ValueError."""
    if size is not None and not SMALLEST <= size <= MAX_SIZE:
        raise ValueError(f"size must lie in {SMALLEST}..{MAX_SIZE}; got {size}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    if "{c}" not in template:
        raise ValueError(f"template must hold {{c}}, the place of the class name; got {template!r}")


def class_captions(classes: Sequence[str], template: str) -> tuple[str, ...]:
    """Make a caption a class: `{c}` in the template becomes the name, underscores become spaces."""
    return tuple(template.replace("{c}", name.replace("_", " ")) for name in classes)


def pairs_from_arrays(
    images: np.ndarray,
    labels: np.ndarray | None,
    ids: Sequence[str],
    classes: Sequence[str],
    template: str,
    size: int | None,
) -> Pairs:
    """Make Pairs of decoded images.

    Args:
        images: uint8 (N, 3, H, W).
        labels: (N,) in -1..C-1, or None. There are captions only if every label is known.
        ids: N ids.
        classes: names of the C classes, or none.
        template: template of the captions, see `class_captions`.
        size: pixels a side; None keeps the images' size.
    """
    label_tensor = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    pixels = resize(torch.from_numpy(np.ascontiguousarray(images)), size)
    captions: tuple[str, ...] = ()
    if classes and label_tensor is not None and bool((label_tensor >= 0).all()):
        texts = class_captions(classes, template)
        captions = tuple(texts[label] for label in label_tensor.tolist())
    return Pairs(pixels, captions, label_tensor, tuple(ids), tuple(classes), ReadReport(len(ids)))


def resize(images: Tensor, size: int | None) -> Tensor:
    """Resize uint8 (N, 3, H, W) as `decode_image` does: centred square, bicubic, antialiased."""
    height, width = images.shape[-2:]
    if size is None or (height, width) == (size, size):
        return images
    left, upper, right, lower = centred_square(width, height)
    squares = images[..., upper:lower, left:right]
    parts = [
        torch.nn.functional.interpolate(part, (size, size), mode="bicubic", antialias=True)
        for part in torch.split(squares, RESIZED)
    ]
    return torch.cat(parts)


def open_torchvision(name: str, root: str, download: bool, make: Callable[[], T]) -> T:
    """Open a data set of torchvision's. Raises UserError, which says how to get it."""
    try:
        return make()
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = "the download failed" if download else "download=true fetches it"
        raise UserError(f"{name} could not be read under {root!r} ({reason}); {remedy}") from error
