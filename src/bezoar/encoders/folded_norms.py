"""Frozen: an image tower whose batch norms rest. Its rows do not see one another, so they can be computed in pieces whose
gradients add, and a norm behind a convolution is a fixed affine map that the convolution's weights take in.

With the norm's scale s = weight / sqrt(variance + eps), norm(conv(x, W, b)) = conv(x, s W, s (b - mean) + bias). The tower
keeps W, which is what is saved and what weight decay acts on. A fast copy computes with s W, and the gradient of W is s
times the gradient of s W: nothing is approximated.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bezoar.errors import UserError

CHUNKS = {
    "cpu": (64, 32),
    "cuda": (128, 224),
}  # images of so many pixels a side that are computed at once
FEWEST = 8  # however large they are
BatchNorm = nn.modules.batchnorm._BatchNorm


class Known(torch.autograd.Function):
    """A value whose gradients have been computed already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: Sequence[Tensor], *weights: Tensor) -> Tensor:
        """value: a scalar. grads: its gradients by `weights`."""
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        """These gradients, times that of the value."""
        return None, None, *(above[0] * g for g in ctx.grads)


@dataclass(frozen=True)
class Weight:
    """The fast copy's weight, `own` = scale * source + shift (1 and 0 where these are None)."""

    source: nn.Parameter
    own: nn.Parameter
    scale: Tensor | None = None
    shift: Tensor | None = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the source's value; forget the gradient."""
        if self.scale is None:
            self.own.copy_(self.source)
        else:
            torch.mul(self.source, self.scale, out=self.own.data)
        if self.shift is not None:
            self.own.add_(self.shift)
        self.own.grad = None

    def gradient(self) -> Tensor:
        """That of the source, laid out in memory as it is."""
        assert self.own.grad is not None
        out = torch.empty_like(self.source)
        return (
            out.copy_(self.own.grad)
            if self.scale is None
            else torch.mul(self.own.grad, self.scale, out=out)
        )


class FoldedTower:
    """The fast form of a tower: call it with normalised float (B, 3, S, S) -> (B, D), after `refresh` if weights changed.

    The tower is put to rest: no dropout, batch norms (statistics and affine) frozen, and no gradient for weights that have
    no bearing on its output.
    """

    def __init__(self, tower: nn.Module, size: int) -> None:
        """size: pixels a side of the tower's input. Raises UserError for a tower whose rows see one another."""
        for name, norm in tower.named_modules():
            if isinstance(norm, BatchNorm) and norm.running_mean is None:
                raise UserError(
                    f"batch norm {name!r} keeps no statistics: without a batch this encoder has no output"
                )
        reached, folds = read_graph(tower.eval(), size)
        for p in tower.parameters():
            p.requires_grad_(id(p) in reached)
        for module in tower.modules():
            if isinstance(module, BatchNorm):
                module.requires_grad_(False)
        self.folds = folds
        self.fast = copy.deepcopy(tower).to(memory_format=torch.channels_last)
        self.weights: list[Weight] = []
        for conv, norm in folds:
            self.weights += self.fold(
                tower.get_submodule(conv), tower.get_submodule(norm), conv, norm
            )
        taken, own = {id(w.source) for w in self.weights}, dict(self.fast.named_parameters())
        named = [
            (name, p)
            for name, p in tower.named_parameters()
            if p.requires_grad and id(p) not in taken
        ]
        self.weights += [Weight(p, own[name]) for name, p in named]
        self.refresh()

    def fold(self, conv: Any, norm: Any, conv_name: str, norm_name: str) -> Iterator[Weight]:
        """Let the copy's convolution do its norm's work; the weights that change with the tower's."""
        own: Any = self.fast.get_submodule(conv_name)
        exact = norm.weight.detach().double() * torch.rsqrt(norm.running_var.double() + norm.eps)
        shift = (norm.bias.detach().double() - norm.running_mean.double() * exact).to(
            conv.weight.dtype
        )
        scale = exact.to(conv.weight.dtype)
        own.bias = nn.Parameter(shift.clone(), requires_grad=conv.bias is not None)
        parent, _, last = norm_name.rpartition(".")
        setattr(self.fast.get_submodule(parent), last, nn.Identity())
        yield Weight(conv.weight, own.weight, scale.view(-1, 1, 1, 1))
        if conv.bias is not None:
            yield Weight(conv.bias, own.bias, scale, shift)

    def refresh(self) -> None:
        """Take over the tower's weights; forget all gradients."""
        for w in self.weights:
            w.refresh()

    def attach_gradients(self, value: Tensor) -> Tensor:
        """A value whose gradients the fast copy's weights hold -> the same as a function of the tower's own weights."""
        moved = [w for w in self.weights if w.own.grad is not None]
        return Known.apply(
            value.detach(), [w.gradient() for w in moved], *(w.source for w in moved)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Differentiable by the copy's weights."""
        return self.fast(x)


def chunk_slices(n: int, size: int, device: torch.device) -> Iterator[slice]:
    """0..n-1 in parts of one length: a CPU's allocator hands out the room for a small part's activations again and again."""
    rows, side = CHUNKS.get(device.type, CHUNKS["cuda"])
    most = max(FEWEST, rows * side**2 // size**2)
    step = -(-n // -(-n // most)) if n else 1
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def read_graph(tower: nn.Module, size: int) -> tuple[set[int], list[tuple[str, str]]]:
    """What autograd's own graph says of a tower, however it is written.

    -> ids of the parameters that its output depends on; and (convolution, BatchNorm2d) by name, wherever the norm alone
    reads what the convolution gives, and each is used once.
    """
    first = next(tower.parameters())
    tower.requires_grad_(True)
    with torch.enable_grad():
        root = tower(torch.zeros(1, 3, size, size, device=first.device, dtype=first.dtype)).grad_fn
    uses: Counter[Any] = Counter()
    seen, stack, norms = {root}, [root], []
    while stack:
        node = stack.pop()
        above = [n for n, _ in node.next_functions if n is not None]
        uses.update(above)
        stack += (new := set(above) - seen)
        seen |= new
        if "BatchNorm" in node.name():
            norms.append(node)
    owner = {
        id(m.weight): name
        for name, m in tower.named_modules()
        if isinstance(getattr(m, "weight", None), nn.Parameter)
    }
    folds = []
    for norm in norms:
        conv = norm.next_functions[0][0]
        if conv is None or "Convolution" not in conv.name() or uses[conv] != 1:
            continue
        weights = [n.next_functions[1][0] for n in (conv, norm)]
        names = [
            owner.get(id(w.variable), "") if uses[w] == 1 and hasattr(w, "variable") else ""
            for w in weights
        ]
        if all(names) and type(tower.get_submodule(names[1])) is nn.BatchNorm2d:
            folds.append((names[0], names[1]))
    return {id(n.variable) for n in seen if hasattr(n, "variable")}, folds
