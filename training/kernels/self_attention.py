"""Attention of queries, keys and values that are one product, whose gradient is one tensor too:
nothing joins three.

    O   = softmax(s Q Kᵀ) V            [Q K V] = z = x Wᵀ + bias, views
    d_z = [d_q d_k d_v],               d_bias = Σ d_z over the tokens

The bias of the keys adds the same to all scores of a query. So Σ d_k = 0. It is not summed, and
not the noise that rounding would leave of it. The rows of softmax add to one, so Σ d_v = Σ d_O.
Where the kernel can it makes both sums beside d_z, which is then not read again
(``kernels.room_for_sums``).
"""

from typing import Any

import torch
from torch import Tensor

from jvp_flash_attention import backends, kernels
from jvp_flash_attention.call import Inputs, Saved, Spec, Tangents, empty_rows
from jvp_flash_attention.kernels import cudnn
from jvp_flash_attention.kernels.problem import tma_can_read
from jvp_flash_attention.operators import operator
from training.kernels.column_sums import part_sums
from training.kernels.partial_sums import sum_parts
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
def _forward(z: Tensor, t_z: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """O (B, H, N, D), which lies as (B, N, H, D), and LSE (B, H, N) in float32 of z (B, N, 3 H D);
    tO (n, H, N, D), which lies as O, of t_z (n, N, 3 H D), empty without.
    """
    x, spec = _call(z, heads)
    if t_z is None:
        saved = kernels.forward(x, None, spec)
        return saved.out, saved.lse, z.new_empty(0)
    first = len(z) - len(t_z)  # of so many examples the value alone
    out, t_out = (empty_rows(q, q.shape[3], spec) for q in (x.q, x.q[first:]))
    lse = z.new_empty(x.q.shape[:3], dtype=torch.float32)
    into = out[:first], None, lse[:first]
    values = kernels.forward(_examples(x, 0, first), None, spec, into=into)
    if values.out.data_ptr() != out.data_ptr():  # cuDNN's own
        out[:first], lse[:first] = values.out, values.lse
    t, rest = Tangents(*views(t_z, heads)), _examples(x, first, len(z))
    kernels.forward(rest, t, spec, into=(out[first:], t_out, lse[first:]))
    return out, lse, t_out


def _examples(x: Inputs, begin: int, end: int) -> Inputs:
    return Inputs(*(y[begin:end] for y in (x.q, x.k, x.v)))


@_forward.register_fake
def _(z, t_z, heads):
    B, N, width = z.shape
    shape = N, heads, width // (3 * heads)
    out = z.new_empty(B, *shape).transpose(1, 2)
    t_out = z.new_empty(0) if t_z is None else z.new_empty(len(t_z), *shape).transpose(1, 2)
    return out, z.new_empty(B, heads, N, dtype=torch.float32), t_out


@operator("flash_jvp_training::self_attention_backward", no_tangent=NO_TANGENT)
def _backward(
    d_out: Tensor, z: Tensor, out: Tensor, lse: Tensor, heads: int, bias: bool
) -> tuple[Tensor, Tensor]:
    """d_z and, with ``bias``, d_bias in float32."""
    x, spec = _call(z, heads)
    if cudnn.pays_backward(x, spec):  # and may serve, in tensors of its own
        grads: Any = kernels.backward(d_out, None, x, Tangents(), Saved(out, lse), spec, False)[0]
        d_z, d_bias = joined(grads.q, grads.k, grads.v, bias)
        d_bias[len(d_bias) // 3 : -(len(d_bias) // 3)] = 0.0
        return d_z, d_bias
    d_z = torch.empty_like(z, memory_format=torch.contiguous_format)
    sums = kernels.room_for_sums(x, spec) if bias else None
    if sums is not None and not tma_can_read(d_out):
        # as behind a sum over images; the kernel that makes sums needs TMA
        d_out = d_out.contiguous()
    into = (*views(d_z, heads), *([] if sums is None else [sums]))
    kernels.backward(d_out, None, x, Tangents(), Saved(out, lse), spec, False, into=into)
    width = z.shape[2] // 3
    if sums is not None:
        return d_z, sum_parts(sums.view(1, -1, 2 * width), (width, width))[0]
    if bias:
        return d_z, part_sums(d_z.view(-1, 3, width), zero=1).flatten()
    return d_z, d_z.new_empty(0, dtype=torch.float32)


@_backward.register_fake
def _(d_out, z, out, lse, heads, bias):
    size = (z.shape[2],) if bias else (0,)
    d_z = torch.empty_like(z, memory_format=torch.contiguous_format)
    return d_z, z.new_empty(size, dtype=torch.float32)


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, bias: Tensor | None, heads: int, t_z: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse, t_out = _forward(z, t_z, heads)
        ctx.save_for_backward(z, out, lse)
        ctx.mark_non_differentiable(t_out)
        ctx.heads, ctx.bias = heads, None if bias is None else bias.dtype
        return out, t_out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        d_z, d_bias = _backward(d_out, *ctx.saved_tensors, ctx.heads, ctx.bias is not None)
        return d_z, None if ctx.bias is None else d_bias.to(ctx.bias), None, None


def self_attention(z: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """z (B, N, 3 H D) -> O (B, H, N, D), with scale D^-½. ``bias`` (3 H D,), already in z, is there
    for its gradient alone: whoever makes z adds ``bias.detach()``. A second derivative raises.
    """
    return _SelfAttention.apply(z, bias, heads, None)[0]


def self_attention_jvp(
    z: Tensor, t_z: Tensor, bias: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    """O, and tO (n, H, N, D) of the last n examples, whose tangent ``t_z`` (n, N, 3 H D) is a
    constant. The values of the others are computed without one.
    """
    return _SelfAttention.apply(z, bias, heads, t_z)
