"""Reading images that others wrote: bounded decoding, and a report that names whatever could not be read.

The input is hostile. Every allocation a file can ask for has a bound here, only plain image formats are opened, and
a record that cannot be read is counted and named, never dropped quietly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bezoar import machine
from bezoar.data.files.images import SMALLEST, centred_square, decode_image
from bezoar.data.files.skipped import ReadReport, Skipped, Unreadable
from bezoar.data.pairs import Pairs
from bezoar.errors import UserError

MAX_LABELS = 100_000  # labels lie in 0..LABELS-1
TASK_BYTES = 16 << 20  # encoded images handed to a thread at once
TEMPLATE = "a photo of a {c}"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Record:
    """One image, not decoded yet, and the records made of it: an id each, and a caption each (or none at all)."""

    image: bytes | Path
    ids: tuple[str, ...]
    captions: tuple[str, ...]
    label: int
    file: str
    member: str


def thread_count() -> int:
    """Decoding threads: the cores this process may use, at most 8."""
    return min(8, machine.cores())


def decode_records(
    records: Iterable[Record | Skipped], size: int | None, report: ReadReport
) -> Iterator[tuple[Record, np.ndarray]]:
    """Decode a stream in its own order, in threads, holding a bounded number of images; failures go to the report.

    A UserError of the stream is raised where it stands in the order, after what came before it.
    """

    def attempt(items: list[Record | Skipped]) -> list[tuple[Record, np.ndarray] | Skipped]:
        return [item if isinstance(item, Skipped) else _attempt(item, size) for item in items]

    def finished(
        task: Future[list[tuple[Record, np.ndarray] | Skipped]],
    ) -> Iterator[tuple[Record, np.ndarray]]:
        for result in task.result():
            if isinstance(result, Skipped):
                report.skipped.append(result)
            else:
                yield result

    waiting: deque[Future[list[tuple[Record, np.ndarray] | Skipped]]] = deque()
    count = thread_count()
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
        return record, decode_image(record.image, size)
    except Unreadable as error:
        return Skipped(record.file, record.member, str(error))


def _tasks(records: Iterable[Record | Skipped]) -> Iterator[list[Record | Skipped] | UserError]:
    """Cut a stream into tasks for a thread: small enough to hold, large enough that handing over costs nothing."""
    items: list[Record | Skipped] = []
    held = 0
    try:
        for item in records:
            items.append(item)
            held += (
                len(item.image) if isinstance(item, Record) and isinstance(item.image, bytes) else 0
            )
            if len(items) == 16 or held > TASK_BYTES:
                yield items
                items, held = [], 0
    except UserError as error:
        yield items
        yield error
        return
    yield items


def decode_distinct(
    records: Iterable[Record | Skipped],
    size: int | None,
    report: ReadReport,
    limit: int | None = None,
) -> Iterator[tuple[Record, int, np.ndarray]]:
    """The records that a stream yields: (what was read, which of its ids and captions, its image), `limit` at most.

    What cannot be decoded or has an id seen before goes to the report. With size None all images must be of one size.
    """
    seen: set[str] = set()
    shape: tuple[int, ...] | None = None
    for record, image in decode_records(records, size, report):
        if shape not in (None, image.shape):
            raise UserError(
                f"{record.file}: images differ in size ({shape[1:]}, {image.shape[1:]}); give size="
            )
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


def batch_pairs(
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

    for record, row, image in decode_distinct(records, size, report, limit):
        images.append(image)
        ids.append(record.ids[row])
        captions.extend(record.captions[row : row + 1])
        labels.append(record.label)
        if len(ids) == count:
            yield flush()
    if ids:
        yield flush()


def gather_pairs(
    records: Iterable[Record | Skipped],
    size: int | None,
    what: str,
    classes: Sequence[str] = (),
    limit: int | None = None,
    labelled: bool = False,
) -> Pairs:
    """Every record of a stream in memory. Raises UserError when nothing in `what` can be read."""
    report = ReadReport()
    parts = list(batch_pairs(records, size, 1024, report, classes, limit, labelled))
    if not parts:
        raise UserError(describe_failure(what, report))
    return Pairs.concat(parts)


def describe_failure(what: str, report: ReadReport) -> str:
    """The line to print when a source yields no record: what it was and what stood in the way."""
    first = "; first: " + " ".join(filter(None, report.skipped[0])) if report.skipped else ""
    return f"{what}: no image-caption record could be read; {report}{first}"


def resize(images: Tensor, size: int | None) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, size, size), as `decode` does it: centred square, bicubic, antialiased."""
    height, width = images.shape[-2:]
    if size is None or (height, width) == (size, size):
        return images
    left, upper, right, lower = centred_square(width, height)
    crop = images[..., upper:lower, left:right]
    parts = [
        torch.nn.functional.interpolate(x, (size, size), mode="bicubic", antialias=True)
        for x in crop.split(1024)
    ]
    return torch.cat(parts)


def pairs_from_arrays(
    images: np.ndarray,
    labels: np.ndarray | None,
    ids: Sequence[str],
    classes: Sequence[str],
    template: str,
    size: int | None,
) -> Pairs:
    """Decoded images uint8 (N, 3, H, W) and labels (N,) in -1..C-1 -> Pairs with captions made from the class names."""
    known = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    pixels = resize(torch.from_numpy(np.ascontiguousarray(images)), size)
    names = class_captions(classes, template)
    told = bool(names) and known is not None and bool((known >= 0).all())
    captions = tuple(names[i] for i in known.tolist()) if told and known is not None else ()
    return Pairs(pixels, captions, known, tuple(ids), tuple(classes), ReadReport(len(ids)))


def class_captions(classes: Sequence[str], template: str) -> tuple[str, ...]:
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


def open_torchvision(name: str, root: str, download: bool, make: Callable[[], T]) -> T:
    """Open a data set of torchvision's. Raises UserError that says how to get it when it is missing or damaged."""
    try:
        return make()
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = "the download failed" if download else "download=true fetches it"
        raise UserError(f"{name} could not be read under {root!r} ({reason}); {remedy}") from error
