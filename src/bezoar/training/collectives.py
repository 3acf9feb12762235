"""Distributes one training over several ranks, with the results of a single process.

Each rank holds its rows of the global batch. The mean over ranks of their losses is the global
loss; gradients flow through everything that ranks exchange, and are averaged. Without a process
group everything here is the identity.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

from bezoar.errors import UserError
from bezoar.training import ranks


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) of the process group; (0, 1) without one, and while rank 0 works alone."""
    if not ranks.sharing or not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def local_rows(rows: Tensor) -> Tensor:
    """(steps, B) of the global batches -> (steps, B / world): those of this rank."""
    rank, world = rank_and_world()
    return rows.chunk(world, 1)[rank]


def gather(x: Tensor) -> Tensor:
    """(B, ...) of each rank -> (world B, ...) in the order of ranks, differentiable.

    B must be the same on every rank.
    """
    if rank_and_world()[1] == 1:
        return x
    return torch.cat(all_gather(x))


def average(x: Tensor) -> Tensor:
    """The mean over ranks, not differentiable; the same bits on every rank."""
    world = rank_and_world()[1]
    if world == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world


def check_agreement(*counts: int) -> None:
    """Raise UserError on every rank unless all ranks have the same whole numbers."""
    local = torch.tensor([counts])
    gathered = gather(local)  # (world, number of counts)
    if not (gathered == local).all():
        raise UserError(
            f"the ranks see different records or checkpoints: {gathered.tolist()}; "
            "all need the same files"
        )


class _Normalise(torch.autograd.Function):
    """(y, mean, biased variance) over the rows of all ranks, by torch's own kernels on each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Zeros in place of running statistics; as float32 they ask for float32 results of a
        # bfloat16 x.
        zeros = torch.zeros_like(bias)
        local = torch.stack(torch.batch_norm_update_stats(x, zeros, zeros, 0.0))  # (2, C)
        means, variances = gather(local[None]).unbind(1)  # (world, C) each
        # Of groups of one size the variance is the mean of theirs plus the variance of their means.
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps))
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, None, None, mean, inverse, True, 0.0, [True, True, True]
        )
        # The kernel took this rank's means of dy and of dy (x - mean) for those of all ranks:
        # correct the difference.
        n = x.numel() // x.shape[1]
        sums = torch.stack([dweight, dbias])
        scaled, constant = (sums - average(sums)) * weight * inverse / n  # (C,) each
        scaled *= inverse
        shape = (1, -1, *[1] * (x.ndim - 2))
        dx.addcmul_(x, scaled.view(shape).to(x.dtype))
        dx.add_((constant - scaled * mean).view(shape).to(x.dtype))
        return dx, dweight, dbias, None


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over all ranks' rows, equally many, on CPUs, which SyncBatchNorm refuses."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape and dtype; statistics in float32."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        y: Tensor
        y, mean, variance = _Normalise.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            n = x.numel() // x.shape[1] * rank_and_world()[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions: it replaces BatchNorm1d and BatchNorm3d too."""


def synchronise_norm(norm: nn.Module) -> nn.Module:
    """The same batch norm over all ranks. It shares parameters and statistics with the given one.

    Raises:
        UserError: for norms without affine weights or running statistics, and for other kinds of
        them.
    """
    plain = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not plain or not norm.affine or not norm.track_running_stats or norm.momentum is None:
        raise UserError(
            f"this network's {type(norm).__name__} cannot be trained on several ranks; start one "
            "process"
        )
    if next(norm.parameters()).is_cuda:
        synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
        return synchronised
    shared = copy.copy(norm)
    shared.__class__ = BatchNorm
    return shared


@contextmanager
def distribute(loss: nn.Module) -> Iterator[nn.Module]:
    """Inside, all ranks train the module together, from rank 0's weights.

    Its batch norms are over the rows of all ranks; afterwards they are plain again.
    """
    if rank_and_world()[1] == 1:
        yield loss
        return
    norms = [
        (parent, name, child)
        for parent in list(loss.modules())
        for name, child in parent.named_children()
        if isinstance(child, nn.modules.batchnorm._BatchNorm)
    ]
    try:
        for parent, name, child in norms:
            setattr(parent, name, synchronise_norm(child))
        device = next(loss.parameters()).device
        # static_graph: open_clip's towers hold parameters that no loss uses.
        model = DistributedDataParallel(
            loss, [device.index] if device.type == "cuda" else None, static_graph=True
        )
        model.broadcast_buffers = False  # every rank computes the same statistics
        yield model
    finally:
        for parent, name, child in norms:
            setattr(parent, name, child)
