"""Frozen: a tower whose batch norms rest. Its rows do not see one another, so they can be computed in pieces whose
gradients add, and a norm behind a convolution is a fixed affine map that the convolution's weights take in.

With the norm's scale s = weight / sqrt(variance + eps), norm(conv(x, W, b)) = conv(x, s W, s (b - mean) + bias). The tower
keeps W, which is what weight decay acts on and what is saved; the fast copy in here computes with s W, and its gradient
times s is the gradient of W.
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

ROWS, SIDE = 64, 32  # images of so many pixels a side that a CPU computes at once; of larger ones fewer
Norm = nn.modules.batchnorm._BatchNorm


class Known(torch.autograd.Function):
    """A value whose gradients have been computed already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: Sequence[Tensor], *weights: Tensor) -> Tensor:
        """value: a scalar. grads: of it by each of `weights`."""
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        """The gradients, times that of the value."""
        return None, None, *(above[0] * g for g in ctx.grads)


@dataclass(frozen=True)
class Weight:
    """A weight of the tower, the fast copy's own, and what one is multiplied by to give the other (None: 1).

    shift: what is then added to it, where it is the bias of a convolution.
    """

    source: nn.Parameter
    own: nn.Parameter
    scale: Tensor | None = None
    shift: Tensor | None = None


class Frozen:
    """The fast form of a tower. Call it with float (B, 3, S, S), normalised; `refresh` it whenever the tower has changed.

    Freezes the tower's batch norms (statistics and affine) and every weight that does not bear on its output.
    """

    def __init__(self, tower: nn.Module, size: int) -> None:
        """size: pixels a side of the tower's input. Raises UserError for a tower whose rows see one another."""
        for name, norm in norms(tower):
            if norm.running_mean is None or norm.running_var is None:
                raise UserError(f"batch norm {name!r} keeps no statistics: without a batch this encoder has no output")
        tower.eval()
        reached, folds = read_graph(tower, size)
        for p in tower.parameters():
            p.requires_grad_(id(p) in reached)
        for _, norm in norms(tower):
            norm.requires_grad_(False)
        self.tower = copy.deepcopy(tower)
        self.folded = len(folds)
        place = {id(p): name for name, p in tower.named_parameters(remove_duplicate=False)}
        self.weights = []
        done: set[int] = set()
        for conv_name, norm_name in folds:
            self.weights += self.fold(tower.get_submodule(conv_name), tower.get_submodule(norm_name), conv_name, norm_name)
            done |= {id(p) for p in tower.get_submodule(conv_name).parameters()}
        for p in tower.parameters():
            if p.requires_grad and id(p) not in done:
                self.weights.append(Weight(p, self.tower.get_parameter(place[id(p)])))
        self.tower.to(memory_format=torch.channels_last)
        self.refresh()

    def fold(self, conv: Any, norm: Any, conv_name: str, norm_name: str) -> Iterator[Weight]:
        """Let the copy's convolution do the work of its norm."""
        own: Any = self.tower.get_submodule(conv_name)
        scale = (norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)).detach()
        shift = norm.bias.detach().double() - norm.running_mean.double() * scale
        own.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=conv.bias is not None and conv.bias.requires_grad)
        parent, _, last = norm_name.rpartition(".")
        setattr(self.tower.get_submodule(parent), last, nn.Identity())
        if conv.weight.requires_grad:
            yield Weight(conv.weight, own.weight, scale.to(conv.weight.dtype).view(-1, 1, 1, 1))
        else:
            own.weight.data.mul_(scale.to(conv.weight.dtype).view(-1, 1, 1, 1))
        if conv.bias is not None:
            yield Weight(conv.bias, own.bias, scale.to(conv.weight.dtype), shift.to(conv.weight.dtype))

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the tower's weights; forget all gradients."""
        for w in self.weights:
            w.own.copy_(w.source) if w.scale is None else torch.mul(w.source, w.scale, out=w.own.data)
            if w.shift is not None:
                w.own.add_(w.shift)
            w.own.grad = None

    def known(self, value: Tensor) -> Tensor:
        """The value, whose gradients by the fast copy's weights have been summed up, as one of the tower's own weights."""
        trained = [w for w in self.weights if w.own.grad is not None]
        grads = [w.own.grad if w.scale is None else w.own.grad * w.scale for w in trained]
        return Known.apply(value.detach(), grads, *(w.source for w in trained))

    def __call__(self, x: Tensor) -> Tensor:
        """float (B, 3, S, S) -> (B, D), not normalised; differentiable by the copy's weights."""
        return self.tower(x)


def pieces(n: int, size: int, device: torch.device) -> Iterator[slice]:
    """0..n-1 in parts whose activations a CPU's allocator hands out again and again; on a GPU all at once."""
    most = max(1, ROWS * SIDE**2 // size**2) if device.type == "cpu" else n
    for start in range(0, n, max(1, most)):
        yield slice(start, min(start + most, n))


def norms(tower: nn.Module) -> list[tuple[str, Norm]]:
    """The batch norms of a tower, by name."""
    return [(name, m) for name, m in tower.named_modules() if isinstance(m, Norm)]


def read_graph(tower: nn.Module, size: int) -> tuple[set[int], list[tuple[str, str]]]:
    """What autograd's own graph says of a tower: ids of the parameters its output depends on, and which norms can be
    taken in: (name of a convolution, name of the BatchNorm2d that alone reads its output), each used once.
    """
    first = next(tower.parameters())
    for p in tower.parameters():
        p.requires_grad_(True)
    with torch.enable_grad():
        root = tower(torch.zeros(1, 3, size, size, device=first.device, dtype=first.dtype)).grad_fn
    uses: Counter = Counter()
    seen, stack, found = {root}, [root], []
    while stack:
        node = stack.pop()
        for above, _ in node.next_functions:
            if above is not None:
                uses[above] += 1
                if above not in seen:
                    seen.add(above)
                    stack.append(above)
        if "BatchNorm" in node.name() and node.next_functions[0][0] is not None:
            found.append((node.next_functions[0][0], node))
    reached = {id(node.variable) for node in seen if hasattr(node, "variable")}
    owner = {id(m.weight): name for name, m in tower.named_modules() if getattr(m, "weight", None) is not None}
    folds = []
    for conv, norm in found:
        weights = [n.next_functions[1][0] for n in (conv, norm) if len(n.next_functions) > 1]
        if "Convolution" not in conv.name() or uses[conv] != 1 or any(not hasattr(w, "variable") for w in weights):
            continue
        names = [owner.get(id(w.variable)) for w in weights]
        if None in names or any(uses[w] != 1 for w in weights) or type(tower.get_submodule(names[1])) is not nn.BatchNorm2d:
            continue
        folds.append((names[0], names[1]))
    return reached, folds
