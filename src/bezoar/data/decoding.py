"""Reading images that others wrote: bounded decoding, and a report that names whatever could not be read.

The input is hostile. Every allocation a file can ask for has a bound here, only plain image formats are opened, and
a record that cannot be read is counted and named, never dropped quietly.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bezoar.training import ranks
from bezoar.errors import UserError
from bezoar.data.pairs import Pairs

FILE_BYTES = 64 << 20  # one encoded image
TEXT_BYTES = 4 << 20  # one caption or one metadata object
IMAGE_PIXELS = 64_000_000  # one decoded image
SMALLEST = 8  # pixels a side; img2dataset and dead links leave 1x1 images behind
LABELS = 100_000  # labels lie in 0..LABELS-1
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm"})
TASK_BYTES = 16 << 20  # encoded images handed to a thread at once
TEMPLATE = "a photo of a {c}"
T = TypeVar("T")
# What Pillow's decoders raise when they are given bytes that are not what they claim to be.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, OverflowError, IndexError, KeyError,
          TypeError, MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning)  # fmt: skip


class Unreadable(Exception):
    """One image cannot be used; the text says why. Never leaves this program: it becomes a Skipped."""


class Skipped(NamedTuple):
    """Something that could not be read: the file, the member or row in it ("" = the file itself), and why."""

    file: str
    member: str
    reason: str


@dataclass
class ReadReport:
    """How a source was read: how many records, and everything that was not. Grows while the source streams."""

    read: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    def __str__(self) -> str:
        """One line: `998 read, 2 skipped (1 no caption, 1 not decodable)`."""
        reasons = Counter(s.reason.partition(":")[0] for s in self.skipped)
        why = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        return f"{self.read} read, {len(self.skipped)} skipped" + (f" ({why})" if why else "")

    def merged(self, others: Iterable[ReadReport]) -> ReadReport:
        """The sum of several reports."""
        every = [self, *others]
        return ReadReport(sum(r.read for r in every), [s for r in every for s in r.skipped])


@dataclass(frozen=True, slots=True)
class Record:
    """One image, not decoded yet, and the records made of it: an id each, and a caption each (or none at all)."""

    image: bytes | Path
    ids: tuple[str, ...]
    captions: tuple[str, ...]
    label: int
    file: str
    member: str


def decode(image: bytes | Path, size: int | None) -> np.ndarray:
    """An encoded image -> uint8 (3, size, size), or (3, h, w) as it is when size is None. Raises Unreadable.

    The largest centred square, resized bicubically (antialiased): the shorter side becomes `size`, the longer is cut
    at both ends. A JPEG at least twice as large is scaled down by 2, 4 or 8 while it is decoded (`draft`).
    """
    try:
        content = image if isinstance(image, bytes) else file_bytes(image)
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > IMAGE_PIXELS:
                raise Unreadable(f"too many pixels: {width}x{height}")
            if min(width, height) < SMALLEST:
                raise Unreadable(f"smaller than {SMALLEST} pixels a side: {width}x{height}")
            if size is not None:
                opened.draft("RGB", (size, size))
            picture = opened.convert("RGB")
            if size is not None and picture.size != (size, size):
                picture = picture.crop(square(*picture.size)).resize((size, size), Image.Resampling.BICUBIC)
    except UnidentifiedImageError as error:  # whose own words hold an address in memory
        raise Unreadable("not decodable: no image format that is known") from error
    except BROKEN as error:
        raise Unreadable(f"not decodable: {' '.join(str(error).split())[:200] or type(error).__name__}") from error
    return np.asarray(picture).transpose(2, 0, 1)


def square(width: int, height: int) -> tuple[int, int, int, int]:
    """The largest centred square, as Pillow's box (left, upper, right, lower)."""
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def file_bytes(path: Path, limit: int = FILE_BYTES) -> bytes:
    """A regular file's content, at most `limit` bytes. Raises Unreadable; never waits on a pipe or reads a device."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise Unreadable("not a regular file")
        if found.st_size > limit:
            raise Unreadable(f"too large: {found.st_size} bytes")
        with path.open("rb") as file:
            return file.read(limit)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise Unreadable(f"no such file: {getattr(error, 'strerror', None) or error}") from error


def existing(path: str, what: str) -> Path:
    """The path of a file that is there. Raises UserError."""
    found = Path(path).expanduser()
    if not os.path.isfile(found):
        raise UserError(f"no {what} {path!r}")
    return found


def existing_folder(path: str, what: str) -> Path:
    """The path of a folder that is there. Raises UserError."""
    found = Path(path).expanduser()
    if not os.path.isdir(found):
        raise UserError(f"no {what} {path!r}")
    return found


def confined(text: str) -> bool:
    """Whether a relative path stays inside the folder it is relative to (by its text; links are the user's own)."""
    depth = 0
    for part in PurePosixPath(text.replace("\\", "/")).parts:
        depth += -1 if part == ".." else 0 if part == "." else 1
        if depth < 0 or part == "/":
            return False
    return depth > 0


def told_apart(paths: Sequence[Path]) -> tuple[str, ...]:
    """What each file is called in ids: as few trailing parts of its path as tell all of them apart, less its ending where that
    is not all that does."""
    whole = [p.absolute() for p in paths]
    for ended in ([p.with_suffix("") for p in whole], whole):
        parts = [tuple(map(written, p.parts)) for p in ended]
        for depth in range(1, max(map(len, parts)) + 1):
            stems = tuple("/".join(p[-depth:]) for p in parts)
            if len(set(stems)) == len(stems):
                return stems
    twice = Counter(whole).most_common(1)[0][0]
    raise UserError(f"a file is named twice among {len(paths)}, such as {twice}")


def written(name: str) -> str:
    """A file's name as text that can be written: bytes that are not UTF-8 are spelt out."""
    return name.encode(errors="backslashreplace").decode()


def threads() -> int:
    """Decoding threads: the cores this process may use, at most 8."""
    return min(8, ranks.cores())


def decoded(records: Iterable[Record | Skipped], size: int | None, report: ReadReport) -> Iterator[tuple[Record, np.ndarray]]:
    """Decode a stream in its own order, in threads, holding a bounded number of images; failures go to the report.

    A UserError of the stream is raised where it stands in the order, after what came before it.
    """

    def attempt(items: list[Record | Skipped]) -> list[tuple[Record, np.ndarray] | Skipped]:
        return [item if isinstance(item, Skipped) else _attempt(item, size) for item in items]

    def finished(task: Future[list[tuple[Record, np.ndarray] | Skipped]]) -> Iterator[tuple[Record, np.ndarray]]:
        for result in task.result():
            if isinstance(result, Skipped):
                report.skipped.append(result)
            else:
                yield result

    waiting: deque[Future[list[tuple[Record, np.ndarray] | Skipped]]] = deque()
    count = threads()
    with ThreadPoolExecutor(count) as pool:
        try:
            for items in _tasks(records):
                if isinstance(items, UserError):
                    while waiting:
                        yield from finished(waiting.popleft())
                    raise items
                waiting.append(pool.submit(attempt, items))
                if len(waiting) > 2 * count:
                    yield from finished(waiting.popleft())
            while waiting:
                yield from finished(waiting.popleft())
        finally:
            for task in waiting:
                task.cancel()


def _attempt(record: Record, size: int | None) -> tuple[Record, np.ndarray] | Skipped:
    try:
        return record, decode(record.image, size)
    except Unreadable as error:
        return Skipped(record.file, record.member, str(error))


def _tasks(records: Iterable[Record | Skipped]) -> Iterator[list[Record | Skipped] | UserError]:
    """Cut a stream into tasks for a thread: small enough to hold, large enough that handing over costs nothing."""
    items: list[Record | Skipped] = []
    held = 0
    try:
        for item in records:
            items.append(item)
            held += len(item.image) if isinstance(item, Record) and isinstance(item.image, bytes) else 0
            if len(items) == 16 or held > TASK_BYTES:
                yield items
                items, held = [], 0
    except UserError as error:
        yield items
        yield error
        return
    yield items


def kept(
    records: Iterable[Record | Skipped], size: int | None, report: ReadReport, limit: int | None = None
) -> Iterator[tuple[Record, int, np.ndarray]]:
    """The records that a stream yields: (what was read, which of its ids and captions, its image), `limit` at most.

    What cannot be decoded or has an id seen before goes to the report. With size None all images must be of one size.
    """
    seen: set[str] = set()
    shape: tuple[int, ...] | None = None
    for record, image in decoded(records, size, report):
        if shape not in (None, image.shape):
            raise UserError(f"{record.file}: images differ in size ({shape[1:]}, {image.shape[1:]}); give size=")
        shape = image.shape
        for row, key in enumerate(record.ids):
            if key in seen:
                report.skipped.append(Skipped(record.file, record.member, f"duplicate id: {key}"))
                continue
            seen.add(key)
            report.read += 1
            yield record, row, image
            if report.read == limit:
                return


def batches(
    records: Iterable[Record | Skipped],
    size: int | None,
    count: int,
    report: ReadReport,
    classes: Sequence[str] = (),
    limit: int | None = None,
    labelled: bool = False,
) -> Iterator[Pairs]:
    """A stream of records -> Pairs of `count` each (the last may be smaller), at most `limit` records in all.

    There are labels (-1 = unknown) when there are classes or `labelled`; an id seen before is skipped. Every batch
    carries the one `report`, which grows. With size None all images must be of one size.
    """
    images: list[np.ndarray] = []
    ids: list[str] = []
    captions: list[str] = []
    labels: list[int] = []

    def flush() -> Pairs:
        pixels = torch.from_numpy(np.stack(images))
        known = torch.tensor(labels) if classes or labelled else None
        batch = Pairs(pixels, tuple(captions), known, tuple(ids), tuple(classes), report)
        for column in (images, ids, captions, labels):
            column.clear()
        return batch

    for record, row, image in kept(records, size, report, limit):
        images.append(image)
        ids.append(record.ids[row])
        captions.extend(record.captions[row : row + 1])
        labels.append(record.label)
        if len(ids) == count:
            yield flush()
    if ids:
        yield flush()


def gather(
    records: Iterable[Record | Skipped],
    size: int | None,
    what: str,
    classes: Sequence[str] = (),
    limit: int | None = None,
    labelled: bool = False,
) -> Pairs:
    """Every record of a stream in memory. Raises UserError when nothing in `what` can be read."""
    report = ReadReport()
    parts = list(batches(records, size, 1024, report, classes, limit, labelled))
    if not parts:
        raise UserError(nothing(what, report))
    return Pairs.concat(parts)


def nothing(what: str, report: ReadReport) -> str:
    """The line to print when a source yields no record: what it was and what stood in the way."""
    first = "; first: " + " ".join(filter(None, report.skipped[0])) if report.skipped else ""
    return f"{what}: no image-caption record could be read; {report}{first}"


def resized(images: Tensor, size: int | None) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, size, size), as `decode` does it: centred square, bicubic, antialiased."""
    height, width = images.shape[-2:]
    if size is None or (height, width) == (size, size):
        return images
    left, upper, right, lower = square(width, height)
    crop = images[..., upper:lower, left:right]
    parts = [torch.nn.functional.interpolate(x, (size, size), mode="bicubic", antialias=True) for x in crop.split(1024)]
    return torch.cat(parts)


def array_pairs(
    images: np.ndarray,
    labels: np.ndarray | None,
    ids: Sequence[str],
    classes: Sequence[str],
    template: str,
    size: int | None,
) -> Pairs:
    """Decoded images uint8 (N, 3, H, W) and labels (N,) in -1..C-1 -> Pairs with captions made from the class names."""
    known = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    pixels = resized(torch.from_numpy(np.ascontiguousarray(images)), size)
    names = phrases(classes, template)
    told = bool(names) and known is not None and bool((known >= 0).all())
    captions = tuple(names[i] for i in known.tolist()) if told and known is not None else ()
    return Pairs(pixels, captions, known, tuple(ids), tuple(classes), ReadReport(len(ids)))


def phrases(classes: Sequence[str], template: str) -> tuple[str, ...]:
    """A caption for each class: `{c}` in the template becomes the name, its underscores spaces."""
    return tuple(template.replace("{c}", name.replace("_", " ")) for name in classes)


def check_fields(size: int | None, limit: int | None, template: str = TEMPLATE) -> None:
    """What every data method asks of these fields. Raises ValueError."""
    if size is not None and not SMALLEST <= size <= 4096:
        raise ValueError(f"size must lie in {SMALLEST}..4096; got {size}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    if "{c}" not in template:
        raise ValueError(f"template must hold {{c}}, the place of the class name; got {template!r}")


def fetched(name: str, root: str, download: bool, make: Callable[[], T]) -> T:
    """Open a data set of torchvision's. Raises UserError that says how to get it when it is missing or damaged."""
    try:
        return make()
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = "the download failed" if download else "download=true fetches it"
        raise UserError(f"{name} could not be read under {root!r} ({reason}); {remedy}") from error
