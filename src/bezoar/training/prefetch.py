"""Prepares batches in threads ahead of training, for data sets larger than the device's memory."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from bezoar.data.decoding import thread_count
from bezoar.data.pairs import Pairs
from bezoar.data.stored_pairs import TASK_IMAGES, StoredPairs, submit_reads

AHEAD = 16  # batches made before they are asked for, at most
AHEAD_BYTES = 512 << 20  # pixels of these; but two batches at least
Order = Callable[[int], Tensor]


class Batch(NamedTuple):
    """A batch in the making: rows int64 (B,), room for images uint8 (B, 3, S, S), and tasks."""

    rows: Tensor
    images: Tensor
    tasks: list[Future[None]]


class Prefetcher:
    """The part of Pairs that training reads: `len(data)` and `data.images[index]`.

    order: epoch -> int64 (steps, B), the rows of each batch. The first batch may be anywhere in it,
    as in a resumed training. Any other request is served at once, and counted in `late`.
    """

    def __init__(
        self, records: Pairs | StoredPairs, device: torch.device, order: Order, epochs: int
    ) -> None:
        self.records = records
        self.device = device
        self.order = order
        self.epochs = epochs
        self.pool = ThreadPoolExecutor(thread_count())
        self.upcoming: Iterator[Tensor] | None = None  # rows of the batches not begun yet
        self.waiting: deque[Batch] = deque()
        self.host_copy: tuple[Tensor, int, Tensor] | None = None  # a tensor, its version, its copy
        self.drawn = 0
        self.late = 0

    def __len__(self) -> int:
        return len(self.records)

    @property
    def images(self) -> Prefetcher:
        """Takes the place of the tensor of all images."""
        return self

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the images at rows int64 (B,): uint8 (B, 3, S, S) on the device."""
        rows = self.to_host(index)
        if self.upcoming is None:
            self.upcoming = self.find_following(rows)
            self.look_ahead(len(rows))
        if self.waiting and torch.equal(self.waiting[0].rows, rows):
            batch = self.waiting.popleft()
            self.look_ahead(len(rows))
        else:
            batch = self.start_batch(rows)
            self.late += 1
        self.drawn += 1
        for task in batch.tasks:
            task.result()
        return batch.images.to(self.device, non_blocking=True)

    def describe(self) -> str:
        """For the manifest: where the images came from, and how many batches were made ahead."""
        where = (
            self.records.where if isinstance(self.records, StoredPairs) else "copied from memory"
        )
        return (
            f"{where} as they were asked for, {self.drawn - self.late} of {self.drawn} batches "
            "ahead"
        )

    def start_batch(self, rows: Tensor) -> Batch:
        """Let threads make a batch, in pinned memory for a GPU."""
        images = self.records.empty_images(len(rows), pinned=self.device.type == "cuda")
        at_once = getattr(self.records, "task_images", TASK_IMAGES)
        tasks = submit_reads(self.pool, self.records.fill_images, rows.numpy(), images, at_once)
        return Batch(rows, images, tasks)

    def look_ahead(self, batch_size: int) -> None:
        """Start the batches that come next, as far as AHEAD and AHEAD_BYTES allow."""
        assert self.upcoming is not None
        nbytes = batch_size * 3 * self.records.size**2
        most = min(AHEAD, max(2, AHEAD_BYTES // nbytes))
        for rows in itertools.islice(self.upcoming, max(0, most - len(self.waiting))):
            self.waiting.append(self.start_batch(rows))

    def find_following(self, rows: Tensor) -> Iterator[Tensor]:
        """Return the batches of the order from the one that holds exactly these rows on, if any."""
        for epoch in range(self.epochs):
            steps = self.order(epoch)
            for at in (steps[:, 0] == rows[0]).nonzero().flatten().tolist():
                if torch.equal(steps[at], rows):
                    later = map(self.order, range(epoch + 1, self.epochs))
                    return itertools.chain(steps[at:], itertools.chain.from_iterable(later))
        return iter(())

    def to_host(self, index: Tensor) -> Tensor:
        """Return `index.cpu()`, but wait for a GPU once an epoch and not at each step.

        Training slices one tensor an epoch, so the whole tensor is copied once and sliced here in
        the same way.
        """
        whole = index if index._base is None else index._base
        if (
            self.host_copy is None
            or self.host_copy[0] is not whole
            or self.host_copy[1] != whole._version
        ):
            self.host_copy = whole, whole._version, whole.cpu()
        host = self.host_copy[2]
        offset = host.storage_offset() + index.storage_offset() - whole.storage_offset()
        return host.as_strided(index.shape, index.stride(), offset)


@contextmanager
def training_data(
    records: Pairs | StoredPairs, device: torch.device, order: Order, epochs: int
) -> Iterator[Pairs | Prefetcher]:
    """The records on the device, if it has room for the images twice; else a Prefetcher."""
    if isinstance(records, Pairs) and 2 * records.images.nbytes < free_bytes(device):
        yield records.to(device)
        return
    prefetcher = Prefetcher(records, device, order, epochs)
    try:
        yield prefetcher
    finally:
        prefetcher.pool.shutdown(cancel_futures=True)


def free_bytes(device: torch.device) -> float:
    """Free bytes of a GPU; infinite of the CPU, in whose memory the records are already."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")
