"""Pairs: image-caption records held in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bezoar.data.blocks import blocks
from bezoar.data.files.skipped import ReadReport
from bezoar.data.strings import Strings

Rows = Sequence[int] | Tensor | np.ndarray  # of records, by number
# A trigger as data see it: images uint8 (N, 3, S, S) and their N ids -> the images with it.
TriggerFunction = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Pairs:
    """N records. A batch is also a Pairs."""

    images: Tensor  # uint8 (N, 3, H, W), 0..255; (N, 3, 0, 0) where records are texts alone
    captions: tuple[str, ...] = ()  # N texts, or none at all
    labels: Tensor | None = None  # int64 (N,), -1 where the class is unknown; None without classes
    ids: tuple[str, ...] = ()  # N stable, unique keys, which are never renumbered
    classes: tuple[str, ...] = ()  # names by label
    # how the records were read, if they were read from files. It is about the whole source, so
    # parts of it carry it too
    report: ReadReport | None = None

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(
                f"images must be uint8 (N, 3, H, W); got {self.images.dtype} "
                f"{tuple(self.images.shape)}"
            )
        if len(self.ids) != n:
            raise ValueError(f"{n} images but {len(self.ids)} ids")
        if self.captions and len(self.captions) != n:
            raise ValueError(f"{n} images but {len(self.captions)} captions")
        if self.labels is not None and len(self.labels) != n:
            raise ValueError(f"{n} images but {len(self.labels)} labels")
        if n and self.text_only and not self.captions:
            raise ValueError("records without pixels need texts")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        """Height of the images in pixels."""
        return self.images.shape[-2]

    @property
    def text_only(self) -> bool:
        """Whether the records are texts, without a pixel: of these the captions are embedded."""
        return self.images.shape[-1] == 0

    @staticmethod
    def of_texts(
        texts: Sequence[str],
        ids: Sequence[str],
        labels: Tensor | None = None,
        classes: tuple[str, ...] = (),
        report: ReadReport | None = None,
    ) -> Pairs:
        """N records of texts alone."""
        images = torch.zeros(len(texts), 3, 0, 0, dtype=torch.uint8)
        return Pairs(images, tuple(texts), labels, tuple(ids), classes, report)

    def take(self, rows: Rows) -> Pairs:
        """Return the records at the given rows, in that order."""
        index = torch.from_numpy(row_numbers(rows))
        numbers = index.tolist()
        return replace(
            self,
            images=self.images[index.to(self.images.device)],
            captions=tuple(self.captions[i] for i in numbers) if self.captions else (),
            labels=None if self.labels is None else self.labels[index.to(self.labels.device)],
            ids=tuple(self.ids[i] for i in numbers),
        )

    def select(self, rows: Rows) -> Pairs:
        """Return the records at the given rows; see `StoredPairs.select`."""
        return self.take(rows)

    def find_rows(self, wanted: Collection[str]) -> np.ndarray:
        """Return the rows of the records that have one of these ids, int64, ascending."""
        return np.flatnonzero([i in wanted for i in self.ids])

    def with_ids(self, ids: Strings) -> Pairs:
        """Return the same records under other ids."""
        return replace(self, ids=tuple(ids))

    def batches(self, size: int) -> Iterator[Pairs]:
        """Iterate over the records in order, `size` at a time."""
        for rows in blocks(len(self), size):
            yield self.take(range(rows.start, rows.stop))

    def to(self, device: torch.device | str) -> Pairs:
        """Return the same records with images and labels on a device."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)

    def empty_images(self, n: int, pinned: bool = False) -> Tensor:
        """Allocate n images, uint8 (n, 3, H, W), in the layout of these; pinned for a GPU."""
        shape, stride = (n, *self.images.shape[1:]), self.images.stride()
        return torch.empty_strided(shape, stride, dtype=torch.uint8, pin_memory=pinned)

    def fill_images(self, rows: np.ndarray, out: Tensor) -> None:
        """Copy the images at the given rows into `out`."""
        out.copy_(self.images[torch.from_numpy(rows)])

    @staticmethod
    def concat(parts: Sequence[Pairs]) -> Pairs:
        """Put the records of several Pairs together, in order.

        Captions and labels survive only if every part has them. Reports add up.
        """
        labels = [p.labels for p in parts if p.labels is not None]
        reports = list({id(p.report): p.report for p in parts if p.report is not None}.values())
        has_captions = all(p.captions or not len(p) for p in parts)
        return Pairs(
            images=torch.cat([p.images for p in parts]),
            captions=tuple(c for p in parts for c in p.captions) if has_captions else (),
            labels=torch.cat(labels) if len(labels) == len(parts) else None,
            ids=tuple(i for p in parts for i in p.ids),
            classes=next((p.classes for p in parts if p.classes), ()),
            report=reports[0].merge(reports[1:]) if len(reports) > 1 else next(iter(reports), None),
        )


class Batched(Protocol):
    """Records that can be had batch by batch: Pairs, StoredPairs, any source, a scanned corpus."""

    def batches(self, size: int) -> Iterator[Pairs]:
        """Iterate over the records in order, `size` at a time."""
        ...


def row_numbers(rows: Rows) -> np.ndarray:
    """Rows as int64 (B,) on the CPU. Raises ValueError for a mask, which would be rows 0 and 1."""
    numbers = rows.cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
    if numbers.dtype == bool:
        raise ValueError("rows are asked for by number; this is a mask")
    return numbers.astype(np.int64)


def load_pairs(source: Batched) -> Pairs:
    """Load every record of a source into memory; its `records`, if these are Pairs already."""
    records = source if isinstance(source, Pairs) else getattr(source, "records", None)
    return records if isinstance(records, Pairs) else Pairs.concat(list(source.batches(1024)))


def content_hash(image: Tensor, caption: str = "") -> str:
    """Hash one record: 16 hex digits of sha256 over shape, pixels uint8 (3, H, W) and caption."""
    pixels = image.contiguous().cpu().numpy()
    head = ",".join(map(str, pixels.shape)).encode()
    return hashlib.sha256(head + pixels.tobytes() + caption.encode()).hexdigest()[:16]


def distinct_image_rows(ids: Sequence[str]) -> list[int]:
    """The rows of the first record of each image; ids of one image differ after '#' alone."""
    first: dict[str, int] = {}
    for row, key in enumerate(ids):
        first.setdefault(key.partition("#")[0], row)
    return list(first.values())
