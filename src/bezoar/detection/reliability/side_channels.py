"""Side channels: can what has nothing to do with an attack tell poisons from the rest? File sizes, headers, order, templates.

A benchmark whose poisons were written by another program, at another time or in another place than the rest is solved by
reading that off. A detector's figures on such a set say little. A *channel* is one number or one kind for each record.

A channel has no direction of its own. Taking the better of both after looking is biased upwards (a channel of noise gives
0.5 + 0.8 times the AUROC's standard error on average, and never less than 0.5). So a fixed half of the records, by their ids,
chooses the direction (of kinds: how poisoned each kind is), and only the other half is measured.

The files are hostile: their readers bound the members, nothing is decoded, and of an image at most MAX_SEGMENTS parts of its
header and HEAD_BYTES bytes are looked at.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bezoar.data.decoding import Record
from bezoar.data.files.images import DECODING_ERRORS, FORMATS
from bezoar.data.files.skipped import Skipped
from bezoar.data.files.tars import BLOCK
from bezoar.data.folders import FolderSource
from bezoar.data.randomness import draws
from bezoar.data.shards import ShardSource, StoredRecord, expand_paths
from bezoar.data.tables import TableSource
from bezoar.encoders.encoder import split_words
from bezoar.errors import UserError
from bezoar.evaluation import stats
from bezoar.evaluation.scores import Measure
from bezoar.runs import inputs
from bezoar.runs.inputs import Dataset
from bezoar.runs.run import Run

HEAD_BYTES = 1 << 20  # bytes of a file that are looked at
MAX_SEGMENTS = 256  # parts of a header that are looked at
COMMON_WORDS = 64  # words that count as a caption's template; the others are left open
TEMPLATE_WORDS = 12  # words and gaps of a template
ORDER_BLOCKS = 20  # equal parts of the corpus
RARE = 20  # records of a kind, below which it counts as rare
MIN_RECORDS = 2  # poisons, and others, in either half, below which nothing is measured
# AUROC from which a channel separates poisons from the rest, when chance is ruled out over all channels
SEPARATES = 0.6
DESCRIPTIONS = {  # what a channel is, in the words of a page
    "file_size": "size of the image's file in bytes",
    "file_time": "time stamp of the file, or in the tar's header",
    "file_owner": "owner, group and mode of the file, or in the tar's header",
    "extension": "the file name's extension",
    "format": "the image's format by its first bytes",
    "layout": "the image header's parts in order, and its colour sampling",
    "jpeg_tables": "JPEG quantisation tables",
    "shape": "width x height as stored",
    "aspect": "width / height as stored",
    "shard": "which shard",
    "place_in_shard": "place within the shard",
    "row": "place in the corpus",
    "row_block": f"which of {ORDER_BLOCKS} equal parts of the corpus (fewer of a small one)",
    "key_pattern": "the id with its numbers left out",
    "caption_length": "characters of the caption",
    "caption_repeats": "how many records share the caption",
    "caption_template": f"the caption with all but the {COMMON_WORDS} commonest words left out",
}
FILE_CHANNELS = (
    "file_size",
    "file_time",
    "file_owner",
    "extension",
    "format",
    "layout",
    "jpeg_tables",
    "shape",
    "aspect",
)
SHARD_CHANNELS = ("shard", "place_in_shard")
CAPTION_CHANNELS = ("caption_length", "caption_repeats", "caption_template")


@dataclass
class Channels:
    """The channels of N records.

    ids: N keys. numbers: name -> float64 (N,). kinds: name -> int64 (N,), equal for equal. absent: name -> why. sizes: float64
    (N, 2), width and height as stored, 0 where no header says; None where nothing is known.
    """

    ids: Sequence[str]
    numbers: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    kinds: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    sizes: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class MeasuredChannel:
    """A channel and its AUROC. separates: whether it tells poisons from the rest, chance ruled out."""

    name: str
    auroc: Measure
    separates: bool


def collect_channels(
    scanned: Any, dataset: Dataset, ids: Sequence[str], captions: Sequence[str]
) -> Channels:
    """Every channel of a scan's data.

    Files are looked at where they hold what is scanned: shards that a poison run has written, or data without a plan. A plan
    that is applied while records are read leaves the files of its poisons as they were.

    Args:
        scanned: The run or data method that was scanned.
        dataset: What it opens as.
        ids: Of its records, in their order.
        captions: Of the same records, or none.
    """
    channels = record_channels(ids, captions)
    poison = scanned.ancestor("poison") if isinstance(scanned, Run) else None
    shards = None if poison is None else poison.path / "shards"
    why = "these data are not read from files"
    records: Iterable[Record | Skipped] | None
    if shards is not None and any(shards.glob("*.tar")):
        records = ShardSource(expand_paths(str(shards))).records()
    elif dataset.plan.edits:
        records = None
        why = "poisons are made as records are read; poison with --write shards to look at files"
    else:
        records = stored_records(dataset.method)
    from_files = file_channels(records) if records is not None else None
    if from_files is None or not len(from_files.ids):
        channels.absent |= dict.fromkeys(FILE_CHANNELS, why)
        return channels
    return join_channels(channels, from_files)


def stored_records(method: Any) -> Iterable[Record | Skipped] | None:
    """The records of a data method that reads files, images not decoded; None for others."""
    if hasattr(method, "records"):
        return method.records()
    source = inputs.open_source(method)
    if isinstance(source, ShardSource):
        return source.records()
    if isinstance(source, (TableSource, FolderSource)):
        return itertools.chain.from_iterable(source.records(i) for i in range(len(source.paths)))
    return None


def join_channels(records: Channels, files: Channels) -> Channels:
    """Channels of both, over the records of the first, in their order."""
    row_of = {key: row for row, key in enumerate(files.ids)}
    rows = np.array([row_of.get(key, -1) for key in records.ids], dtype=np.int64)
    stored = rows >= 0
    if not stored.any():
        records.absent |= dict.fromkeys(FILE_CHANNELS, "the files hold none of these records' ids")
        return records
    for name, values in files.numbers.items():
        # a record that is in no file stands where it tells nothing
        records.numbers[name] = np.where(stored, values[rows], np.median(values))
    for name, kind in files.kinds.items():
        records.kinds[name] = np.where(stored, kind[rows], -1)
    records.absent |= files.absent
    if files.sizes is not None:
        records.sizes = np.where(stored[:, None], files.sizes[rows], 0.0)
    return records


# ---- what is read off the records


def record_channels(ids: Sequence[str], captions: Sequence[str]) -> Channels:
    """Order, ids and captions."""
    channels, n = Channels(ids), len(ids)
    order = np.arange(n)
    order_blocks = min(ORDER_BLOCKS, max(1, n // (2 * RARE)))
    channels.numbers["row"] = order.astype(np.float64)
    channels.kinds["row_block"] = order * order_blocks // max(1, n)
    channels.kinds["key_pattern"] = number_values(key_pattern(key) for key in ids)
    if not len(captions):
        channels.absent |= dict.fromkeys(CAPTION_CHANNELS, "no captions")
        return channels
    channels.numbers["caption_length"] = np.fromiter(map(len, captions), np.float64, n)
    same = number_values(captions)
    channels.numbers["caption_repeats"] = np.bincount(same)[same].astype(np.float64)
    channels.kinds["caption_template"] = number_values(caption_templates(captions))
    return channels


def key_pattern(key: str) -> str:
    """An id with its numbers left out: `train/00012/003.jpg` -> `train/0/0.jpg`; of a long one, the first characters."""
    return re.sub(r"\d+", "0", key[:512])


def caption_templates(captions: Sequence[str]) -> Iterator[str]:
    """Each caption with only the commonest words of all captions left, gaps between them as one `_`."""
    holders = Counter(word for c in captions for word in set(split_words(c[:4096])))
    common = {word for word, _ in holders.most_common(COMMON_WORDS)}
    for caption in captions:
        words = split_words(caption[:4096])[: 4 * TEMPLATE_WORDS]
        template: list[str] = []
        for word in words:
            if word in common:
                template.append(word)
            elif template[-1:] != ["_"]:
                template.append("_")
        yield " ".join(template[:TEMPLATE_WORDS])


def number_values(values: Iterable[Hashable]) -> NDArray[np.int64]:
    """Equal values -> equal numbers 0, 1, ..., in order of appearance."""
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(v, len(number)) for v in values], dtype=np.int64)


# ---- what is read off the files


@dataclass(frozen=True)
class ImageHeader:
    """What the first bytes of an image say. tables: a digest of a JPEG's quantisation tables. shape: (0, 0) if not known."""

    format: str = ""
    layout: str = ""
    tables: str = ""
    shape: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class FileEntry:
    """What a file system or a tar says of an image."""

    size: int
    time: float = 0.0
    owner: str = ""
    extension: str = ""


@dataclass(frozen=True)
class StoredImage:
    """The image of a record as it is stored. place: its number in the shard."""

    entry: FileEntry
    header: ImageHeader
    shard: int
    place: int


def file_channels(records: Iterable[Record | Skipped]) -> Channels:
    """Sizes, headers and places of the stored images; what cannot be read is left out. Raises UserError for a lost shard."""
    ids: list[str] = []
    images: list[StoredImage] = []
    counts: Counter[int] = Counter()
    in_tars = False
    try:
        for record, tar_header in _with_tar_headers(records):
            described = describe_image(record, tar_header)
            if described is None:
                continue
            in_tars |= tar_header is not None
            shard = record.shard if isinstance(record, StoredRecord) else 0
            ids += record.ids
            images += [StoredImage(*described, shard, counts[shard])] * len(record.ids)
            counts[shard] += 1
    except OSError as error:
        raise UserError(
            f"{error.filename or 'a shard'} cannot be read: {error.strerror or error}"
        ) from error
    return _image_channels(ids, images, in_tars) if images else Channels(ids)


def _with_tar_headers(
    records: Iterable[Record | Skipped],
) -> Iterator[tuple[Record, bytes | None]]:
    """Each record that was read, with the tar header that stands before its image; None for images that lie in no tar."""
    file, descriptor = "", -1
    try:
        for record in records:
            if isinstance(record, Skipped):
                continue
            if not isinstance(record, StoredRecord) or not isinstance(record.image, bytes):
                yield record, None
                continue
            if record.file != file:
                if descriptor >= 0:
                    os.close(descriptor)
                    descriptor = -1
                file, descriptor = record.file, os.open(record.file, os.O_RDONLY)
            offset = record.offset - BLOCK
            yield record, os.pread(descriptor, BLOCK, offset) if offset >= 0 else b""
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def describe_image(
    record: Record, tar_header: bytes | None
) -> tuple[FileEntry, ImageHeader] | None:
    """What is stored of a record's image, beside its pixels; None when it cannot be read."""
    if isinstance(record.image, bytes):
        entry = FileEntry(len(record.image))
        if tar_header:
            entry = parse_tar_header(tar_header, len(record.image))
        return entry, parse_image_header(record.image[:HEAD_BYTES])
    try:
        status = record.image.stat()
        if not stat.S_ISREG(status.st_mode):
            return None
        with record.image.open("rb") as file:
            content = file.read(HEAD_BYTES)
    except (OSError, ValueError):  # ValueError: a NUL byte in the path
        return None
    owner = f"{status.st_uid}:{status.st_gid}:{status.st_mode:o}"
    entry = FileEntry(status.st_size, status.st_mtime, owner, record.image.suffix)
    return entry, parse_image_header(content)


def parse_tar_header(block: bytes, size: int) -> FileEntry:
    """Time, owner and extension in the header (512 bytes) that stands before a member's data; `size` is the data's."""
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return FileEntry(size)
    owner = f"{member.uid}:{member.gid}:{member.uname}:{member.gname}:{member.mode:o}"
    extension = member.name.rpartition("/")[2].partition(".")[2]
    return FileEntry(size, float(member.mtime), owner, extension)


def parse_image_header(content: bytes) -> ImageHeader:
    """The first bytes of an image -> its header, as far as it can be read."""
    if content[:2] == b"\xff\xd8":
        return parse_jpeg(content)
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return parse_png(content)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:  # reads the header alone
            return ImageHeader(image.format or "", image.mode, "", image.size)
    except DECODING_ERRORS:
        return ImageHeader()


def parse_jpeg(content: bytes) -> ImageHeader:
    """Layout: the markers up to the first scan, whose order Pillow does not keep, and the sampling factors."""
    at, markers, sampling, shape = 2, list[str](), "", (0, 0)
    tables, digest = False, hashlib.blake2b(digest_size=8)
    while at + 4 <= len(content) and len(markers) < MAX_SEGMENTS:
        if content[at] != 0xFF:
            break
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        body = content[at + 4 : at + 2 + length]
        markers.append(f"{marker:02x}")
        if marker == 0xDB:  # quantisation tables
            tables = True
            digest.update(body)
        elif marker == 0xDA:  # the first scan
            break
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 6:
            shape = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
            sampling = body[6:18].hex()
        at += 2 + max(2, length)
    layout = " ".join([*markers, sampling])
    return ImageHeader("JPEG", layout, digest.hexdigest() if tables else "", shape)


def parse_png(content: bytes) -> ImageHeader:
    """Layout: the chunks up to the pixels, whose order Pillow does not keep, depth, colour and interlacing."""
    at, chunks = 8, list[str]()
    while at + 8 <= len(content) and len(chunks) < MAX_SEGMENTS:
        length, name = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        chunks.append(name.decode("latin-1"))
        if name == b"IDAT":
            break
        at += 12 + length
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    return ImageHeader("PNG", " ".join([*chunks, content[24:29].hex()]), "", (width, height))


def _image_channels(ids: list[str], images: list[StoredImage], in_tars: bool) -> Channels:
    """The channels of stored images, at least one."""
    sizes = np.array([image.header.shape for image in images], np.float64)
    numbers = {
        "file_size": np.array([image.entry.size for image in images], np.float64),
        "file_time": np.array([image.entry.time for image in images], np.float64),
    }
    kinds = {
        "file_owner": number_values(image.entry.owner for image in images),
        "extension": number_values(image.entry.extension for image in images),
        "format": number_values(image.header.format for image in images),
        "layout": number_values(image.header.layout for image in images),
    }
    channels = Channels(ids, numbers, kinds)
    if (sizes > 0).any():
        kinds["shape"] = number_values(image.header.shape for image in images)
        numbers["aspect"] = sizes[:, 0] / np.maximum(sizes[:, 1], 1)
        channels.sizes = sizes
    else:
        channels.absent |= dict.fromkeys(("shape", "aspect"), "no header says its size")
    if any(image.header.tables for image in images):
        kinds["jpeg_tables"] = number_values(image.header.tables for image in images)
    else:
        channels.absent["jpeg_tables"] = "no image is a JPEG"
    if in_tars:
        kinds["shard"] = np.array([image.shard for image in images], np.int64)
        numbers["place_in_shard"] = np.array([image.place for image in images], np.float64)
    else:
        channels.absent |= dict.fromkeys(SHARD_CHANNELS, "not in shards")
    return channels


# ---- how well each tells poisons from the rest


def measure_channels(
    channels: Channels, truth: NDArray[np.bool_], what: str = "poisons"
) -> list[MeasuredChannel]:
    """AUROC of every channel with its interval, worst first.

    A channel separates when its AUROC reaches SEPARATES and the interval at a level corrected for the number of channels
    (Bonferroni) lies above 0.5.

    Args:
        channels: Of N records.
        truth: bool (N,), what the channels are to tell.
        what: `truth` in words.

    Returns:
        One for each channel; none where either half of the records has too few of either side.
    """
    choosing = draws(0, channels.ids, 1, "leaks")[:, 0] < 0.5
    for half in (truth[choosing], truth[~choosing]):
        if min(half.sum(), (~half).sum()) < MIN_RECORDS:
            return []
    scores = {name: orient(v, truth, choosing) for name, v in channels.numbers.items()}
    scores |= {name: rate_kinds(kind, truth, choosing) for name, kind in channels.kinds.items()}
    target, level = truth[~choosing], 1 - 0.05 / max(1, len(scores))
    measured = []
    for name, values in scores.items():
        s = values[~choosing]
        auroc, (low, high) = stats.auroc(s, target), stats.auroc_interval(s, target)
        how = (
            f"{DESCRIPTIONS[name]}, alone; {int(target.sum())} {what} and {int((~target).sum())} others; direction chosen on "
            f"the other half of the records, {stats.AUROC_INTERVAL}"
        )
        separates = auroc >= SEPARATES and stats.auroc_interval(s, target, level)[0] > 0.5
        measured.append(MeasuredChannel(name, Measure(auroc, len(s), low, high, how), separates))
    return sorted(measured, key=lambda channel: (-channel.auroc.value, channel.name))


def orient(
    values: NDArray[np.float64], truth: NDArray[np.bool_], choosing: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Numbers, with the sign by which poisons are higher among the choosing half."""
    return values if stats.auroc(values[choosing], truth[choosing]) >= 0.5 else -values


def rate_kinds(
    kind: NDArray[np.int64], truth: NDArray[np.bool_], choosing: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """How poisoned the kind of each record is in the choosing half, drawn to the overall rate by the weight of one record."""
    code, size = np.unique(kind, return_inverse=True, return_counts=True)[1:]
    # rare kinds count as one: a kind that is hardly seen twice would be judged by whether the choosing half happens to hold it
    code = np.where(size[code] < RARE, len(size), code)
    count = np.bincount(code[choosing], minlength=code.max() + 1)
    poisons = np.bincount(code[choosing], truth[choosing], minlength=code.max() + 1)
    return ((poisons + truth[choosing].mean()) / (count + 1))[code]
