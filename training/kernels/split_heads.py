"""Queries, keys and values of one product; the backward joins their gradients and sums the bias's.

    q, k, v = z in parts, split into heads: views            z = x Wᵀ + bias
    d_z     = [d_q d_k d_v],    d_bias = Σ d_z               over the tokens

A compiler reads d_z, which it has just written, once more for the sum.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jvp_flash_attention.kernels.launch_cache import Launch
from jvp_flash_attention.operators import operator
from training.kernels.launch import launched
from training.kernels.partial_sums import sum_parts

ROWS, TILE, COLUMNS = 256, 32, 128  # of a program, at a time, and side by side


@triton.jit
def _join(
    DQ, DK, DV, DZ, SUMS,  # SUMS (programs, 3 H D)
    rows, tokens, H, stride_q, stride_k, stride_v,  # (B, H, N) each
    D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    part = tl.program_id(2)
    source, strides = DQ, stride_q
    if part == 1:
        source, strides = DK, stride_k
    elif part == 2:
        source, strides = DV, stride_v
    w = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    head, d = w // D, w % D
    total = tl.zeros([TILE, COLUMNS], tl.float32)
    for i in range(0, ROWS, TILE):
        row = first + i + tl.arange(0, TILE)
        valid = (row < rows)[:, None] & (head < H)[None, :]
        image, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
        along = (image * strides[0] + token * strides[2])[:, None]
        x = tl.load(source + along + (head * strides[1] + d)[None, :], mask=valid, other=0.0)
        at = row[:, None].to(tl.int64) * (3 * H * D) + (part * H * D + w)[None, :]
        tl.store(DZ + at, x, mask=valid)
        total += x.to(tl.float32)
    if BIAS:
        into = SUMS + (tl.program_id(0) * 3 + part) * H * D + w
        tl.store(into, tl.sum(total, 0), mask=head < H)


def joined(d_q: Tensor, d_k: Tensor, d_v: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """d_z (B, N, 3 H D) of gradients (B, H, N, D) and, with ``bias``, d_bias in float32."""
    B, H, N, D = d_q.shape
    chunks = -(-B * N // ROWS)
    parts = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in (d_q, d_k, d_v))

    def outputs() -> tuple[Tensor, Tensor]:
        size = (chunks, 3 * H * D) if bias else (0,)
        return d_q.new_empty(B, N, 3 * H * D), d_q.new_empty(size, dtype=torch.float32)

    def launch(d_z: Tensor, sums: Tensor) -> Launch:
        constexprs = {"D": D, "ROWS": ROWS, "TILE": TILE, "COLUMNS": COLUMNS, "BIAS": bias}
        args = (*parts, d_z, sums, B * N, N, H, *(x.stride()[:3] for x in parts))
        grid = (chunks, -(-H * D // COLUMNS), 3)
        return Launch(_join, grid, args, {**constexprs, "num_warps": 4})

    d_z, sums = launched(("join", bias), parts, outputs, launch)
    return d_z, sum_parts(sums[None])[0] if bias else sums


_joined = operator("flash_jvp_training::join_heads")(joined)


@_joined.register_fake
def _(d_q, d_k, d_v, bias):
    B, H, N, D = d_q.shape
    size = (3 * H * D,) if bias else (0,)
    return d_q.new_empty(B, N, 3 * H * D), d_q.new_empty(size, dtype=torch.float32)


def views(z: Tensor, heads: int) -> tuple[Tensor, ...]:
    """z (B, N, 3 H D) -> q, k and v (B, H, N, D)."""
    return z.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, ...]:
        ctx.bias = None if bias is None else bias.dtype
        return views(z, heads)

    @staticmethod
    def backward(ctx: Any, *d: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        d_z, d_bias = _joined(*d, ctx.bias is not None)
        return d_z, None if ctx.bias is None else d_bias.to(ctx.bias), None


def split_heads(z: Tensor, bias: Tensor | None, heads: int) -> list[Tensor]:
    """z (B, N, 3 H D) -> q, k and v (B, H, N, D), views. ``bias`` (3 H D,), already in z, is there
    for its gradient alone: whoever makes z adds ``bias.detach()``.
    """
    return list(_Split.apply(z, bias, heads))
