"""RecordStream: the base of sources that read image files, or parts of files, in sequence."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from bezoar import machine
from bezoar.data import decoding
from bezoar.data.files.images import read_shorter_side
from bezoar.data.files.paths import read_file
from bezoar.data.files.skipped import ReadReport, Skipped, Unreadable
from bezoar.data.pairs import Pairs
from bezoar.data.shards import CleanCopy, pack_records
from bezoar.data.source import (
    RecordBlock,
    RecordIndex,
    RecordRow,
    Source,
    Unit,
    batch_size,
    until_broken,
)
from bezoar.data.stored_pairs import ImageReader, StoredPairs, read_columns
from bezoar.data.strings import Strings
from bezoar.errors import UserError
from bezoar.progress import Progress


class RecordStream(Source):
    """A source that reads image files, or parts of files, as it goes; a base for new sources.

    What is left to write is `units` and `records`, and either `image_path` (for images that are
    files) or `reader` (for images that are parts of files). A class that derives from it has
    `paths` and `size`, and may have `limit`, `classes`.

    Attributes:
        paths: the files that records lie in, by their number; error messages name them.
        is_fingerprinted: whether the data method's `files` are all that is read, so that the same
            question has the same images.
    """

    paths: Sequence[Path]
    has_image_files = True
    is_fingerprinted = False
    _report: ReadReport | None = None

    def records(self, unit: Unit | None = None) -> Iterator[decoding.Record | Skipped]:
        """Iterate over the undecoded records of a unit or the source, and unreadable ones."""
        raise NotImplementedError

    def reader(self, index: RecordIndex) -> ImageReader:
        """Return a reader of the encoded images of a scanned source by their places."""
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

    def usual_side(self, count: int = 32) -> int | None:
        """Return the median of the shorter sides of the first images; None if none can be read."""
        sides = []
        for record in itertools.islice(self.records(), count):
            if isinstance(record, decoding.Record):
                with contextlib.suppress(Unreadable):
                    sides.append(read_shorter_side(record.image))
        return int(median(sides)) if sides else None

    def __len__(self) -> int:
        """Return how many records `batches` yields; costs a pass that decodes everything."""
        return sum(len(batch) for batch in self.batches(1024))

    def batches(self, size: int) -> Iterator[Pairs]:
        """See `Source.batches`."""
        report = self.begin_pass()
        yield from decoding.batch_pairs(
            self.records(), self.size, size, report, self.classes, self.limit, self.labelled
        )
        if not report.read:
            raise UserError(decoding.describe_failure(str(self.paths[0]), report))

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
        records = decoding.decode_distinct(self.records(), self.size, report, self.limit)
        columns = read_columns(records, self.memory_bytes() if max_bytes is None else max_bytes)
        if not report.read:
            raise UserError(decoding.describe_failure(str(self.paths[0]), report))
        ids, captions = columns.ids, columns.captions
        labels = columns.labels if self.labelled else None
        if columns.images is not None:
            images = torch.from_numpy(np.stack(columns.images))
            return Pairs(images, tuple(captions), labels, tuple(ids), self.classes, report)
        no_texts = Strings.from_texts(())
        index = RecordIndex(
            file_names=[],
            file_stamps=stamps,
            ids=ids,
            captions=captions,
            members=columns.members,
            urls=no_texts,
            origins=no_texts,
            places=columns.places,
            renamed=False,
        )
        stored = self.find_images(index)
        return replace(stored, labels=labels, classes=self.classes, report=report)

    def memory_bytes(self) -> int:
        """Bytes of pixels that `load_records` keeps in memory.

        It is a rank's share of half of the free memory: pixels are held twice for a moment.
        """
        return machine.free_memory() // (2 * machine.world_size())

    def file_stamps(self) -> list[Sequence[int] | None]:
        """Stamps of the files, which change with them; none by default."""
        return []

    def read(self, unit: Unit, report: ReadReport) -> Iterator[RecordBlock]:
        """Read a unit, a bounded number of records at a time; report unreadable records."""
        records = until_broken(self.records(unit), unit, report)
        decoded = decoding.decode_records(records, self.size, report)
        while batch := list(itertools.islice(decoded, batch_size(self.size))):
            block = _make_block(batch, self.progress_at(batch[-1][0], unit))
            batch.clear()  # frees these images before the next ones are decoded
            yield block

    def progress_at(self, record: decoding.Record, unit: Unit) -> float:
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


def _make_block(batch: Sequence[decoding.Decoded], done: float) -> RecordBlock:
    """Put decoded records into a block."""
    rows: list[RecordRow] = []
    image_rows: list[int] = []
    for number, (record, _) in enumerate(batch):
        captions = record.captions or ("",) * len(record.ids)
        for key, caption in zip(record.ids, captions, strict=True):
            place = (record.shard, record.offset, record.length)
            texts = (key, caption, record.member, record.url, record.origin)
            rows.append(RecordRow(*texts, *place))
            image_rows.append(number)
    images = torch.from_numpy(np.stack([image for _, image in batch]))
    return RecordBlock(rows, images, image_rows, done)


class FileImages:
    """The images of a source that are files of their own; a place is a row of `members`."""

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
