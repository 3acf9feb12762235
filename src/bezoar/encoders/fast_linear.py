"""Faster fp32 linear layers and attention on CPUs, with the same results: oneDNN's product in place of MKL's.

torch multiplies fp32 matrices with MKL, which leaves the widest vectors of AMD's processors unused; the oneDNN that it
ships does not, but no public function of torch reaches it for fp32. `install` makes a model's nn.Linear and
nn.MultiheadAttention use `linear` below: parameters, state-dict keys, device moves and copies stay as they were, and
wherever oneDNN does not apply (another device, another dtype, autocast, few rows, another torch) the layers compute
what they always did. Results differ from torch's by rounding alone, in the forward and in both backward products.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The operator is private to torch: it is used only where it is declared as it was when this was written.
DECLARED = (
    "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)
ROWS = 256  # below this oneDNN's reordering of the weights costs more than its product saves


@functools.cache
def available() -> bool:
    """Whether this torch has the operator as declared, it multiplies right, and the processor gains by it."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
    if not known or not str(torch.ops.mkldnn._linear_pointwise.default._schema).endswith(DECLARED):
        return False
    x, w, b = (
        torch.arange(21.0).view(7, 3).cos(),
        torch.arange(15.0).view(5, 3).sin(),
        torch.arange(5.0),
    )
    return torch.allclose(product(x, w, b), F.linear(x, w, b), atol=1e-5) and _amd()


def _amd() -> bool:
    """On Intel's processors MKL is as fast, and elsewhere torch does not use it."""
    info = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and info.exists() and "AuthenticAMD" in info.read_text()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) W^T + b through oneDNN, for float32 on a CPU; weight (N, K) may be any strided view. No autograd."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes x (..., K) and weight (N, K) through oneDNN."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= ROWS * x.shape[-1] > 0
        and not torch.is_autocast_enabled("cpu")
        and available()
    )


class _Linear(torch.autograd.Function):
    """y = x W^T + b. The backward products are `multiply` again, so that second derivatives exist."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, grad = x.flatten(0, -2), grads[0].flatten(0, -2)
        dx = multiply(grad, weight.t()).view_as(x) if ctx.needs_input_grad[0] else None
        dw = db = None
        if ctx.needs_input_grad[1]:
            # the operator copies its first argument into rows, so the narrower matrix goes first
            narrow = grad.shape[1] <= rows.shape[1]
            dw = multiply(grad.t(), rows.t()) if narrow else multiply(rows.t(), grad.t()).t()
        if ctx.needs_input_grad[2]:
            db = grad.sum(0)
        return dx, dw, db


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product`, differentiable."""
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)
    return product(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., K), weight (N, K), bias (N,) -> (..., N); through oneDNN where it fits."""
    return multiply(x, weight, bias) if fits(x, weight) else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return linear(input, self.weight, self.bias)


class Attention(nn.MultiheadAttention):
    """nn.MultiheadAttention by `linear`, for the one form that open_clip's blocks call; any other form is torch's own."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **given: Any
    ) -> tuple[Tensor, Tensor | None]:
        """query (B, Lq, D), key and value (B, L, D); attn_mask float (Lq, L) or (B * heads, Lq, L), added to the logits."""
        mask, weight, bias = given.get("attn_mask"), self.in_proj_weight, self.in_proj_bias
        if (
            args
            or given.keys() - {"attn_mask", "need_weights"}
            or given.get("need_weights", True)
            or not self._ordinary()
            or key is not value
            or query.ndim != 3
            or (mask is not None and not mask.is_floating_point())
            or not fits(key, weight)
        ):
            return super().forward(query, key, value, *args, **given)
        if query is key:
            parts = linear(query, weight, bias).chunk(3, -1)
        else:
            d = self.embed_dim
            first, rest = (None, None) if bias is None else (bias[:d], bias[d:])
            parts = (linear(query, weight[:d], first), *linear(key, weight[d:], rest).chunk(2, -1))
        q, k, v = (p.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for p in parts)
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return linear(mixed, self.out_proj.weight, self.out_proj.bias), None

    def _ordinary(self) -> bool:
        """Batch first, one width, nothing dropped or appended."""
        same = self.batch_first and self.in_proj_weight is not None
        return (
            same
            and self.bias_k is None
            and not self.add_zero_attn
            and not (self.dropout and self.training)
        )


def install(model: nn.Module) -> nn.Module:
    """Every linear layer and attention of a model, in place; subclasses, which may do something else, are left alone."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) is nn.MultiheadAttention:
            module.__class__ = Attention
    return model
