"""The ranks of a torchrun job: rank 0 runs the verbs and sends the others orders.

Rank 0 does everything: it reads the command line, runs verbs, holds locks and writes. Where it
comes to work that all ranks share (`joint` verbs), it sends them an order to do their part; between
orders they wait. All see the same files.
"""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bezoar.errors import UserError
from bezoar.machine import torchrun_variable

# Ranks wait for as long as rank 0 works alone; torchrun ends all of them when one fails.
TIMEOUT = timedelta(days=7)

Order = dict[str, Any] | None  # None lets the ranks go

sharing = True  # False while rank 0 works alone: a training then must not wait for the others


def join() -> None:
    """Join the other ranks' process group: gloo for tensors on the CPU, nccl for those on GPUs."""
    # Optimisers import this later; the process group would then never end.
    import torch._dynamo

    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(torchrun_variable("LOCAL_RANK", 0) % gpus)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)


@contextmanager
def share_work(order: Order) -> Iterator[None]:
    """Inside, rank 0 does work that the others do by this order too; with None it works alone."""
    global sharing
    before, sharing = sharing, order is not None
    if order is not None:
        broadcast(order)
    try:
        yield
    finally:
        sharing = before


def broadcast(order: Order) -> None:
    """Send rank 0's order to the ranks that wait in `receive`, if there are any."""
    if not dist.is_initialized():
        return
    message = torch.frombuffer(bytearray(json.dumps(order).encode()), dtype=torch.uint8)
    dist.broadcast(torch.tensor([len(message)]), 0)
    dist.broadcast(message, 0)
    if order is None:
        _leave()


def receive() -> Any:
    """Wait for rank 0's next order. Raises UserError if rank 0 has ended, after its own message."""
    size = torch.zeros(1, dtype=torch.long)
    try:
        dist.broadcast(size, 0)
    except RuntimeError as error:
        raise UserError("rank 0 has ended") from error
    message = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(message, 0)
    order = json.loads(message.numpy().tobytes())
    if order is None:
        _leave()
    return order


def _leave() -> None:
    """End the process group and its threads, which abort a process that ends before them."""
    dist.destroy_process_group()
    gc.collect()
