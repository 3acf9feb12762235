"""Shards: image-caption records streamed from webdataset tars in img2dataset's layout, and written to them.

A record is the consecutive members `KEY.jpg|jpeg|png|webp`, `KEY.txt` (the caption), `KEY.json` (what else is known).
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from braceexpand import braceexpand
from PIL import Image

from bezoar.data.decoding import MAX_LABELS, Record, batch_pairs, describe_failure
from bezoar.data.files.paths import distinct_stems
from bezoar.data.files.skipped import ReadReport, Skipped
from bezoar.data.files.tars import IMAGE_EXTENSIONS, Group, read_groups
from bezoar.data.pairs import Pairs
from bezoar.errors import UserError

EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json")
PATHS = 1_000_000  # shards a brace list may name
LoadMode = Literal["auto", "memory", "stream"]


@dataclass(frozen=True, slots=True)
class StoredRecord(Record):
    """A record that says where its encoded image lies: `length` bytes from `offset` on, in the tar number `shard`.

    url: where the image came from, when that is told.
    """

    shard: int
    offset: int
    length: int
    url: str = ""


@dataclass(frozen=True)
class ShardSource:
    """A source that reads tars as it goes; nothing but the names of its records is kept.

    paths: the tars. size: pixels a side (largest centred square, resized). captions: "first" takes an image's one
    caption (.txt, else json's), "all" makes a record `ID#0`, `ID#1` ... of each in json's `captions`. limit: records.
    load: where whoever needs every record at hand is to keep the images, see bezoar.indexed.

    An id is json's `record_id` where there is one (write_shards puts it there), else `SHARD/KEY` with the shard's file
    name without .tar, and as many of its folders as it takes to tell the shards apart. It does not depend on order.
    Labels come from json's `label` (0..99999) and `class`; a class without a label is numbered by sorted names.
    """

    paths: tuple[Path, ...]
    size: int = 64
    captions: Literal["first", "all"] = "first"
    limit: int | None = None
    load: LoadMode = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "_report", ReadReport())

    @property
    def report(self) -> ReadReport:
        """How the last pass over the tars went, or is going; empty before the first."""
        return self.__dict__["_report"]

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The ids that `batches` yields, in that order. Costs one pass that decodes everything, so that it is exact."""
        return tuple(i for batch in self.batches(1024) for i in batch.ids)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def stems(self) -> tuple[str, ...]:
        """What each shard is called in its ids."""
        return distinct_stems(self.paths)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names by label, from all json members (a pass that skips the images); () when none is named."""
        return self._names[0]

    @cached_property
    def _names(self) -> tuple[tuple[str, ...], dict[str, int], bool]:
        """-> classes, number of each class that comes without a label, whether there are labels at all."""
        numbered: dict[int, str] = {}
        bare: set[str] = set()
        labelled = False
        for path in self.paths:
            for group in read_groups(path, ("json",)):
                fact = parse_metadata(group) if isinstance(group, Group) else ""
                if isinstance(fact, str) or (fact.label < 0 and not fact.name):
                    continue
                labelled = True
                if fact.label < 0:
                    bare.add(fact.name)
                elif numbered.setdefault(fact.label, fact.name) != fact.name:
                    raise UserError(
                        f"{path}: label {fact.label} is {numbered[fact.label]!r} and also {fact.name!r}"
                    )
        if bare and numbered:
            raise UserError(
                f"{self.paths[0]} ...: some records have a label and some only a class, as {min(bare)!r}"
            )
        if bare:
            return tuple(sorted(bare)), {name: i for i, name in enumerate(sorted(bare))}, True
        named = any(numbered.values())
        return (
            tuple(numbered.get(i, "") for i in range(max(numbered) + 1)) if named else (),
            {},
            labelled,
        )

    def batches(self, size: int) -> Iterator[Pairs]:
        """The records in the order of the tars, `size` at a time. Raises UserError for a shard that yields nothing."""
        report = self.begin_pass()
        yield from batch_pairs(
            self.records(), self.size, size, report, self.classes, self.limit, self.labelled
        )
        if not report.read:
            raise UserError(describe_failure(str(self.paths[0]), report))

    def begin_pass(self) -> ReadReport:
        """The report of a new pass over the tars, to be filled by whoever makes it."""
        report = ReadReport()
        object.__setattr__(self, "_report", report)
        return report

    @property
    def labelled(self) -> bool:
        """Whether any record has a class or a label."""
        return self._names[2]

    def records(self, only: int | None = None) -> Iterator[StoredRecord | Skipped]:
        """The records not decoded yet, in the order of the tars. Raises UserError for a shard that yields nothing.

        only: the number of one shard; its records then have the labels that their own json tells, and no more.
        """
        for shard, (path, stem) in enumerate(zip(self.paths, self.stems, strict=True)):
            if only not in (None, shard):
                continue
            numbers = self._names[1] if only is None else {}
            found, problems = 0, ReadReport()
            for group in read_groups(path, EXTENSIONS):
                item = (
                    group
                    if isinstance(group, Skipped)
                    else self._record(group, path, stem, shard, numbers)
                )
                if isinstance(item, Skipped):
                    problems.skipped[:] = problems.skipped[:1] or [item]
                found += isinstance(item, Record)
                yield item
            if not found:
                raise UserError(describe_failure(str(path), problems))

    def _record(
        self, group: Group, path: Path, stem: str, shard: int, numbers: dict[str, int]
    ) -> StoredRecord | Skipped:
        """One record of a group of members, or why there is none. numbers: of classes that come without a label."""

        def skip(reason: str) -> Skipped:
            return Skipped(str(path), group.key, reason)

        fact = parse_metadata(group)
        if isinstance(fact, str):
            return skip(fact)
        images = [e for e in IMAGE_EXTENSIONS if e in group.files]
        if len(images) != 1:
            return skip("several images of one key" if images else "no image")
        try:
            caption = group.files.get("txt", b"").decode().strip() or fact.captions[0].strip()
        except UnicodeDecodeError:
            return skip("caption is not UTF-8")
        every = (
            tuple(c.strip() for c in fact.captions if c.strip()) if self.captions == "all" else ()
        )
        every = every or ((caption,) if caption else ())
        if not every:
            return skip("no caption")
        key = fact.id or f"{stem}/{group.key}"
        ids = tuple(f"{key}#{i}" for i in range(len(every))) if self.captions == "all" else (key,)
        label = numbers.get(fact.name, fact.label)
        image, offset = group.files[images[0]], group.offsets[images[0]]
        return StoredRecord(
            image, ids, every, label, str(path), group.key, shard, offset, len(image), fact.url
        )


class Metadata(NamedTuple):
    """What json says of a record; "" and -1 = nothing."""

    id: str
    captions: tuple[str, ...]
    label: int
    name: str
    url: str = ""


def parse_metadata(group: Group) -> Metadata | str:
    """Read a record's json, or say why it cannot be."""
    try:
        told: Any = json.loads(group.files.get("json", b"{}"))
    except (ValueError, RecursionError):
        return "metadata is not JSON"
    if not isinstance(told, dict):
        return "metadata is not a JSON object"
    one, many = told.get("caption"), told.get("captions")
    captions = [c for c in many if isinstance(c, str)] if isinstance(many, list) else []
    captions = captions or [one if isinstance(one, str) else ""]
    label, name, key, url = (told.get(k) for k in ("label", "class", "record_id", "url"))
    if label is not None and (
        not isinstance(label, int) or isinstance(label, bool) or not -1 <= label < MAX_LABELS
    ):
        return f"label is not a number from 0 to {MAX_LABELS - 1}"
    texts = [t for t in (name, key, url, *captions) if isinstance(t, str)]
    if any("\ud800" <= c <= "\udfff" for t in texts for c in t):  # JSON can spell half a character
        return "metadata is not Unicode"
    return Metadata(
        key if isinstance(key, str) else "",
        tuple(captions),
        -1 if label is None else label,
        name if isinstance(name, str) else "",
        url if isinstance(url, str) else "",
    )


def expand_paths(text: str, what: str = "shards", ending: str = ".tar") -> tuple[Path, ...]:
    """A path, a glob or a brace list (`cc/{00000..00331}.tar`, commas in braces too) -> the files, each there.

    Globs are sorted; a folder means its *.tar. Raises UserError when something that is named is missing.
    """
    try:
        written = list(itertools.islice(braceexpand(text), PATHS + 1))
    except ValueError as error:
        raise UserError(f"{what} {text!r}: {error}") from error
    if len(written) > PATHS:
        raise UserError(f"{what} {text!r} names more than {PATHS} files")
    paths: list[Path] = []
    for one in written:
        path = Path(one).expanduser()
        if os.path.isdir(path):
            paths += sorted(path.glob(f"*{ending}"))
        elif os.path.exists(path) or not glob.has_magic(one):
            paths.append(path)
        else:
            paths += map(Path, sorted(glob.glob(str(path))))
    missing = [p for p in paths if not os.path.isfile(p)]
    if missing:
        raise UserError(
            f"{what} {text!r}: {len(missing)} of {len(paths)} are missing, the first is {missing[0]}"
        )
    if not paths:
        raise UserError(f"{what} {text!r}: no such {ending} file")
    return tuple(paths)


def write_shards(
    folder: Path, source: Any, per_shard: int = 1000, format: str = "png"
) -> list[Path]:
    """Write a source (Pairs, Shards or an iterable of Pairs; captions needed) as tars in img2dataset's layout.

    format: `png` (exact), `jpeg` (quality 95) or `jpeg:QUALITY`. The same records give the same bytes. Json keeps each
    record's id as `record_id`, so reading gives the ids back. Each tar appears under its name only when complete.
    Raises UserError when the folder holds tars already: mixed sets would be read as one.
    """
    name, quality = _format(format)
    if per_shard < 1:
        raise ValueError(f"per_shard must be at least 1; got {per_shard}")
    if sorted(folder.glob("*.tar")):
        raise UserError(f"{folder} holds .tar files already; choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    parts: Iterable[Pairs] = (
        source.batches(min(per_shard, 1024)) if hasattr(source, "batches") else source
    )
    records = ((part, row) for part in parts for row in range(len(part)))
    written: list[Path] = []
    while chunk := next(records, None):
        path = folder / f"{len(written):05d}.tar"
        partial = path.with_suffix(".part")
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, (part, index) in enumerate(
                itertools.chain([chunk], itertools.islice(records, per_shard - 1))
            ):
                key = f"{len(written):05d}{row:04d}"
                for extension, content in sorted(_encoded(part, index, key, name, quality).items()):
                    header = tarfile.TarInfo(f"{key}.{extension}")  # mtime 0, no owner
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
        partial.replace(path)
        written.append(path)
    return written


def _encoded(part: Pairs, row: int, key: str, name: str, quality: int) -> dict[str, bytes]:
    """Extension -> content of one record."""
    if not part.captions:
        raise UserError("records without captions cannot be written as shards")
    buffer = io.BytesIO()
    picture = Image.fromarray(part.images[row].permute(1, 2, 0).contiguous().cpu().numpy())
    picture.save(buffer, name, **({"quality": quality, "subsampling": 0} if name == "jpeg" else {}))
    caption = part.captions[row]
    told: dict[str, Any] = {
        "key": key,
        "record_id": part.ids[row],
        "status": "success",
        "caption": caption,
    }
    told |= {"width": picture.width, "height": picture.height}
    label = -1 if part.labels is None else int(part.labels[row])
    if label >= 0:
        told |= {"label": label} | ({"class": part.classes[label]} if part.classes else {})
    extension = "jpg" if name == "jpeg" else name
    return {
        extension: buffer.getvalue(),
        "txt": caption.encode(),
        "json": json.dumps(told).encode(),
    }


def _format(text: str) -> tuple[str, int]:
    name, colon, quality = text.partition(":")
    if name not in ("png", "jpeg") or (colon and (name == "png" or not quality.isdecimal())):
        raise UserError(f"format must be png, jpeg or jpeg:QUALITY; got {text!r}")
    number = int(quality or 95)
    if not 1 <= number <= 100:
        raise UserError(f"jpeg quality must lie in 1..100; got {number}")
    return name, number
