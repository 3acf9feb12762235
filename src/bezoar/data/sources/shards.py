"""Image-caption records streamed from webdataset tars in img2dataset's layout (Beaumont 2021)."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np

from bezoar.data.decoding import Record, describe_failure
from bezoar.data.files.images import OTHER_IMAGES
from bezoar.data.files.metadata import ORIGIN_COLUMNS, Metadata, choose_caption, parse_metadata
from bezoar.data.files.paths import IMAGE_EXTENSIONS, distinct_stems, expand_paths
from bezoar.data.files.skipped import ReadReport, Skipped, Unreadable
from bezoar.data.files.tars import Group, read_groups
from bezoar.data.label_sets import check_fields, name_classes
from bezoar.data.shards import CleanCopy, add_member, open_shard
from bezoar.data.source import RecordIndex, Unit, number_units
from bezoar.data.stored_pairs import ShardFiles, file_stamp
from bezoar.data.streams import RecordStream
from bezoar.errors import UserError
from bezoar.progress import Progress
from bezoar.registry import method

UNLIMITED_BYTES = 1 << 62
Captions = Literal["first", "all"]
LoadMode = Literal["auto", "memory", "stream"]


@method
class Shards:
    """`shards:"cc/{00000..00331}.tar"`: a path, a folder, a glob or a brace list."""

    path: Annotated[str, "tar, folder, glob, or brace list such as cc/{00000..00331}.tar"]
    size: Annotated[int, "pixels a side: the largest centred square, resized"] = 64
    captions: Annotated[Captions, "one record an image, or one a caption (id#0, id#1 ...)"] = (
        "first"
    )
    limit: Annotated[int | None, "read at most so many records"] = None
    load: Annotated[
        LoadMode,
        "images in memory, or read when training draws them; auto: when they would fill half of it",
    ] = "auto"

    source: Annotated[
        str | None, "key of the JSON that says where a record comes from; found when not given"
    ] = None

    def __post_init__(self) -> None:
        check_fields(self.size, self.limit)

    def files(self) -> list[Path]:
        """The tars."""
        return list(expand_paths(self.path))

    def __call__(self) -> ShardSource:
        """Return a source of the records. Raises UserError if a tar is missing."""
        paths = expand_paths(self.path)
        return ShardSource(
            paths, self.size, self.captions, self.limit, self.load, self.source or ""
        )


class ClassNames(NamedTuple):
    """The classes in the JSON of all records.

    Attributes:
        classes: names by number; none if no class is named.
        numbers: numbers of classes that come without a label.
        labels: the number of the class of a label; None if no class is named, and labels are
            numbers.
        labelled: whether any record has a class or a label.
    """

    classes: tuple[str, ...]
    numbers: dict[str, int]
    labels: dict[int, int] | None
    labelled: bool

    def number_of(self, metadata: Metadata) -> int:
        """The number of a record's class; -1 if it is unknown."""
        label = metadata.label
        if self.labels is not None:
            label = self.labels.get(label, -1)
        return self.numbers.get(metadata.class_name, label)


UNNUMBERED = ClassNames((), {}, None, False)  # labels are those of the JSON


@dataclass(eq=False)
class ShardSource(RecordStream):
    """Reads tars in parts, and keeps only the names of their records.

    An id is the JSON's `record_id` if there is one (`write_shards` writes it), else `SHARD/KEY`,
    with the shard's file name without .tar, and as many of its folders as are needed to make it
    unique. It does not depend on order. Labels come from the JSON's `label` (0..99999) and `class`;
    classes without a label are numbered by sorted names. Classes are those with a name, in the
    order of their labels; labels that no record has are left out.

    Attributes:
        paths: the tars.
        size: pixels a side: the largest centred square, resized.
        captions: `first` uses an image's one caption (.txt, else the JSON's); `all` makes a record
            `ID#0`, `ID#1` ... of each of the JSON's `captions`.
        limit: most records that are read.
        load: where `load_records` keeps the images.
        origin: key of the JSON with the record's source; empty: found by name.
    """

    paths: tuple[Path, ...]
    size: int = 64
    captions: Captions = "first"
    limit: int | None = None
    load: LoadMode = "auto"
    origin: str = ""
    has_image_files = False
    is_fingerprinted = True
    progress_unit = "KiB"

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The ids that `batches` yields, in that order; costs a pass that decodes everything."""
        return tuple(i for batch in self.batches(1024) for i in batch.ids)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def stems(self) -> tuple[str, ...]:
        """The name of each shard in its ids."""
        return distinct_stems(self.paths)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label, from all JSON members; costs a pass that skips the images."""
        return self._class_names.classes

    @property
    def labelled(self) -> bool:
        """Whether any record has a class or a label."""
        return self._class_names.labelled

    @cached_property
    def _class_names(self) -> ClassNames:
        labels: dict[int, str] = {}
        bare: set[str] = set()  # classes without a label
        for path in self.paths:
            for metadata in _read_metadata(path):
                if metadata.label < 0:
                    bare |= {metadata.class_name} - {""}
                    continue
                name = labels.get(metadata.label) or metadata.class_name
                labels[metadata.label] = name
                if metadata.class_name and name != metadata.class_name:
                    raise UserError(
                        f"{path}: label {metadata.label} is {name!r} and also "
                        f"{metadata.class_name!r}"
                    )
        if bare and labels:
            raise UserError(
                f"{self.paths[0]} ...: some records have a label and some only a class, as "
                f"{min(bare)!r}"
            )
        if bare:
            names = tuple(sorted(bare))
            return ClassNames(names, {name: i for i, name in enumerate(names)}, None, True)
        if not any(labels.values()):
            return ClassNames((), {}, None, bool(labels))
        classes, numbers = name_classes(labels)
        return ClassNames(classes, {}, numbers, True)

    def memory_bytes(self) -> int:
        """Bytes of pixels that `load_records` keeps in memory, according to `load`."""
        if self.load == "auto":
            return super().memory_bytes()
        return UNLIMITED_BYTES if self.load == "memory" else 0

    def file_stamps(self) -> list[Sequence[int] | None]:
        """Size and time of change of the shards. Raises UserError if one does not exist."""
        return list(ShardFiles(self.paths).stamps)

    def units(self) -> list[Unit]:
        """A unit a shard, weighed by its KiB."""
        return number_units((str(p), _kibibytes(p), (i,)) for i, p in enumerate(self.paths))

    def stamp(self, unit: Unit) -> Sequence[int] | None:
        """Size and time of change of the shard; None if it does not exist."""
        path = self.paths[unit.place[0]]
        return file_stamp(path.stat()) if path.exists() else None

    def progress_at(self, record: Record, unit: Unit) -> float:
        """Share of the shard's bytes."""
        return min(1.0, record.offset / 1024 / unit.weight)

    def records(self, unit: Unit | None = None) -> Iterator[Record | Skipped]:
        """Iterate over the records of all tars, or of one; these have the labels of their own JSON.

        Raises UserError for a shard that yields nothing.
        """
        if unit is not None:
            yield from self._read_shard(unit.place[0], UNNUMBERED)
            return
        for shard in range(len(self.paths)):
            yield from self._read_shard(shard, self._class_names)

    def _read_shard(self, shard: int, names: ClassNames) -> Iterator[Record | Skipped]:
        count = 0
        problems = ReadReport()
        for group in read_groups(self.paths[shard]):
            item = group if isinstance(group, Skipped) else self._make_record(group, shard, names)
            if isinstance(item, Record):
                count += 1
            else:
                problems.leave_out(item)
            yield item
        if not count:
            raise UserError(describe_failure(str(self.paths[shard]), problems))

    def _make_record(self, group: Group, shard: int, names: ClassNames) -> Record | Skipped:
        """Make a record, or return why there is none."""
        file = str(self.paths[shard])
        origins = (self.origin,) if self.origin else ORIGIN_COLUMNS
        metadata = parse_metadata(group.files.get("json", b"{}"), origins)
        if isinstance(metadata, str):
            return Skipped(file, group.key, metadata)
        extensions = [e for e in IMAGE_EXTENSIONS if e in group.files]
        if len(extensions) != 1:
            unread = next((e for e in group.others if e in OTHER_IMAGES), "")
            missing = f"image of a format that is not read: {unread}" if unread else "no image"
            reason = "several images of one key" if extensions else missing
            return Skipped(file, group.key, reason)
        try:
            captions = self._read_captions(group, metadata)
        except Unreadable as error:
            return Skipped(file, group.key, str(error))
        key = metadata.id or f"{self.stems[shard]}/{group.key}"
        several = self.captions == "all"
        image = group.files[extensions[0]]
        return Record(
            image=image,
            ids=tuple(f"{key}#{i}" for i in range(len(captions))) if several else (key,),
            captions=captions,
            label=names.number_of(metadata),
            file=file,
            member=group.key,
            url=metadata.url,
            origin=metadata.origin,
            shard=shard,
            offset=group.offsets[extensions[0]],
            length=len(image),
        )

    def _read_captions(self, group: Group, metadata: Metadata) -> tuple[str, ...]:
        """The captions of a record. Raises Unreadable if there are none."""
        captions: tuple[str, ...] = (choose_caption(group.files.get("txt", b""), metadata),)
        if self.captions == "all":
            captions = tuple(c.strip() for c in metadata.captions if c.strip()) or captions
        if not captions[0]:
            raise Unreadable("no caption")
        return captions

    def reader(self, index: RecordIndex) -> ShardFiles:
        """Read the tars in the state of the scan."""
        return ShardFiles(self.paths, index.file_stamps)

    def clean_copy(
        self, folder: Path, index: RecordIndex, kept_rows: np.ndarray, progress: Progress
    ) -> CleanCopy:
        """Write the same tars without what is not kept, members byte for byte.

        An image with several captions stays if all of them do.
        """
        is_kept = np.zeros(len(index), bool)
        is_kept[kept_rows] = True
        by_shard = np.argsort(index.places["shard"], kind="stable")
        edges = np.searchsorted(index.places["shard"][by_shard], np.arange(len(self.paths) + 1))
        shards = count = 0
        for shard, (path, name) in enumerate(zip(self.paths, self._copy_names(), strict=True)):
            progress.step(shard, len(self.paths), "writing shards")
            rows = by_shard[edges[shard] : edges[shard + 1]]
            offsets = index.places["offset"][rows]
            kept_offsets = set(offsets.tolist()) - set(offsets[~is_kept[rows]].tolist())
            if kept_offsets:
                count += copy_shard(path, folder / f"{name}.tar", kept_offsets)
                shards += 1
        return CleanCopy(shards, count)

    def _copy_names(self) -> list[str]:
        """A file name for the copy of each shard."""
        names = [stem.replace("/", "_") for stem in self.stems]
        if len(set(names)) < len(names):  # a/b_c and a_b/c
            names = [f"{i:05d}_{name}" for i, name in enumerate(names)]
        return names


def copy_shard(path: Path, target: Path, offsets: set[int]) -> int:
    """Copy the records of a tar whose image begins at one of the offsets, members byte for byte.

    Returns how many they are. Raises UserError if some are not there any more.
    """
    count = 0
    with open_shard(target, tarfile.PAX_FORMAT) as tar:
        for group in read_groups(path):
            if isinstance(group, Skipped) or not offsets & set(group.offsets.values()):
                continue
            count += 1
            for extension, content in group.files.items():
                add_member(tar, f"{group.key}.{extension}", content)
        if count < len(offsets):
            raise UserError(
                f"{path} was changed while it was scanned: "
                f"{len(offsets) - count} records are not there any more"
            )
    return count


def _read_metadata(path: Path) -> Iterator[Metadata]:
    """Read the JSON of every record of a tar that can be read."""
    for group in read_groups(path, ("json",)):
        if isinstance(group, Group) and "json" in group.files:
            metadata = parse_metadata(group.files["json"])
            if isinstance(metadata, Metadata):
                yield metadata


def _kibibytes(path: Path) -> int:
    """KiB of a file, at least 1; one that does not exist any more is named when it is its turn."""
    try:
        return max(1, path.stat().st_size >> 10)
    except OSError:
        return 1
