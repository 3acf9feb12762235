"""Faster fp32 linear layers and attention on AMD's CPUs: oneDNN's product in place of MKL's.

torch multiplies fp32 matrices with MKL, which does not use the widest vectors of AMD's processors.
The oneDNN that ships with torch does, but no public function of torch reaches it for fp32.
`install` makes a model's nn.Linear and nn.MultiheadAttention use `linear` below; parameters,
state-dict keys, device moves and copies stay as they were. Wherever oneDNN does not apply (another
device, another dtype, autocast, few rows, another torch) the layers compute what they always did.
Results differ from torch's by rounding alone, in the forward and in both backward products.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The operator is private to torch: it is used only where it is declared as it was when this was
# written.
DECLARED = (
    "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)
ROWS = 256  # below this oneDNN's reordering of the weights costs more than its product saves


@functools.cache
def available() -> bool:
    """Whether torch has the operator as declared, it is right, and this processor gains by it."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    schema = str(torch.ops.mkldnn._linear_pointwise.default._schema)
    if not torch.backends.mkldnn.is_available() or not schema.endswith(DECLARED):
        return False
    x = torch.arange(21.0).view(7, 3).cos()
    weight = torch.arange(15.0).view(5, 3).sin()
    bias = torch.arange(5.0)
    same = torch.allclose(product(x, weight, bias), F.linear(x, weight, bias), atol=1e-5)
    return same and _is_amd()


def _is_amd() -> bool:
    """Whether this is an AMD x86-64. On Intel's MKL is as fast; elsewhere torch does not use it."""
    info = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and info.exists() and "AuthenticAMD" in info.read_text()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) W^T + b by oneDNN, float32, without autograd; weight (N, K) may be any view."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` multiplies x (..., K) and weight (N, K) by oneDNN."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= ROWS * x.shape[-1] > 0
        and not torch.is_autocast_enabled("cpu")
        and available()
    )


class _Linear(torch.autograd.Function):
    """y = x W^T + b. Backward products are `multiply` again, so that second derivatives exist."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, grad = x.flatten(0, -2), grads[0].flatten(0, -2)  # (B, K), (B, N)
        dx = multiply(grad, weight.t()).view_as(x) if ctx.needs_input_grad[0] else None
        dw = db = None
        if ctx.needs_input_grad[1]:
            # The operator copies its first argument into rows, so the narrower matrix goes first.
            narrow = grad.shape[1] <= rows.shape[1]
            dw = multiply(grad.t(), rows.t()) if narrow else multiply(rows.t(), grad.t()).t()
        if ctx.needs_input_grad[2]:
            db = grad.sum(0)
        return dx, dw, db


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product`, differentiable."""
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        y: Tensor = _Linear.apply(x, weight, bias)
        return y
    return product(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, by oneDNN where it fits: x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    return multiply(x, weight, bias) if fits(x, weight) else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return linear(input, self.weight, self.bias)


class Attention(nn.MultiheadAttention):
    """nn.MultiheadAttention by `linear` as open_clip calls it; otherwise torch's own."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: (B, Lq, D).
            key: (B, L, D).
            value: the same tensor as `key`.
            args: what open_clip does not use.
            options: `need_weights=False`, and perhaps `attn_mask`, float (Lq, L) or (B * heads, Lq,
                L), which is added to the logits.
        """
        mask = options.get("attn_mask")
        usual_call = not args and options.keys() <= {"attn_mask", "need_weights"}
        usual_mask = mask is None or mask.is_floating_point()
        if (
            not (usual_call and usual_mask and self._is_plain())
            or options.get("need_weights", True)
            or key is not value
            or query.ndim != 3
            or not fits(key, self.in_proj_weight)
        ):
            return super().forward(query, key, value, *args, **options)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # (B, heads, L, d)
            for part in self._project(query, key)
        )
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))  # (B, heads, Lq, L)
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return linear(mixed, self.out_proj.weight, self.out_proj.bias), None

    def _project(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, Lq, D), keys and values (B, L, D); one product where query is key."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key:
            q, k, v = linear(query, weight, bias).chunk(3, -1)
            return q, k, v
        d = self.embed_dim
        query_bias, rest_bias = (None, None) if bias is None else (bias[:d], bias[d:])
        k, v = linear(key, weight[d:], rest_bias).chunk(2, -1)
        return linear(query, weight[:d], query_bias), k, v

    def _is_plain(self) -> bool:
        """Whether it is batch first, of one width, and drops and appends nothing."""
        return (
            self.batch_first
            and self.in_proj_weight is not None
            and self.bias_k is None
            and not self.add_zero_attn
            and not (self.dropout and self.training)
        )


def install(model: nn.Module) -> nn.Module:
    """Change every linear layer and attention of a model in place; subclasses stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) is nn.MultiheadAttention:
            module.__class__ = Attention
    return model
