"""Which of torchrun's processes this one is, and what rank 0 tells the others. Imports no torch until it is needed.

Rank 0 does everything: it reads the command line, runs verbs, holds locks and writes. Where it comes to work that all
ranks share (`joint` verbs), it tells the others what to do; between such orders they wait. All see the same files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from bezoar.errors import UserError
from bezoar.machine import torchrun_variable

PATIENCE = timedelta(
    days=7
)  # ranks wait for as long as rank 0 works alone; torchrun ends all when one ends badly

sharing = True  # False while rank 0 works alone: a training then must not wait for the others


def join() -> None:
    """Meet the other ranks: gloo for tensors on the CPU, nccl for those on GPUs."""
    import torch
    import torch._dynamo  # imported later, as optimisers do, it would keep the process group from ever ending
    import torch.distributed as dist

    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(torchrun_variable("LOCAL_RANK", 0) % gpus)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)


@contextmanager
def share_work(order: dict | None) -> Iterator[None]:
    """Rank 0's work that the others do by this order meanwhile; None: that rank 0 does alone."""
    global sharing
    before, sharing = sharing, order is not None
    if order is not None:
        broadcast(order)
    try:
        yield
    finally:
        sharing = before


def broadcast(order: dict | None) -> None:
    """Rank 0's word to the ranks that wait in `hear`; None lets them go. A process on its own tells nobody."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    text = torch.frombuffer(bytearray(json.dumps(order).encode()), dtype=torch.uint8)
    dist.broadcast(torch.tensor([len(text)]), 0)
    dist.broadcast(text, 0)
    if order is None:
        _leave()


def receive() -> Any:
    """Wait for rank 0's next order. Raises UserError when rank 0 ended without a word: it has said why."""
    import torch
    import torch.distributed as dist

    size = torch.zeros(1, dtype=torch.long)
    try:
        dist.broadcast(size, 0)
    except RuntimeError as error:
        raise UserError("rank 0 has ended") from error
    text = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(text, 0)
    order = json.loads(text.numpy().tobytes())
    if order is None:
        _leave()
    return order


def _leave() -> None:
    """End the process group, with what a training left of it: gloo's threads abort a process that ends before them."""
    import gc

    import torch.distributed as dist

    dist.destroy_process_group()
    gc.collect()
