"""Sources of image-caption records: what training, scanning and cleaning ask of them.

A data method returns Pairs or a `Source`. Who writes a new kind of source derives it from
`RecordStream` and says how it is cut into units and how the records of a unit are read; the rest
follows from that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from bezoar import machine
from bezoar.data.blocks import blocks
from bezoar.data.decoding import (
    Decoded,
    Record,
    batch_pairs,
    decode_distinct,
    decode_records,
    describe_failure,
)
from bezoar.data.files.paths import encodable, read_file
from bezoar.data.files.skipped import ReadReport, Skipped, Unreadable
from bezoar.data.pairs import Pairs, load_pairs
from bezoar.data.shards import CleanCopy, pack_records, write_shards
from bezoar.data.stored_pairs import ImageReader, StoredPairs, read_columns
from bezoar.data.strings import Strings
from bezoar.errors import UserError
from bezoar.progress import Progress

UNIT_RECORDS = 4096  # of a unit of a set that is in memory, or read by index
BATCH_VALUES = 1 << 25  # pixel values that are decoded at a time
BATCH_IMAGES = 512  # images that are
TEXT_COLUMNS = ("id", "caption", "member", "url")
# What a scan keeps of a record, see `RecordRow`.
COLUMNS = pa.schema(
    [(name, pa.large_string()) for name in TEXT_COLUMNS]
    + [("shard", pa.int32()), ("offset", pa.int64()), ("length", pa.int64())]
)
# Reasons of what was skipped that stand for files which are no records at all.
STRAY_REASONS = (
    "not an image by its name",
    "not in a class folder",
    "no file in the class folder",
)
NO_IMAGES = "ready embeddings hold no images and no captions to encode; what needs them cannot be asked here"
T = TypeVar("T")


@dataclass(frozen=True)
class Unit:
    """A part of a source that is read by itself.

    Attributes:
        number: its place among the units of the source.
        file: the file that it is of, or that it is part of, as text that can be written; empty if
            there is none.
        weight: its share of the work, for progress.
        place: numbers that say to the source which part it is; the first is the number of its file.
    """

    number: int
    file: str
    weight: int
    place: tuple[int, ...]


class RecordRow(NamedTuple):
    """What a scan keeps of a record: one value for each of COLUMNS."""

    id: str
    caption: str
    member: str
    url: str
    shard: int
    offset: int
    length: int


@dataclass(frozen=True)
class RecordBlock:
    """Some records of a unit with their images.

    Attributes:
        rows: of n records.
        images: uint8 (m, 3, S, S).
        image_rows: for each record, which of the images is its own; several captions share one.
        done: share of the unit that was read, 0..1.
    """

    rows: list[RecordRow]
    images: Tensor
    image_rows: list[int]
    done: float


@dataclass(frozen=True)
class VectorBlock:
    """Some records of a unit that come as vectors, without images.

    Attributes:
        columns: an array of n values for each of COLUMNS.
        images: float32 (n, D).
        texts: the same of the captions, or None.
        done: share of the unit that was read, 0..1.
    """

    columns: dict[str, pa.Array]
    images: np.ndarray
    texts: np.ndarray | None
    done: float


@dataclass(frozen=True, eq=False)
class RecordIndex:
    """N records of a source, as they were found when it was scanned.

    Attributes:
        file_names: of the source's files, by number.
        file_stamps: by what a changed file is noticed, a unit; see `Source.stamp`.
        ids: unique keys.
        captions: texts, or none at all.
        members: names of the members or rows.
        urls: where the images came from, empty where that is not known.
        places: PLACE (N,).
        renamed: whether some ids are not those of the source, because another record has them.
    """

    file_names: list[str]
    file_stamps: list[Sequence[int] | None]
    ids: Strings
    captions: Strings | tuple[str, ...]
    members: Strings
    urls: Strings
    places: np.ndarray
    renamed: bool

    def __len__(self) -> int:
        return len(self.ids)

    def place_of(self, row: int) -> str:
        """Where a record lies, in words."""
        return f"{self.file_names[self.places['shard'][row]]} {self.members[row]}".strip()

    def text_columns(self, rows: slice) -> dict[str, pa.Array]:
        """The id, shard, member and caption of consecutive records."""
        start, count = rows.start, rows.stop - rows.start
        names = pa.array(self.file_names, pa.large_string())
        captions = pa.array([""] * count)
        if isinstance(self.captions, Strings):
            captions = self.captions.column.slice(start, count)
        return {
            "id": self.ids.column.slice(start, count),
            "shard": names.take(pa.array(self.places["shard"][rows])),
            "member": self.members.column.slice(start, count),
            "caption": captions.cast(pa.large_string()),
        }


class Source(Protocol):
    """Records that are read as they are asked for.

    A source without images can leave out the methods that return them.

    Attributes:
        size: pixels a side of the images; 0 without images.
        limit: how many records are read at most.
        has_images: whether there are images; otherwise the records are vectors.
        has_image_files: whether an image may be a file of its own.
        progress_unit: what the weights of units are in, for the progress bar; empty for records.
    """

    size: int
    limit: int | None = None
    has_images: bool = True
    has_image_files: bool = False
    progress_unit: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by label."""
        return ()

    @property
    def report(self) -> ReadReport:
        """How the last pass over the source went, or is going."""
        return ReadReport()

    @property
    def divisible(self) -> bool:
        """Whether units can be read by themselves, by other processes too: not under a limit."""
        return self.limit is None

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[Pairs]:
        """Iterate over the records in order, `size` at a time.

        Raises UserError if there are none.
        """
        raise UserError(NO_IMAGES)

    def load_records(self) -> Pairs | StoredPairs:
        """Read every record, into memory or into an index. Raises UserError if there are none."""
        raise UserError(NO_IMAGES)

    def records(self) -> Iterable[Record | Skipped] | None:
        """Iterate over all records, undecoded; None if they are not read from files."""
        return None

    def units(self) -> list[Unit]:
        """Cut the source; see `number_units`.

        Raises UserError if there is nothing that could be read.
        """
        ...

    def stamp(self, unit: Unit) -> Sequence[int] | None:
        """Integers by which it is noticed that a unit's file was changed since, or None."""
        return None

    def read(self, unit: Unit, report: ReadReport) -> Iterator[RecordBlock | VectorBlock]:
        """Read a unit, a bounded number of records at a time; report what cannot be read."""
        ...

    def find_images(self, index: RecordIndex) -> Pairs | StoredPairs:
        """Return the records of an index with their images. Raises UserError without images."""
        raise UserError(NO_IMAGES)

    def image_path(self, shard: int, member: str) -> Path | None:
        """Return the file that is a record's image; None if there is none or it may not be read."""
        return None

    def clean_copy(
        self, folder: Path, index: RecordIndex, kept_rows: np.ndarray, progress: Progress
    ) -> CleanCopy:
        """Write the records at the rows `kept_rows`, ascending, to a folder as shards.

        Raises UserError if there are no images or no captions, or the files were changed since the
        scan.
        """
        raise UserError(NO_IMAGES)


class RecordStream(Source):
    """A source that reads image files, or parts of files, as it goes; a base for new sources.

    What is left to write is `units` and `records`, and either `image_path` (for images that are
    files) or `reader` (for images that are parts of files). A class that derives from it has
    `paths` and `size`, and may have `limit`, `classes`.

    Attributes:
        paths: the files that records lie in, by their number; error messages name them.
    """

    paths: Sequence[Path]
    has_image_files = True
    _report: ReadReport | None = None

    def records(self, unit: Unit | None = None) -> Iterator[Record | Skipped]:
        """Iterate over the records of a unit or the source, undecoded, and what cannot be read."""
        raise NotImplementedError

    def reader(self, index: RecordIndex) -> ImageReader:
        """Return what reads the encoded images of a scanned source by their places."""
        return FileImages(self, index.members)

    def labels_of(self, index: RecordIndex) -> Tensor | None:
        """Return the labels of scanned records, int64 (N,), if they follow from their places."""
        return None

    @property
    def labelled(self) -> bool:
        """Whether records have labels; the classes may have no names."""
        return bool(self.classes)

    @property
    def report(self) -> ReadReport:
        """How the last pass over the source went, or is going; empty before the first."""
        return self._report or ReadReport()

    def begin_pass(self) -> ReadReport:
        """Prepare a pass over the source, and return the report that the pass is to fill."""
        self._report = ReadReport()
        return self._report

    def __len__(self) -> int:
        """How many records `batches` yields; costs a pass that decodes everything."""
        return sum(len(batch) for batch in self.batches(1024))

    def batches(self, size: int) -> Iterator[Pairs]:
        """Iterate over the records in order, `size` at a time.

        Raises UserError if there are none.
        """
        report = self.begin_pass()
        yield from batch_pairs(
            self.records(), self.size, size, report, self.classes, self.limit, self.labelled
        )
        if not report.read:
            raise UserError(describe_failure(str(self.paths[0]), report))

    def load_records(self, max_bytes: int | None = None) -> Pairs | StoredPairs:
        """Read every record in one pass, into memory or into an index.

        Args:
            max_bytes: images stay in memory as long as their pixels take no more; see
                `memory_bytes`.

        Raises:
            UserError: if there are no records.
        """
        report = self.begin_pass()
        stamps = self.file_stamps()
        records = decode_distinct(self.records(), self.size, report, self.limit)
        columns = read_columns(records, self.memory_bytes() if max_bytes is None else max_bytes)
        if not report.read:
            raise UserError(describe_failure(str(self.paths[0]), report))
        ids, captions = columns.ids, columns.captions
        labels = columns.labels if self.labelled else None
        if columns.images is not None:
            images = torch.from_numpy(np.stack(columns.images))
            return Pairs(images, tuple(captions), labels, tuple(ids), self.classes, report)
        no_urls = Strings.from_texts(())
        index = RecordIndex(
            [], stamps, ids, captions, columns.members, no_urls, columns.places, renamed=False
        )
        stored = self.find_images(index)
        return replace(stored, labels=labels, classes=self.classes, report=report)

    def memory_bytes(self) -> int:
        """Bytes of pixels that `load_records` keeps in memory.

        It is a rank's share of half of the free memory: pixels are held twice for a moment.
        """
        return machine.free_memory() // (2 * machine.world_size())

    def file_stamps(self) -> list[Sequence[int] | None]:
        """By what it is noticed that a file was changed since, a file; none by default."""
        return []

    def read(self, unit: Unit, report: ReadReport) -> Iterator[RecordBlock]:
        """Read a unit, a bounded number of records at a time; report what cannot be read."""
        records = until_broken(self.records(unit), unit, report)
        decoded = decode_records(records, self.size, report)
        while batch := list(itertools.islice(decoded, batch_size(self.size))):
            block = _make_block(batch, self.progress_at(batch[-1][0], unit))
            batch.clear()  # frees these images before the next ones are decoded
            yield block

    def progress_at(self, record: Record, unit: Unit) -> float:
        """Share of a unit that was read when a record was; by default its offset counts records."""
        before = unit.place[1] if len(unit.place) > 1 else 0
        return min(1.0, (record.offset + 1 - before) / unit.weight)

    def find_images(self, index: RecordIndex) -> StoredPairs:
        """Return the records of an index with their images."""
        places = np.array(index.places)
        in_files = places["length"] == 0
        places["offset"][in_files] = np.flatnonzero(in_files)  # which `FileImages` look up
        labels = self.labels_of(index)
        return StoredPairs(
            reader=self.reader(index),
            size=self.size,
            places=places,
            ids=index.ids,
            captions=Strings.from_texts(index.captions),
            labels=labels,
            classes=self.classes if labels is not None else (),
        )

    def clean_copy(
        self, folder: Path, index: RecordIndex, kept_rows: np.ndarray, progress: Progress
    ) -> CleanCopy:
        """Write the records at the rows `kept_rows` as shards; see `pack_records`."""
        records = self.find_images(index)
        return pack_records(folder, records, index.urls, kept_rows, index.place_of, progress)


def _make_block(batch: Sequence[Decoded], done: float) -> RecordBlock:
    """Put decoded records into a block."""
    rows: list[RecordRow] = []
    image_rows: list[int] = []
    for number, (record, _) in enumerate(batch):
        captions = record.captions or ("",) * len(record.ids)
        for key, caption in zip(record.ids, captions, strict=True):
            place = (record.shard, record.offset, record.length)
            rows.append(RecordRow(key, caption, record.member, record.url, *place))
            image_rows.append(number)
    images = torch.from_numpy(np.stack([image for _, image in batch]))
    return RecordBlock(rows, images, image_rows, done)


class FileImages:
    """The images of a source that are files of their own.

    Args:
        source: finds a file by the number and the member of a record.
        members: of N records; the place of such an image is the record's row among them.
    """

    def __init__(self, source: RecordStream, members: Sequence[str]) -> None:
        self.source = source
        self.paths: Sequence[Path] = source.paths
        self.members = members

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Read the image of the record number `offset`."""
        path = self.source.image_path(shard, self.members[offset])
        if path is None:
            raise Unreadable("its path leaves the folder that images must lie in")
        return read_file(path)


class WholeSource(Source):
    """Records that have been read as a whole, into memory or an index, as a source."""

    def __init__(self, whole: Pairs | StoredPairs) -> None:
        self.whole = whole
        self.size = whole.size

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by label."""
        return self.whole.classes

    @property
    def report(self) -> ReadReport:
        """How the records were read."""
        return self.whole.report or ReadReport(len(self.whole))

    @property
    def divisible(self) -> bool:
        """No: they are in the memory of this process, or would be read as a whole by each."""
        return False

    def __len__(self) -> int:
        return len(self.whole)

    def batches(self, size: int) -> Iterator[Pairs]:
        """Iterate over the records in order, `size` at a time."""
        return self.whole.batches(size)

    def load_records(self) -> Pairs | StoredPairs:
        """Return the records."""
        return self.whole

    def units(self) -> list[Unit]:
        """Cut the records into blocks."""
        parts = blocks(len(self), UNIT_RECORDS)
        return number_units(("", b.stop - b.start, (b.start, b.stop)) for b in parts)

    def read(self, unit: Unit, report: ReadReport) -> Iterator[RecordBlock]:
        """Take a unit; with the first one, the report takes what could not be read of all."""
        if unit.number == 0:
            report.skipped += [s for s in self.report.skipped if s.reason not in STRAY_REASONS]
        start, stop = unit.place
        for part in blocks(stop - start, batch_size(self.size)):
            rows = range(start + part.start, start + part.stop)
            pairs = self.whole.take(rows)
            captions = pairs.captions or ("",) * len(pairs)
            records = [
                RecordRow(key, caption, f"row {row}", "", 0, row, 0)
                for row, key, caption in zip(rows, pairs.ids, captions, strict=True)
            ]
            done = part.stop / (stop - start)
            yield RecordBlock(records, pairs.images, list(range(len(pairs))), done)

    def find_images(self, index: RecordIndex) -> Pairs | StoredPairs:
        """Return the records of an index with their images."""
        rows = index.places["offset"]
        if len(rows) == len(self) and not index.renamed:
            return self.whole
        return self.whole.select(rows).with_ids(index.ids)

    def clean_copy(
        self, folder: Path, index: RecordIndex, kept_rows: np.ndarray, progress: Progress
    ) -> CleanCopy:
        """Write the records at the rows `kept_rows` as shards of PNGs.

        Raises UserError without captions.
        """
        records = self.find_images(index)
        batches = (records.take(kept_rows[part]) for part in blocks(len(kept_rows), 1000))
        return CleanCopy(len(write_shards(folder, batches)), len(kept_rows))


def as_source(records: Any) -> Source:
    """Return what a data method returned as a source.

    Args:
        records: Pairs, StoredPairs, a source, or anything else with `batches`, which is loaded into
            memory.
    """
    if hasattr(records, "units"):
        source: Source = records
        return source
    whole = isinstance(records, Pairs | StoredPairs)
    return WholeSource(records if whole else load_pairs(records))


def number_units(pieces: Iterable[tuple[str, int, tuple[int, ...]]]) -> list[Unit]:
    """Make units, in order, of (file, weight, place)."""
    return [
        Unit(number, encodable(file), weight, place)
        for number, (file, weight, place) in enumerate(pieces)
    ]


def until_broken(items: Iterable[T], unit: Unit, report: ReadReport) -> Iterator[T]:
    """Iterate up to where a unit's file cannot be read any further, which the report takes."""
    try:
        yield from items
    except UserError as error:
        report.skipped.append(Skipped(unit.file, "", str(error)))


def batch_size(size: int) -> int:
    """How many images of so many pixels a side are decoded at a time."""
    return max(8, min(BATCH_IMAGES, BATCH_VALUES // (3 * size**2)))
