"""Freezes the batch norms of an image tower and folds them into the convolutions before them.

With frozen norms the images of a batch do not influence one another, so a batch can be computed in
chunks whose gradients are added up. A frozen norm after a convolution is an affine map that can be
merged into it: with s = weight / sqrt(variance + eps),

    norm(conv(x, W, b)) = conv(x, s W, s (b - mean) + bias).

The tower keeps W, which is saved and to which weight decay applies. A fast copy of the tower
computes with s W. The gradient with respect to W is s times the gradient with respect to s W, so
the result is exact.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bezoar.errors import UserError

# Device type -> how many images of which side in pixels are computed at once.
CHUNKS = {"cpu": (64, 32), "cuda": (128, 224)}
FEWEST = 8  # images of a chunk, however large they are
BatchNorm = nn.modules.batchnorm._BatchNorm


class _PrecomputedGradients(torch.autograd.Function):
    """The identity on a scalar. Its backward pass returns gradients that were computed before."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return None, None, *(outer[0] * gradient for gradient in ctx.gradients)


@dataclass(frozen=True)
class FoldedWeight:
    """A weight of the fast copy: folded = scale * source + shift, where None stands for 1 and 0."""

    source: nn.Parameter
    folded: nn.Parameter
    scale: Tensor | None = None
    shift: Tensor | None = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the source's value and clear the gradient."""
        if self.scale is None:
            self.folded.copy_(self.source)
        else:
            torch.mul(self.source, self.scale, out=self.folded.data)
        if self.shift is not None:
            self.folded.add_(self.shift)
        self.folded.grad = None

    def source_gradient(self) -> Tensor:
        """The gradient with respect to the source, in the source's memory layout."""
        assert self.folded.grad is not None
        gradient = torch.empty_like(self.source)
        if self.scale is None:
            return gradient.copy_(self.folded.grad)
        return torch.mul(self.folded.grad, self.scale, out=gradient)


class FoldedTower:
    """A tower and its fast copy, which maps normalised float (B, 3, S, S) -> (B, D).

    The tower itself is changed: it is put into evaluation mode, its batch norms (statistics and
    affine weights) are frozen, and weights that do not influence its output get no gradient. Call
    `refresh` after each change of its weights.

    Attributes:
        fast: the copy, in which folded norms are identities.
        folds: names of the convolution and the norm of each fold.
    """

    def __init__(self, tower: nn.Module, size: int) -> None:
        """Fold what can be folded.

        Args:
            tower: module, normalised float (B, 3, size, size) -> (B, D).
            size: the input's side in pixels.

        Raises:
            UserError: for a batch norm without running statistics, which makes the images of a
            batch influence one another.
        """
        for name, module in tower.named_modules():
            if isinstance(module, BatchNorm) and module.running_mean is None:
                raise UserError(
                    f"batch norm {name!r} keeps no statistics: without a batch this encoder has no "
                    "output"
                )
        used, self.folds = read_graph(tower.eval(), size)
        for parameter in tower.parameters():
            parameter.requires_grad_(id(parameter) in used)
        for module in tower.modules():
            if isinstance(module, BatchNorm):
                module.requires_grad_(False)
        self.fast = copy.deepcopy(tower).to(memory_format=torch.channels_last)
        self.weights: list[FoldedWeight] = []
        for conv, norm in self.folds:
            self.weights += self._fold(tower, conv, norm)
        folded = {id(weight.source) for weight in self.weights}
        copies = dict(self.fast.named_parameters())
        self.weights += [
            FoldedWeight(parameter, copies[name])
            for name, parameter in tower.named_parameters()
            if parameter.requires_grad and id(parameter) not in folded
        ]
        self.refresh()

    def _fold(self, tower: nn.Module, conv_name: str, norm_name: str) -> Iterator[FoldedWeight]:
        """Fold one norm in the copy; yield the copy's weights that `refresh` has to update."""
        conv: Any = tower.get_submodule(conv_name)
        norm: Any = tower.get_submodule(norm_name)
        fast_conv: Any = self.fast.get_submodule(conv_name)
        exact_scale = norm.weight.detach().double() * torch.rsqrt(
            norm.running_var.double() + norm.eps
        )
        exact_shift = norm.bias.detach().double() - norm.running_mean.double() * exact_scale
        scale = exact_scale.to(conv.weight.dtype)  # (C,)
        shift = exact_shift.to(conv.weight.dtype)  # (C,)
        fast_conv.bias = nn.Parameter(shift.clone(), requires_grad=conv.bias is not None)
        parent, _, attribute = norm_name.rpartition(".")
        setattr(self.fast.get_submodule(parent), attribute, nn.Identity())
        yield FoldedWeight(conv.weight, fast_conv.weight, scale.view(-1, 1, 1, 1))
        if conv.bias is not None:
            yield FoldedWeight(conv.bias, fast_conv.bias, scale, shift)

    def refresh(self) -> None:
        """Copy the tower's weights and clear all gradients."""
        for weight in self.weights:
            weight.refresh()

    def attach_gradients(self, value: Tensor) -> Tensor:
        """Return the scalar such that its backward pass gives the tower's weights their gradients.

        The gradients with respect to the copy's weights must have been computed before.
        """
        ready = [weight for weight in self.weights if weight.folded.grad is not None]
        gradients = [weight.source_gradient() for weight in ready]
        sources = (weight.source for weight in ready)
        attached: Tensor = _PrecomputedGradients.apply(value.detach(), gradients, *sources)
        return attached

    def __call__(self, x: Tensor) -> Tensor:
        """Vectors (B, D) of normalised images (B, 3, S, S), by the copy's weights."""
        z: Tensor = self.fast(x)
        return z


def chunk_slices(n: int, size: int, device: torch.device) -> Iterator[slice]:
    """Split rows 0..n-1 into equal chunks, for images of `size` pixels.

    Chunks are small, so that the CPU's allocator reuses the same memory for the activations.
    """
    rows, side = CHUNKS.get(device.type, CHUNKS["cuda"])
    largest = max(FEWEST, rows * side**2 // size**2)
    chunk_count = -(-n // largest)
    step = -(-n // chunk_count) if n else 1
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def read_graph(tower: nn.Module, size: int) -> tuple[set[int], list[tuple[str, str]]]:
    """Find in autograd's graph which parameters a tower uses and which norms can be folded.

    Returns:
        ids of the parameters that the output depends on; and pairs of names (convolution,
        BatchNorm2d) where the norm is the only reader of the convolution's output and each is
        used once.
    """
    first = next(tower.parameters())
    tower.requires_grad_(True)
    with torch.enable_grad():
        root = tower(torch.zeros(1, 3, size, size, device=first.device, dtype=first.dtype)).grad_fn
    nodes, uses = _walk_graph(root)
    owners = {
        id(module.weight): name
        for name, module in tower.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    folds = []
    for norm in nodes:
        conv = norm.next_functions[0][0] if "BatchNorm" in norm.name() else None
        if conv is None or "Convolution" not in conv.name() or uses[conv] != 1:
            continue
        names = [_weight_owner(node, uses, owners) for node in (conv, norm)]
        if all(names) and type(tower.get_submodule(names[1])) is nn.BatchNorm2d:
            folds.append((names[0], names[1]))
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}, folds


def _walk_graph(root: Any) -> tuple[list[Any], Counter[Any]]:
    """Every node of autograd's graph behind `root`, and how many nodes read each."""
    uses: Counter[Any] = Counter()
    nodes: list[Any] = []
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        nodes.append(node)
        inputs = [function for function, _ in node.next_functions if function is not None]
        uses.update(inputs)
        new = set(inputs) - seen
        stack += new
        seen |= new
    return nodes, uses


def _weight_owner(node: Any, uses: Counter[Any], owners: dict[int, str]) -> str:
    """The name of the module whose weight a node reads; "" if it is shared or computed."""
    weight = node.next_functions[1][0]
    if uses[weight] != 1 or not hasattr(weight, "variable"):
        return ""
    return owners.get(id(weight.variable), "")
