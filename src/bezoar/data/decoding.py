"""Decodes record streams in threads and in order, and reports unreadable records."""

import itertools
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
FREE_BYTES = 512 << 20  # images kept at their size may always unpack to this much
MAX_RATIO = 100  # how many times their encoded size they may unpack to beyond that
HELD_BYTES = 256 << 20  # of decoded images that wait for their turn
TASK_RECORDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """An image that is not decoded yet, and its records."""

    image: bytes | Path  # the encoded image, or its file
    ids: tuple[str, ...]  # an id for each record
    captions: tuple[str, ...] = ()  # a caption for each record, or none at all
    label: int = -1  # -1 if unknown
    file: str = ""  # the file that the record was read from
    member: str = ""  # the member or row in it; empty if it is the file itself
    url: str = ""  # the image's URL, if known
    origin: str = ""  # its source (a domain, an uploader), if known
    shard: int = 0  # number of the file in the source
    offset: int = 0  # the place of the record in that file: the first byte of the image, or the row
    length: int = 0  # bytes of the encoded image in that file; 0 if the image is a separate file


Decoded = tuple[Record, np.ndarray]  # the image is uint8 (3, H, W)
TaskResult = tuple[list[Decoded | Skipped], list[Record | Skipped]]  # what is done, what is left


def thread_count() -> int:
    """The number of decoding threads: the cores that this process may use, at most 8."""
    return min(8, machine.cores())


def decode_records(
    records: Iterable[Record | Skipped], size: int | None, report: ReadReport
) -> Iterator[Decoded]:
    """Decode a stream in its order, in threads, holding a bounded number of images.

    Args:
        records: the stream. Its UserError is raised after the records before it.
        size: pixels a side, see `decode_image`.
        report: receives unreadable records.
    """
    waiting: deque[Future[TaskResult]] = deque()
    count = thread_count()
    # The size of images that are not resized is that of the first ones.
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
    """Decode some records; return the results, and the records left over when the task is full."""
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
    """Split a stream into tasks for threads, large enough to make the overhead negligible."""
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
    """Decode the records of a stream, and make their ids unique.

    Args:
        records: the stream.
        size: pixels a side; None keeps images unchanged, and then all must have one size.
        report: counts records, and receives unreadable and renamed ones.
        limit: number of records to stop after.

    Yields:
        The record, the number of its id and caption, and the image uint8 (3, H, W).
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
            image_file = record.image
            encoded += (
                len(image_file) if isinstance(image_file, bytes) else image_file.stat().st_size
            )
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
        labelled: whether there are labels (-1 where they are unknown) though no class has a name.
    """
    entries = (
        (image, record.ids[number], record.captions[number : number + 1], record.label)
        for record, number, image in decode_distinct(records, size, report, limit)
    )

    def take_batch() -> Pairs | None:
        # A function, so that no single image is held while the batch is used.
        columns = list(zip(*itertools.islice(entries, count), strict=True))
        if not columns:
            return None
        images, ids, captions, labels = columns
        return Pairs(
            images=torch.from_numpy(np.stack(images)),
            captions=tuple(itertools.chain.from_iterable(captions)),
            labels=torch.tensor(labels) if classes or labelled else None,
            ids=ids,
            classes=tuple(classes),
            report=report,
        )

    yield from iter(take_batch, None)


def gather_pairs(
    records: Iterable[Record | Skipped],
    size: int | None,
    what: str,
    classes: Sequence[str] = (),
    limit: int | None = None,
    labelled: bool = False,
) -> Pairs:
    """Decode a whole stream into memory, see `batch_pairs`.

    Raises UserError if no record of `what` can be read.
    """
    report = ReadReport()
    parts = list(batch_pairs(records, size, 1024, report, classes, limit, labelled))
    if not parts:
        raise UserError(describe_failure(what, report))
    return Pairs.concat(parts)


def describe_failure(what: str, report: ReadReport) -> str:
    """The message for a source without any record: its name and the obstacles."""
    first = ""
    if report.skipped:
        first = "; first: " + printable(" ".join(filter(None, report.skipped[0])))
    return f"{what}: no image-caption record could be read; {report}{first}"
