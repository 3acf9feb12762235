"""Feed: the batches of a training, made by threads before they are asked for, of images that the device has no room for."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bezoar.data.decoding import thread_count
from bezoar.data.pairs import Pairs
from bezoar.data.stored_pairs import StoredPairs, submit_reads

AHEAD = 16  # batches made before they are asked for, at most
AHEAD_BYTES = 512 << 20  # pixels of these; but two batches at least
Order = Callable[[int], Tensor]


class Batch(NamedTuple):
    """Rows int64 (B,), their images uint8 (B, 3, S, S), and the tasks that are making them."""

    rows: Tensor
    images: Tensor
    tasks: list[Future[None]]


@dataclass(frozen=True)
class Held:
    """Images in the memory of the host, for a device that has no room for them."""

    images: Tensor

    def empty_images(self, n: int, pinned: bool) -> Tensor:
        """Room for n images, laid out as these are."""
        shape, stride = (n, *self.images.shape[1:]), self.images.stride()
        return torch.empty_strided(shape, stride, dtype=torch.uint8, pin_memory=pinned)

    def fill_images(self, rows: np.ndarray, out: Tensor) -> None:
        """The images of a few rows into `out`."""
        out.copy_(self.images[torch.from_numpy(rows)])


class Prefetcher:
    """What training.fit reads of Pairs: `len(data)` and `data.images[index]`.

    order(epoch) -> int64 (steps, B): the rows that will be asked for, of `epochs` epochs. The first that is asked for may
    be any of these, as when a training is gone on with. Whatever else is asked for is made then, and counted in `late`.
    """

    def __init__(
        self, records: Pairs | StoredPairs, device: torch.device, order: Order, epochs: int
    ) -> None:
        self.records, self.device, self.order, self.epochs = records, device, order, epochs
        self.source = records if isinstance(records, StoredPairs) else Held(records.images)
        self.pool = ThreadPoolExecutor(thread_count())
        self.coming: Iterator[Tensor] | None = None
        self.waiting: deque[Batch] = deque()
        self.asked: tuple[Tensor, int, Tensor] | None = None
        self.drawn = self.late = 0

    def __len__(self) -> int:
        return len(self.records)

    @property
    def images(self) -> Prefetcher:
        """Stands for the tensor of all images."""
        return self

    def __getitem__(self, index: Tensor) -> Tensor:
        """int64 (B,) -> uint8 (B, 3, S, S) on the device."""
        rows = self.on_host(index)
        if self.coming is None:
            self.coming = self.following(rows)
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
            "read from shards" if isinstance(self.records, StoredPairs) else "copied from memory"
        )
        return f"{where} as they were drawn, {self.drawn - self.late} of {self.drawn} batches ahead"

    def start_batch(self, rows: Tensor) -> Batch:
        """Let threads make a batch, in pages that a GPU fetches by itself."""
        images = self.source.empty_images(len(rows), self.device.type == "cuda")
        return Batch(
            rows, images, submit_reads(self.pool, self.source.fill_images, rows.numpy(), images)
        )

    def look_ahead(self, size: int) -> None:
        """Begin what comes next, as far as AHEAD and AHEAD_BYTES allow; size: of a batch."""
        assert self.coming is not None
        most = min(AHEAD, max(2, AHEAD_BYTES // (size * 3 * self.records.size**2)))
        self.waiting.extend(
            self.start_batch(rows)
            for rows in itertools.islice(self.coming, max(0, most - len(self.waiting)))
        )

    def following(self, rows: Tensor) -> Iterator[Tensor]:
        """The batches of the order from the one that holds exactly these rows; none when there is no such."""
        for epoch in range(self.epochs):
            steps = self.order(epoch)
            for at in (steps[:, 0] == rows[0]).nonzero().flatten().tolist():
                if torch.equal(steps[at], rows):
                    later = map(self.order, range(epoch + 1, self.epochs))
                    return itertools.chain(steps[at:], itertools.chain.from_iterable(later))
        return iter(())

    def on_host(self, index: Tensor) -> Tensor:
        """`index.cpu()`, but a GPU is waited for once an epoch and not at each step: training slices one tensor an epoch."""
        whole = index if index._base is None else index._base
        if self.asked is None or self.asked[0] is not whole or self.asked[1] != whole._version:
            self.asked = whole, whole._version, whole.cpu()
        host = self.asked[2]
        at = host.storage_offset() + index.storage_offset() - whole.storage_offset()
        return host.as_strided(index.shape, index.stride(), at)


@contextmanager
def training_data(
    records: Pairs | StoredPairs, device: torch.device, order: Order, epochs: int
) -> Iterator[Any]:
    """What training draws from: the records on the device where it has room for their images twice, else a Feed of them."""
    if isinstance(records, Pairs) and 2 * records.images.nbytes < room(device):
        yield records.to(device)
        return
    feed = Prefetcher(records, device, order, epochs)
    try:
        yield feed
    finally:
        feed.pool.shutdown(cancel_futures=True)


def room(device: torch.device) -> float:
    """Free bytes of a device; what is in memory is there already."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")
