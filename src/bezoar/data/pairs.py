"""Pairs: N image-caption records held in memory, and the randomness that belongs to a record."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

# A trigger as data see it: uint8 images (N, 3, S, S) and their N ids -> the images with it.
TriggerFunction = Callable[[Tensor, Sequence[str]], Tensor]

if TYPE_CHECKING:
    from bezoar.data.files.skipped import ReadReport


@dataclass(frozen=True)
class Pairs:
    """N records. A batch is also a Pairs.

    images: uint8 (N, 3, H, W), values 0..255. captions: N strings, or empty when there are none.
    labels: int64 (N,), -1 = unknown, or None. ids: N stable unique keys, never renumbered. classes: label names.
    report: how they were read from files, when they were; it is about the whole source, so parts of it carry it too.
    """

    images: Tensor
    captions: tuple[str, ...] = ()
    labels: Tensor | None = None
    ids: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    report: ReadReport | None = None

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(
                f"images must be uint8 (N, 3, H, W); got {self.images.dtype} {tuple(self.images.shape)}"
            )
        if len(self.ids) != n:
            raise ValueError(f"{n} images but {len(self.ids)} ids")
        if self.captions and len(self.captions) != n:
            raise ValueError(f"{n} images but {len(self.captions)} captions")
        if self.labels is not None and len(self.labels) != n:
            raise ValueError(f"{n} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        """Height of the images in pixels."""
        return self.images.shape[-2]

    def take(self, rows: Sequence[int] | Tensor | np.ndarray) -> Pairs:
        """The records at the given rows, in that order."""
        index = torch.from_numpy(row_numbers(rows))
        picked = index.tolist()
        return replace(
            self,
            images=self.images[index.to(self.images.device)],
            captions=tuple(self.captions[i] for i in picked) if self.captions else (),
            labels=None if self.labels is None else self.labels[index.to(self.labels.device)],
            ids=tuple(self.ids[i] for i in picked),
        )

    def batches(self, size: int) -> Iterator[Pairs]:
        """The records in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))

    def to(self, device: torch.device | str) -> Pairs:
        """The same records with images and labels on a device."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)

    @staticmethod
    def concat(parts: Sequence[Pairs]) -> Pairs:
        """All records of several Pairs, in order. Labels survive only when every part has them; reports add up."""
        captions = tuple(c for p in parts for c in p.captions)
        labels = [p.labels for p in parts]
        reports = list({id(p.report): p.report for p in parts if p.report is not None}.values())
        return Pairs(
            torch.cat([p.images for p in parts]),
            captions if all(p.captions or not len(p) for p in parts) else (),
            None
            if any(x is None for x in labels)
            else torch.cat([x for x in labels if x is not None]),
            tuple(i for p in parts for i in p.ids),
            next((p.classes for p in parts if p.classes), ()),
            reports[0].merge(reports[1:]) if len(reports) > 1 else next(iter(reports), None),
        )


def row_numbers(rows: Sequence[int] | Tensor | np.ndarray) -> np.ndarray:
    """Rows, wherever they lie, as int64 (B,) on the CPU. Raises ValueError for a mask: it would be read as rows 0 and 1."""
    found = rows.cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
    if found.dtype == bool:
        raise ValueError("rows are asked for by number; this is a mask")
    return found.astype(np.int64)


class Source(Protocol):
    """What every reader of data takes: Pairs in memory, or Shards on disk."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[Pairs]: ...


def load_pairs(source: Any) -> Pairs:
    """Every record of a source in memory; where it holds them there already (`records`), those."""
    held = source if isinstance(source, Pairs) else getattr(source, "records", None)
    return held if isinstance(held, Pairs) else Pairs.concat(list(source.batches(1024)))


def content_hash(image: Tensor, caption: str = "") -> str:
    """sha256 (16 hex digits) of one record's shape, pixels (uint8 (3, H, W)) and caption."""
    pixels = image.contiguous().cpu().numpy()
    head = ",".join(map(str, pixels.shape)).encode()
    return hashlib.sha256(head + pixels.tobytes() + caption.encode()).hexdigest()[:16]


def distinct_image_rows(ids: Sequence[str]) -> list[int]:
    """Rows of the first record of each image, in order: several captions of one have ids that differ after '#' alone."""
    first: dict[str, int] = {}
    for row, key in enumerate(ids):
        first.setdefault(key.partition("#")[0], row)
    return list(first.values())
