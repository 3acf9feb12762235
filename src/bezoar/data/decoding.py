"""Decoding of record streams: in threads, in order, with a report of what could not be read."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bezoar import machine
from bezoar.data.distinct_ids import DistinctIds, describe_renaming
from bezoar.data.files.images import decode_image
from bezoar.data.files.paths import printable
from bezoar.data.files.skipped import ReadReport, Skipped, Unreadable
from bezoar.data.pairs import Pairs
from bezoar.errors import UserError

TASK_BYTES = 16 << 20  # encoded images handed to a thread at once, and decoded by it
FREE_BYTES = 512 << 20  # that images kept as they are may unpack to, however small they are
MAX_RATIO = 100  # how many times their encoded size they may unpack to beyond that
HELD_BYTES = 256 << 20  # of decoded images that wait for their turn
TASK_RECORDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One image that is not decoded yet, and the records made of it.

    Attributes:
        image: the encoded image, or its file.
        ids: an id a record.
        captions: a caption a record, or none at all.
        label: -1 if it is not known.
        file: the file that the record was read from.
        member: the member or row in it; empty if it is the file itself.
        url: where the image came from, if that is known.
        origin: who or what it came from (a domain, an uploader), if that is known.
        shard: number of the file in the source.
        offset: what finds the record again in that file: the byte at which the image begins, or its
            row.
        length: bytes of the encoded image in that file; 0 if the image is a file of its own.
    """

    image: bytes | Path
    ids: tuple[str, ...]
    captions: tuple[str, ...] = ()
    label: int = -1
    file: str = ""
    member: str = ""
    url: str = ""
    origin: str = ""
    shard: int = 0
    offset: int = 0
    length: int = 0


Decoded = tuple[Record, np.ndarray]  # the image is uint8 (3, H, W)
TaskResult = tuple[list[Decoded | Skipped], list[Record | Skipped]]  # what is done, what is left


def thread_count() -> int:
    """Return how many threads decode: the cores that this process may use, at most 8."""
    return min(8, machine.cores())


def decode_records(
    records: Iterable[Record | Skipped], size: int | None, report: ReadReport
) -> Iterator[Decoded]:
    """Decode a stream in its own order, in threads, holding a bounded number of images.

    Args:
        records: what is read; a UserError that it raises is raised here after the records before
            it.
        size: pixels a side, see `decode_image`.
        report: takes what could not be read.
    """
    waiting: deque[Future[TaskResult]] = deque()
    count = thread_count()
    # Images that are kept as they are may be of any size, which the first ones tell.
    most = 1 if size is None else 2 * count

    def finish_first() -> Iterator[Decoded]:
        nonlocal most
        results, rest = waiting.popleft().result()
        if rest:
            waiting.appendleft(pool.submit(_decode_task, rest, size))
        nbytes = sum(r[1].nbytes for r in results if not isinstance(r, Skipped))
        most = max(1, min(2 * count, HELD_BYTES // max(1, nbytes)))
        for result in results:
            if isinstance(result, Skipped):
                report.leave_out(result)
            else:
                yield result

    with ThreadPoolExecutor(count) as pool:
        try:
            for task in _cut_tasks(records):
                if isinstance(task, UserError):
                    while waiting:
                        yield from finish_first()
                    raise task
                waiting.append(pool.submit(_decode_task, task, size))
                while len(waiting) > most:
                    yield from finish_first()
            while waiting:
                yield from finish_first()
        finally:
            for future in waiting:
                future.cancel()


def _decode_task(items: list[Record | Skipped], size: int | None) -> TaskResult:
    """Decode some records; return what came of them, and those left when they fill the task."""
    results: list[Decoded | Skipped] = []
    nbytes = 0
    for number, item in enumerate(items, 1):
        result = item if isinstance(item, Skipped) else _decode(item, size)
        results.append(result)
        nbytes += 0 if isinstance(result, Skipped) else result[1].nbytes
        if nbytes > TASK_BYTES:
            return results, items[number:]
    return results, []


def _decode(record: Record, size: int | None) -> Decoded | Skipped:
    try:
        return record, decode_image(record.image, size)
    except Unreadable as error:
        return Skipped(record.file, record.member, str(error))


def _cut_tasks(records: Iterable[Record | Skipped]) -> Iterator[list[Record | Skipped] | UserError]:
    """Cut a stream into tasks for threads, large enough that handing them over costs nothing."""
    items: list[Record | Skipped] = []
    nbytes = 0
    try:
        for item in records:
            items.append(item)
            if isinstance(item, Record) and isinstance(item.image, bytes):
                nbytes += len(item.image)
            if len(items) == TASK_RECORDS or nbytes > TASK_BYTES:
                yield items
                items = []
                nbytes = 0
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
    """Decode the records of a stream, and give those whose id another has one of their own.

    Args:
        size: pixels a side; None keeps images as they are, and then all must be of one size.
        report: counts what was read, and takes what could not be decoded and what was renamed.
        limit: how many records to stop after.

    Yields:
        What was read, which of its ids and captions this is, and the image uint8 (3, H, W).
    """
    distinct = DistinctIds()
    shape: tuple[int, ...] | None = None
    encoded = decoded = 0  # bytes
    for record, image in decode_records(records, size, report):
        if shape not in (None, image.shape):
            raise UserError(
                f"{record.file}: images differ in size ({shape[1:]}, {image.shape[1:]}); give size="
            )
        shape = image.shape
        if size is None:
            encoded += encoded_bytes(record)
            decoded += image.nbytes
            if decoded > max(FREE_BYTES, MAX_RATIO * encoded):
                raise UserError(
                    f"{record.file}: images of {encoded} bytes unpack to {decoded}; give size="
                )
        ids = tuple(map(distinct.claim, record.ids))
        for number, (key, new) in enumerate(zip(record.ids, ids, strict=True)):
            if new != key:
                reason = describe_renaming(key, new)
                report.rename(Skipped(record.file, record.member, reason))
                record = replace(record, ids=ids)
            report.read += 1
            yield record, number, image
            if report.read == limit:
                return


def encoded_bytes(record: Record) -> int:
    """Bytes of an encoded image."""
    return len(record.image) if isinstance(record.image, bytes) else os.path.getsize(record.image)


def batch_pairs(
    records: Iterable[Record | Skipped],
    size: int | None,
    count: int,
    report: ReadReport,
    classes: Sequence[str] = (),
    limit: int | None = None,
    labelled: bool = False,
) -> Iterator[Pairs]:
    """Decode a stream of records into Pairs of `count` each; the last may be smaller.

    Args:
        records, size, report, limit: see `decode_distinct`. Every batch carries the one report,
            which grows.
        classes: names of the classes.
        labelled: whether there are labels (-1 where they are not known) though no class has a name.
    """
    images: list[np.ndarray] = []
    ids: list[str] = []
    captions: list[str] = []
    labels: list[int] = []

    def flush() -> Pairs:
        batch = Pairs(
            images=torch.from_numpy(np.stack(images)),
            captions=tuple(captions),
            labels=torch.tensor(labels) if classes or labelled else None,
            ids=tuple(ids),
            classes=tuple(classes),
            report=report,
        )
        for column in (images, ids, captions, labels):
            column.clear()
        return batch

    for record, number, image in decode_distinct(records, size, report, limit):
        images.append(image)
        ids.append(record.ids[number])
        captions.extend(record.captions[number : number + 1])
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
    """Decode a whole stream into memory, see `batch_pairs`.

    Raises UserError if nothing in `what` can be read.
    """
    report = ReadReport()
    parts = list(batch_pairs(records, size, 1024, report, classes, limit, labelled))
    if not parts:
        raise UserError(describe_failure(what, report))
    return Pairs.concat(parts)


def describe_failure(what: str, report: ReadReport) -> str:
    """The line to print when a source yields no record: what it was and what stood in the way."""
    first = ""
    if report.skipped:
        first = "; first: " + printable(" ".join(filter(None, report.skipped[0])))
    return f"{what}: no image-caption record could be read; {report}{first}"
