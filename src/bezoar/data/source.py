"""Sources of image-caption records: the interface for training, scanning and cleaning.

A data method returns Pairs or a `Source`. A new kind of source derives from `streams.RecordStream`
and defines how it is divided into units and how the records of a unit are read.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from torch import Tensor

from bezoar.data.blocks import blocks
from bezoar.data.decoding import Record
from bezoar.data.files.paths import encodable
from bezoar.data.files.skipped import ReadReport, Skipped
from bezoar.data.pairs import Pairs, load_pairs
from bezoar.data.shards import CleanCopy, write_shards
from bezoar.data.stored_pairs import StoredPairs
from bezoar.data.strings import Strings
from bezoar.errors import UserError
from bezoar.progress import Progress

UNIT_RECORDS = 4096  # of a unit of a set that is in memory, or read by index
BATCH_VALUES = 1 << 25  # pixel values that are decoded at a time
BATCH_IMAGES = 512  # images that are
TEXT_COLUMNS = ("id", "caption", "member", "url", "origin")
# The facts that a scan keeps of a record, see `RecordRow`.
COLUMNS = pa.schema(
    [(name, pa.large_string()) for name in TEXT_COLUMNS]
    + [("shard", pa.int32()), ("offset", pa.int64()), ("length", pa.int64())]
)
NO_IMAGES = (
    "ready embeddings hold no images and no captions to encode; what needs them cannot be asked "
    "here"
)
T = TypeVar("T")


@dataclass(frozen=True)
class Unit:
    """A part of a source that can be read separately."""

    number: int  # its number in the source
    file: str  # the path of its file as text; empty if there is none
    weight: int  # its share of the work, for progress
    # numbers by which the source finds the part; the first is the number of its file
    place: tuple[int, ...]


class RecordRow(NamedTuple):
    """The facts that a scan keeps of a record: one value for each of COLUMNS."""

    id: str
    caption: str
    member: str
    url: str
    origin: str
    shard: int
    offset: int
    length: int


@dataclass(frozen=True)
class RecordBlock:
    """Some records of a unit with their images."""

    rows: list[RecordRow]  # n records
    images: Tensor  # uint8 (m, 3, S, S)
    image_rows: list[int]  # the row in `images` for each record; several captions share one image
    done: float  # share of the unit that was read, 0..1


@dataclass(frozen=True)
class VectorBlock:
    """Some records of a unit that come as vectors, without images."""

    columns: dict[str, pa.Array]  # an array of n values for each of COLUMNS
    images: np.ndarray  # float32 (n, D)
    texts: np.ndarray | None  # the same of the captions, or None
    done: float  # share of the unit that was read, 0..1


@dataclass(frozen=True, eq=False)
class RecordIndex:
    """N records of a source at the time of a scan."""

    file_names: list[str]  # the source's files, by number
    # stamps of each unit's file, which change with the file; see `Source.stamp`
    file_stamps: list[Sequence[int] | None]
    ids: Strings  # unique keys
    captions: Strings | tuple[str, ...]  # texts, or none at all
    members: Strings  # names of the members or rows
    urls: Strings  # URLs of the images, empty if unknown
    origins: Strings  # sources of the images, empty if unknown
    places: np.ndarray  # PLACE (N,)
    renamed: bool  # whether some ids were changed, because another record has them

    def __len__(self) -> int:
        return len(self.ids)

    def place_of(self, row: int) -> str:
        """Return where a record lies, in words."""
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
    """Records that are read in parts. Without images, methods that return them may be missing."""

    size: int  # pixels a side of the images; 0 without images
    limit: int | None = None  # most records that are read
    has_images: bool = True  # whether there are images; otherwise the records are vectors
    has_image_files: bool = False  # whether an image may be a separate file
    progress_unit: str = ""  # unit of the units' weights, for the progress bar; empty for records

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
        """Iterate over the records in order, `size` at a time. Raises UserError without any."""
        raise UserError(NO_IMAGES)

    def load_records(self) -> Pairs | StoredPairs:
        """Read every record, into memory or into an index. Raises UserError if there are none."""
        raise UserError(NO_IMAGES)

    def records(self) -> Iterable[Record | Skipped] | None:
        """Iterate over all records, undecoded; None if they are not read from files."""
        return None

    def units(self) -> list[Unit]:
        """Cut the source; see `number_units`. Raises UserError if nothing could be read."""
        ...

    def stamp(self, unit: Unit) -> Sequence[int] | None:
        """Integers that change when a unit's file changes, or None."""
        return None

    def read(self, unit: Unit, report: ReadReport) -> Iterator[RecordBlock | VectorBlock]:
        """Read a unit, a bounded number of records at a time; report unreadable records."""
        ...

    def find_images(self, index: RecordIndex) -> Pairs | StoredPairs:
        """Return the records of an index with their images. Raises UserError without images."""
        raise UserError(NO_IMAGES)

    def image_path(self, shard: int, member: str) -> Path | None:
        """Return the file of a record's image; None if there is none or it may not be read."""
        return None

    def clean_copy(
        self, folder: Path, index: RecordIndex, kept_rows: np.ndarray, progress: Progress
    ) -> CleanCopy:
        """Write the records at the rows `kept_rows`, ascending, to a folder as shards.

        Raises UserError if there are no images or no captions, or the files were changed since the
        scan.
        """
        raise UserError(NO_IMAGES)


class WholeSource(Source):
    """Records that have been read as a whole, into memory or an index, as a source."""

    def __init__(self, whole: Pairs | StoredPairs) -> None:
        self.whole = whole
        self.size = whole.size

    @property
    def classes(self) -> tuple[str, ...]:
        return self.whole.classes

    @property
    def report(self) -> ReadReport:
        return self.whole.report or ReadReport(len(self.whole))

    @property
    def divisible(self) -> bool:
        """No: they are in the memory of this process, or would be read as a whole by each."""
        return False

    def __len__(self) -> int:
        return len(self.whole)

    def batches(self, size: int) -> Iterator[Pairs]:
        return self.whole.batches(size)

    def load_records(self) -> Pairs | StoredPairs:
        return self.whole

    def units(self) -> list[Unit]:
        """Cut the records into blocks."""
        parts = blocks(len(self), UNIT_RECORDS)
        return number_units(("", b.stop - b.start, (b.start, b.stop)) for b in parts)

    def read(self, unit: Unit, report: ReadReport) -> Iterator[RecordBlock]:
        """Take a unit. With the first one, the report receives the problems of the whole source."""
        if unit.number == 0:
            report.skipped += self.report.skipped
            report.renamed += self.report.renamed
            report.reasons += self.report.reasons
            report.doubles += self.report.doubles
        start, stop = unit.place
        for part in blocks(stop - start, batch_size(self.size)):
            rows = range(start + part.start, start + part.stop)
            pairs = self.whole.take(rows)
            captions = pairs.captions or ("",) * len(pairs)
            records = [
                RecordRow(key, caption, f"row {row}", "", "", 0, row, 0)
                for row, key, caption in zip(rows, pairs.ids, captions, strict=True)
            ]
            done = part.stop / (stop - start)
            yield RecordBlock(records, pairs.images, list(range(len(pairs))), done)

    def find_images(self, index: RecordIndex) -> Pairs | StoredPairs:
        rows = index.places["offset"]
        if len(rows) == len(self) and not index.renamed:
            return self.whole
        return self.whole.select(rows).with_ids(index.ids)

    def clean_copy(
        self, folder: Path, index: RecordIndex, kept_rows: np.ndarray, progress: Progress
    ) -> CleanCopy:
        """Write the records at these rows as shards of PNGs. Raises UserError without captions."""
        records = self.find_images(index)
        batches = (records.take(kept_rows[part]) for part in blocks(len(kept_rows), 1000))
        return CleanCopy(len(write_shards(folder, batches)), len(kept_rows))


def as_source(records: Any) -> Source:
    """The result of a data method as a source. What only has `batches` is loaded into memory."""
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
        report.leave_out(Skipped(unit.file, "", str(error)))


def batch_size(size: int) -> int:
    """Return how many images of so many pixels a side are decoded at a time."""
    return max(8, min(BATCH_IMAGES, BATCH_VALUES // (3 * size**2)))
