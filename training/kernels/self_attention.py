"""Attention of queries, keys and values that are one product, whose gradient is one tensor too:
nothing joins three.

    O   = softmax(s Q Kᵀ) V            [Q K V] = z = x Wᵀ + bias, views
    d_z = [d_q d_k d_v],               d_bias = Σ d_z over the tokens
"""

from typing import Any

import torch
from torch import Tensor

from jvp_flash_attention import backends, kernels
from jvp_flash_attention.call import Inputs, Saved, Spec, Tangents
from jvp_flash_attention.kernels import cudnn
from jvp_flash_attention.operators import operator
from training.kernels.column_sums import column_sums
from training.kernels.split_heads import joined, views

NO_TANGENT = "self_attention has no tangent; take attention_jvp of the views of its product"


def _call(z: Tensor, heads: int) -> tuple[Inputs, Spec]:
    x = Inputs(*views(z, heads))
    # as below an operator of the library: only compiled blocks come here
    return x, Spec(x.q.shape[3] ** -0.5, rows_first=True, compiled=True)


def supports(z: Tensor, heads: int) -> bool:
    """Whether the kernels take it."""
    q, _, v = views(z, heads)
    return backends.unsupported_reason(q, v) is None


@operator("flash_jvp_training::self_attention", no_tangent=NO_TANGENT)
def _forward(z: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """O (B, H, N, D), which lies as (B, N, H, D), and LSE (B, H, N) of z (B, N, 3 H D)."""
    x, spec = _call(z, heads)
    saved = kernels.forward(x, None, spec)
    return saved.out, saved.lse


@_forward.register_fake
def _(z, heads):
    B, N, width = z.shape
    out = z.new_empty(B, N, heads, width // (3 * heads)).transpose(1, 2)
    return out, z.new_empty(B, heads, N, dtype=torch.float32)


@operator("flash_jvp_training::self_attention_backward", no_tangent=NO_TANGENT)
def _backward(
    d_out: Tensor, z: Tensor, out: Tensor, lse: Tensor, heads: int, bias: bool
) -> tuple[Tensor, Tensor]:
    """d_z and, with ``bias``, d_bias in float32."""
    x, spec = _call(z, heads)
    if cudnn.pays_backward(x, spec):  # and may serve, in tensors of its own
        grads: Any = kernels.backward(d_out, None, x, Tangents(), Saved(out, lse), spec, False)[0]
        return joined(grads.q, grads.k, grads.v, bias)
    d_z = torch.empty_like(z, memory_format=torch.contiguous_format)
    into = views(d_z, heads)
    kernels.backward(d_out, None, x, Tangents(), Saved(out, lse), spec, False, into=into)
    return d_z, column_sums(d_z, bias)


@_backward.register_fake
def _(d_out, z, out, lse, heads, bias):
    size = (z.shape[2],) if bias else (0,)
    d_z = torch.empty_like(z, memory_format=torch.contiguous_format)
    return d_z, z.new_empty(size, dtype=torch.float32)


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor | None, heads: int) -> Tensor:
        out, lse = _forward(z, heads)
        ctx.save_for_backward(z, out, lse)
        ctx.heads, ctx.bias = heads, None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        d_z, d_bias = _backward(d_out, *ctx.saved_tensors, ctx.heads, ctx.bias is not None)
        return d_z, None if ctx.bias is None else d_bias.to(ctx.bias), None


def self_attention(z: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """z (B, N, 3 H D) -> O (B, H, N, D), with scale D^-½. ``bias`` (3 H D,), already in z, is there
    for its gradient alone: whoever makes z adds ``bias.detach()``. A second derivative raises.
    """
    return _SelfAttention.apply(z, bias, heads)
