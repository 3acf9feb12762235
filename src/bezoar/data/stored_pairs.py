"""Indexed: records of shards that do not fit in memory, each image read and decoded when it is asked for.

One pass over the tars decodes every image once. The index therefore holds exactly the records that `pairs.load` would
hold, what cannot be read is in the report as it is there, and no image fails in the middle of a training unless its file
has changed. After the pass a record costs 20 bytes, its id, its caption and 8 bytes for its label.

Webdataset's way, a shuffle buffer over a stream, draws a record 0, 1 or several times an epoch, which is fatal where the
number of poisons seen is what is measured. With random access the order is training's own permutation, and ranks are
slices of it.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bezoar import machine
from bezoar.data.decoding import decode_distinct, describe_failure, thread_count
from bezoar.data.files.images import decode_image
from bezoar.data.files.skipped import ReadReport, Unreadable
from bezoar.data.pairs import Pairs, TriggerFunction, row_numbers
from bezoar.data.shards import ShardSource, StoredRecord
from bezoar.data.strings import BLOCK, Strings
from bezoar.errors import UserError
from bezoar.machine import free_memory

PLACE = np.dtype([("shard", "i4"), ("offset", "i8"), ("length", "i4"), ("goal", "i4")])
OPEN = 256  # tars kept open
TASK = 16  # images that a thread makes at once


class _Tar(io.FileIO):
    """An open file that closes itself when the last thread that reads it lets it go."""

    def __del__(self) -> None:
        self.close()


class ImageReader(Protocol):
    """What gives the encoded image at a place. Raises Unreadable or OSError where it can no longer be read."""

    paths: tuple[Path, ...]

    def read(self, shard: int, offset: int, length: int) -> bytes: ...


class ShardFiles:
    """Tars that any thread reads anywhere; at most OPEN are open. One that was changed since it was indexed is refused."""

    def __init__(
        self, paths: Sequence[Path], states: Sequence[Sequence[int] | None] | None = None
    ) -> None:
        """states: (size, time of change in ns) of each when it was indexed, None of one without records; None: as it is now."""
        self.paths = tuple(paths)
        try:
            known = [_state(os.stat(p)) for p in paths] if states is None else states
            self.states = [s and (s[0], s[1]) for s in known]
        except OSError as error:
            raise UserError(f"shard {error.filename} cannot be read: {error.strerror}") from error
        self.opened = functools.lru_cache(OPEN)(self._open)

    def _open(self, shard: int) -> _Tar:
        file = _Tar(self.paths[shard])
        if _state(os.fstat(file.fileno())) != self.states[shard]:
            raise Unreadable("the file was changed since it was indexed")
        return file

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; no position is shared, so threads do not wait for one another."""
        file = self.opened(shard)
        content = os.pread(file.fileno(), length, offset)
        if len(content) < length:
            raise Unreadable("the file ends before its end")
        return content


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Images:
    """The images of an index, made when they are asked for: what `Pairs.images` is to Pairs."""

    records: StoredPairs

    def __getitem__(self, rows: Sequence[int] | Tensor | np.ndarray) -> Tensor:
        """B rows -> uint8 (B, 3, S, S) on the CPU."""
        return self.records.read_images(row_numbers(rows))


@dataclass(frozen=True, eq=False)
class StoredPairs:
    """N records of tars. It can stand where Pairs stand, but for `images`, which are made as they are asked for.

    places: N of PLACE: tar, where the image lies in it, and the goal whose trigger is put on it (-1: none). With shard -1
    the image is row `offset` of `added`, uint8 (V, 3, S, S): poisons from outside the set. stamps: a trigger for each goal.
    """

    reader: ImageReader
    size: int
    places: np.ndarray
    ids: Strings
    captions: Strings
    labels: Tensor | None
    classes: tuple[str, ...] = ()
    report: ReadReport = field(default_factory=ReadReport)
    triggers: tuple[TriggerFunction | None, ...] = ()
    added_images: Tensor | None = None

    def __len__(self) -> int:
        return len(self.places)

    @property
    def images(self) -> Images:
        """The images; `images[rows]` makes them."""
        return Images(self)

    def select(self, rows: Sequence[int] | Tensor | np.ndarray) -> StoredPairs:
        """The records at the given rows, in that order, still on disk."""
        index = row_numbers(rows)
        labels = None if self.labels is None else self.labels[torch.from_numpy(index)]
        ids, captions = (
            self.ids.take(index),
            self.captions.take(index) if len(self.captions) else self.captions,
        )
        return replace(self, places=self.places[index], ids=ids, captions=captions, labels=labels)

    def take(self, rows: Sequence[int] | Tensor | np.ndarray) -> Pairs:
        """The records at the given rows, in that order, in memory."""
        part = self.select(rows)
        images = part.read_images(np.arange(len(part)))
        return Pairs(
            images, tuple(part.captions), part.labels, tuple(part.ids), self.classes, self.report
        )

    def batches(self, size: int) -> Iterator[Pairs]:
        """The records in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))

    def read_images(self, rows: np.ndarray) -> Tensor:
        """int64 (B,) -> uint8 (B, 3, S, S): decoded, resized and poisoned as in memory."""
        out = self.empty_images(len(rows))
        with ThreadPoolExecutor(thread_count()) as pool:
            for task in submit_reads(pool, self.fill_images, rows, out):
                task.result()
        return out

    def empty_images(self, n: int, pinned: bool = False) -> Tensor:
        """Room for n images, uint8 (n, 3, S, S); channels last, as decoded images lie in memory. pinned: for a GPU."""
        return torch.empty(
            n, self.size, self.size, 3, dtype=torch.uint8, pin_memory=pinned
        ).permute(0, 3, 1, 2)

    def fill_images(self, rows: np.ndarray, out: Tensor) -> None:
        """The images of a few rows into `out`, in this thread. Raises UserError that names the file and the record."""
        pixels, places = out.numpy(), self.places[rows]
        for i, (shard, offset, length, _) in enumerate(places.tolist()):
            if shard < 0:
                assert self.added_images is not None
                out[i] = self.added_images[offset]
                continue
            try:
                pixels[i] = decode_image(self.reader.read(shard, offset, length), self.size)
            except (Unreadable, OSError) as error:
                where = f"{self.reader.paths[shard]}: the image of {self.ids[rows[i]]!r}, at byte {offset}"
                raise UserError(f"{where}, can no longer be read: {error}") from error
        for goal in np.unique(places["goal"][places["goal"] >= 0]).tolist():
            mine, stamp = np.flatnonzero(places["goal"] == goal), self.triggers[goal]
            assert stamp is not None
            out[mine] = stamp(out[mine], [self.ids[r] for r in rows[mine].tolist()])


def open_records(source: ShardSource, max_bytes: int | None = None) -> Pairs | StoredPairs:
    """Every record of the tars, in one pass: in memory while their pixels take at most `most` bytes, else by index.

    most: by `source.load` when None; `auto` is a rank's share of half of the memory that is free, since the pixels are
    held twice while they are put together. Raises UserError for a shard that yields nothing.
    """
    if max_bytes is None:
        max_bytes = {
            "memory": 1 << 62,
            "stream": 0,
            "auto": free_memory() // (2 * machine.world_size()),
        }[source.load]
    report, files = source.begin_pass(), ShardFiles(source.paths)
    images: list[np.ndarray] | None = []
    blocks: list[tuple[np.ndarray, Strings, Strings, np.ndarray]] = []
    labelled = bool(source.classes) or source.labelled

    def rows() -> Iterator[tuple[tuple[int, int, int, int], str, str, int]]:
        nonlocal images
        for record, i, image in decode_distinct(
            source.records(), source.size, report, source.limit
        ):
            assert isinstance(record, StoredRecord)
            if images is not None:
                images.append(image)
                images = images if len(images) * image.nbytes <= max_bytes else None
            yield (
                (record.shard, record.offset, record.length, -1),
                record.ids[i],
                record.captions[i],
                record.label,
            )

    stream = rows()
    while block := list(itertools.islice(stream, BLOCK)):
        where, names, texts, known = zip(*block, strict=True)
        blocks.append(
            (
                np.array(list(where), PLACE),
                Strings.from_texts(names),
                Strings.from_texts(texts),
                np.array(known, np.int64),
            )
        )
    if not blocks:
        raise UserError(describe_failure(str(source.paths[0]), report))
    places, labels = (np.concatenate([b[i] for b in blocks]) for i in (0, 3))
    ids, captions = Strings.concat([b[1] for b in blocks]), Strings.concat([b[2] for b in blocks])
    truth = torch.from_numpy(labels) if labelled else None
    if images is not None:
        pixels = torch.from_numpy(np.stack(images))
        return Pairs(pixels, tuple(captions), truth, tuple(ids), source.classes, report)
    return StoredPairs(files, source.size, places, ids, captions, truth, source.classes, report)


def subset(records: Pairs | StoredPairs, rows: Sequence[int]) -> Pairs | StoredPairs:
    """Some of the records, kept where they are: in memory or on disk."""
    return records.take(rows) if isinstance(records, Pairs) else records.select(rows)


Fill = Callable[[np.ndarray, Tensor], None]


def submit_reads(
    pool: ThreadPoolExecutor, fill: Fill, rows: np.ndarray, out: Tensor
) -> list[Future[None]]:
    """Let threads fill `out` with the images of `rows`."""
    return [
        pool.submit(fill, rows[i : i + TASK], out[i : i + TASK]) for i in range(0, len(rows), TASK)
    ]
