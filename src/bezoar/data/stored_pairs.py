"""StoredPairs: an index of records whose images are read, decoded and poisoned on demand.

One pass over the files decodes every image once. So the index holds exactly the records that
`load_pairs` would hold, the report names the same unreadable ones, and no image fails during a
training unless its file has changed. After the pass a record takes 20 bytes, its id, its caption
and 8 bytes for its label.

Webdataset's shuffle buffer over a stream draws a record 0, 1 or several times an epoch, which would
falsify the number of poisons that a training sees. With random access the order is training's own
permutation, and ranks are slices of it.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bezoar.data.blocks import blocks
from bezoar.data.decoding import Record, thread_count
from bezoar.data.files.images import decode_image
from bezoar.data.files.paths import regular_descriptor
from bezoar.data.files.skipped import ReadReport, Unreadable
from bezoar.data.pairs import Pairs, Rows, TriggerFunction, row_numbers
from bezoar.data.strings import BLOCK, Strings
from bezoar.errors import UserError
from bezoar.machine import free_memory

# The place of a record: its file, the offset and length of its image, and the goal of its trigger.
# A file of -1 - k means row `offset` of the k-th tensor in memory.
PLACE = np.dtype([("shard", "i4"), ("offset", "i8"), ("length", "i4"), ("goal", "i4")])
MAX_OPEN = 256  # files kept open
TASK_IMAGES = 16  # that a thread makes at once
DRAWN_IMAGES = 256  # the same of images that are drawn
BLOCK_DRAWN = 4096  # records that are drawn at once to index them
INDEX_BYTES = 400  # that id, caption, label and place of a record take while an index is made
FileStamp = tuple[int, int]  # size, and time of change in ns


class ImageReader(Protocol):
    """Reads the encoded image at a place. Raises Unreadable or OSError if it is no longer there."""

    @property
    def paths(self) -> Sequence[Path]:
        """The files, by number."""
        ...

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Read the image of a record that lies at this place."""
        ...


class _OpenFile(io.FileIO):
    """An open file that closes itself when the last thread that reads it lets it go."""

    def __del__(self) -> None:
        self.close()


class ShardFiles:
    """Files for random access by any thread, at most MAX_OPEN of them open.

    stamps: each file's stamp when it was indexed, or None if it was not; by default that of now. A
    file that has changed since then is refused.
    """

    def __init__(
        self, paths: Sequence[Path], stamps: Sequence[Sequence[int] | None] | None = None
    ) -> None:
        self.paths = tuple(paths)
        self.stamps: list[FileStamp | None]
        if stamps is not None:
            self.stamps = [(stamp[0], stamp[1]) if stamp else None for stamp in stamps]
        else:
            try:
                self.stamps = [file_stamp(os.stat(p)) for p in paths]
            except OSError as error:
                raise UserError(
                    f"shard {error.filename} cannot be read: {error.strerror}"
                ) from error
        self.open_file = functools.lru_cache(MAX_OPEN)(self._open)

    def _open(self, shard: int) -> _OpenFile:
        file = _OpenFile(regular_descriptor(self.paths[shard]))
        if file_stamp(os.fstat(file.fileno())) != self.stamps[shard]:
            raise Unreadable("the file was changed since it was indexed")
        return file

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset` on; threads share no position and do not wait."""
        file = self.open_file(shard)  # held while it is read: another thread may have dropped it
        content = os.pread(file.fileno(), length, offset)
        if len(content) < length:
            raise Unreadable("the file ends before its end")
        return content


def file_stamp(status: os.stat_result) -> FileStamp:
    """Numbers that change when a file changes."""
    return status.st_size, status.st_mtime_ns


class ImageRows(Protocol):
    """Images by number: a tensor, or an object that makes them on demand."""

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the images at rows int64 (B,): uint8 (B, 3, S, S)."""
        ...


class Drawing(Protocol):
    """A data method whose records are made to order, each by its id."""

    size: int
    count: int

    @property
    def ids(self) -> Sequence[str]: ...
    def render(self, ids: Sequence[str]) -> Pairs: ...


@dataclass(frozen=True)
class DrawnImages:
    """The images of a method that draws, drawn when they are asked for."""

    method: Drawing
    ids: Strings

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Draw the images at rows int64 (B,): uint8 (B, 3, S, S)."""
        return self.method.render(self.ids.take(rows.numpy())[:]).images


@dataclass(frozen=True)
class StoredImages:
    """The images of an index, made on demand; they take the place of `Pairs.images`."""

    records: StoredPairs

    def __getitem__(self, rows: Rows) -> Tensor:
        """Return the images at B rows, uint8 (B, 3, S, S), on the CPU."""
        return self.records.read_images(row_numbers(rows))


@dataclass(frozen=True, eq=False)
class StoredPairs:
    """N records on disk, which can be used like Pairs; `images` are made on demand."""

    reader: ImageReader  # reads encoded images by their places
    size: int  # pixels a side
    places: np.ndarray  # PLACE (N,). A goal of -1 puts no trigger on the image
    ids: Strings  # N keys
    captions: Strings  # N texts, or none
    labels: Tensor | None  # int64 (N,), -1 for unknown classes; None without classes
    classes: tuple[str, ...] = ()  # names by label
    report: ReadReport = field(default_factory=ReadReport)  # how the records were read
    triggers: tuple[TriggerFunction | None, ...] = ()  # one for each goal, or None
    # uint8 (V, 3, S, S) each, images in memory, such as poisons from outside the set; or images
    # that are drawn
    held: tuple[ImageRows, ...] = ()

    def __len__(self) -> int:
        return len(self.places)

    @property
    def where(self) -> str:
        """Where the images come from, in words."""
        if any(isinstance(images, DrawnImages) for images in self.held):
            return "drawn"
        return "held in memory" if (self.places["shard"] < 0).all() else "read from files"

    @property
    def task_images(self) -> int:
        """How many images a thread makes at once: drawing takes many to be quick."""
        return DRAWN_IMAGES if self.where == "drawn" else TASK_IMAGES

    @property
    def images(self) -> StoredImages:
        """The images; `images[rows]` makes them."""
        return StoredImages(self)

    def select(self, rows: Rows) -> StoredPairs:
        """Return the records at the given rows, in that order, kept where they are: on disk."""
        index = row_numbers(rows)
        return replace(
            self,
            places=self.places[index],
            ids=self.ids.take(index),
            captions=self.captions.take(index) if len(self.captions) else self.captions,
            labels=None if self.labels is None else self.labels[torch.from_numpy(index)],
        )

    def find_rows(self, wanted: Collection[str]) -> np.ndarray:
        """Return the rows of the records that have one of these ids, int64, ascending."""
        return self.ids.find_rows(wanted)

    def with_ids(self, ids: Strings) -> StoredPairs:
        """Return the same records under other ids."""
        return replace(self, ids=ids)

    def take(self, rows: Rows) -> Pairs:
        """Return the records at the given rows, in that order, in memory."""
        part = self.select(rows)
        return Pairs(
            images=part.read_images(np.arange(len(part))),
            captions=tuple(part.captions),
            labels=part.labels,
            ids=tuple(part.ids),
            classes=self.classes,
            report=self.report,
        )

    def batches(self, size: int) -> Iterator[Pairs]:
        """Iterate over the records in order, `size` at a time."""
        for rows in blocks(len(self), size):
            yield self.take(range(rows.start, rows.stop))

    def read_images(self, rows: np.ndarray) -> Tensor:
        """Read, decode, resize and poison the images at B rows: uint8 (B, 3, S, S)."""
        out = self.empty_images(len(rows))
        with ThreadPoolExecutor(thread_count()) as pool:
            for task in submit_reads(pool, self.fill_images, rows, out, self.task_images):
                task.result()
        return out

    def empty_images(self, n: int, pinned: bool = False) -> Tensor:
        """Allocate n images, uint8 (n, 3, S, S), channels last in memory; pinned for a GPU."""
        # (n, S, S, 3) in memory
        images = torch.empty(n, self.size, self.size, 3, dtype=torch.uint8, pin_memory=pinned)
        return images.permute(0, 3, 1, 2)

    def fill_images(self, rows: np.ndarray, out: Tensor) -> None:
        """Make the images at a few rows in this thread, into `out`.

        Raises UserError, which names the file and the record that can no longer be read.
        """
        pixels, places = out.numpy(), self.places[rows]
        for k, images in enumerate(self.held):
            of_tensor = np.flatnonzero(places["shard"] == -1 - k)
            if len(of_tensor):
                at = torch.from_numpy(places["offset"][of_tensor])
                out[torch.from_numpy(of_tensor)] = images[at]
        for i in np.flatnonzero(places["shard"] >= 0).tolist():
            shard, offset, length, _ = places[i].tolist()
            try:
                pixels[i] = decode_image(self.reader.read(shard, offset, length), self.size)
            except (Unreadable, OSError) as error:
                raise UserError(
                    f"{self.reader.paths[shard]}: the image of {self.ids[rows[i]]!r}, at byte "
                    f"{offset}, can no longer be read: {error}"
                ) from error
        for goal in np.unique(places["goal"][places["goal"] >= 0]).tolist():
            poisoned = np.flatnonzero(places["goal"] == goal)
            trigger = self.triggers[goal]
            assert trigger is not None
            out[poisoned] = trigger(out[poisoned], [self.ids[r] for r in rows[poisoned].tolist()])


def class_name(records: Pairs | StoredPairs, row: int) -> str:
    """Return the class of a record; empty for one without a class."""
    if records.labels is None or not records.classes or int(records.labels[row]) < 0:
        return ""
    return records.classes[int(records.labels[row])]


@dataclass(frozen=True)
class RecordColumns:
    """The result of one pass over N records."""

    places: np.ndarray  # PLACE (N,)
    ids: Strings  # N keys
    captions: Strings  # N texts, or none
    members: Strings  # names of the members or rows
    labels: Tensor  # int64 (N,)
    # uint8 (3, S, S) each, or None if they were too many for the memory
    images: list[np.ndarray] | None


def read_columns(
    records: Iterable[tuple[Record, int, np.ndarray]], max_bytes: int
) -> RecordColumns:
    """Read the result of `decode_distinct`; images are kept up to this number of bytes."""
    images: list[np.ndarray] | None = []
    has_captions = False

    def entries() -> Iterator[tuple[tuple[int, int, int, int], str, str, str, int]]:
        nonlocal images, has_captions
        for record, number, image in records:
            has_captions = has_captions or bool(record.captions)
            if images is not None:
                images.append(image)
                if len(images) * image.nbytes > max_bytes:
                    images = None
            caption = record.captions[number] if record.captions else ""
            place = (record.shard, record.offset, record.length, -1)
            yield place, record.ids[number], caption, record.member, record.label

    places = [np.empty(0, PLACE)]
    labels = [np.empty(0, np.int64)]
    texts: list[tuple[Strings, ...]] = [(Strings.from_texts(()),) * 3]
    stream = entries()
    while block := list(itertools.islice(stream, BLOCK)):
        block_places, *block_texts, block_labels = zip(*block, strict=True)
        places.append(np.array(list(block_places), PLACE))
        texts.append(tuple(Strings.from_texts(column) for column in block_texts))
        labels.append(np.array(block_labels, np.int64))
    ids, captions, members = (Strings.concat(parts) for parts in zip(*texts, strict=True))
    return RecordColumns(
        places=np.concatenate(places),
        ids=ids,
        captions=captions if has_captions else Strings.from_texts(()),
        members=members,
        labels=torch.from_numpy(np.concatenate(labels)),
        images=images,
    )


Fill = Callable[[np.ndarray, Tensor], None]


def submit_reads(
    pool: ThreadPoolExecutor, fill: Fill, rows: np.ndarray, out: Tensor, at_once: int = TASK_IMAGES
) -> list[Future[None]]:
    """Let threads fill `out` with the images at `rows`, `at_once` at a time."""
    return [pool.submit(fill, rows[part], out[part]) for part in blocks(len(rows), at_once)]


def hold(pairs: Pairs) -> StoredPairs:
    """The same records as an index of images in memory; derived sets do not copy them."""
    report = pairs.report or ReadReport()
    ids, captions = Strings.from_texts(pairs.ids), Strings.from_texts(pairs.captions)
    places, images = _held_places(len(pairs)), (pairs.images,)
    return StoredPairs(
        ShardFiles(()), pairs.size, places, ids, captions, pairs.labels, pairs.classes, report,
        held=images,
    )  # fmt: skip


def index_drawn(method: Drawing) -> StoredPairs:
    """The records of a method that draws, as an index: their images are drawn when asked for.

    One pass draws every record once, for its caption and label. Raises UserError for more records
    than memory holds an index of.
    """
    needed, free = method.count * INDEX_BYTES, free_memory()
    if free and needed > free:
        raise UserError(
            f"an index of {method.count:,} records takes {needed / 2**30:,.1f} GiB; "
            f"{free / 2**30:,.1f} are free"
        )
    ids = Strings.from_texts(method.ids)

    def draw(rows: slice) -> tuple[Strings, Any, tuple[str, ...]]:
        part = method.render(ids[rows])
        return Strings.from_texts(part.captions), part.labels, part.classes

    with ThreadPoolExecutor(thread_count()) as pool:
        captions, labels, classes = zip(*pool.map(draw, blocks(len(ids), BLOCK_DRAWN)), strict=True)
    return StoredPairs(
        ShardFiles(()), method.size, _held_places(len(ids)), ids, Strings.concat(captions),
        torch.cat(labels), classes[0], held=(DrawnImages(method, ids),),
    )  # fmt: skip


def _held_places(count: int) -> np.ndarray:
    """The places of all rows of the first tensor that is held."""
    places = np.zeros(count, PLACE)
    places["shard"] = places["goal"] = -1
    places["offset"] = np.arange(count)
    return places
