"""Attention over some keys and over others, put together in one pass over memory.

    w  = 1 / (1 + exp(LSE − LSEᵢ))         δ = μᵢ − μ         ΔO = Oᵢ − O         ΔtO = tOᵢ − tO
    O  ← O + w ΔO                          LSE ← log(exp LSE + exp LSEᵢ)
    tO ← tO + w ΔtO + w (1 − w) δ ΔO       μ ← μ + w δ

Where it comes from is in ../merge.py, which computes the same in plain PyTorch. Sums are
float32; the result is stored in any type, in place where that is the type of the total.
"""

# Triton's annotations name what a kernel receives, not what its caller passes.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Saved
from .block_info import row_at
from .launch_cache import Launch
from .problem import cdiv, maybe_contiguous, pointer, readable

ROWS = 16  # of a program


@triton.jit(do_not_specialize=["H", "L", "start", "tiles", "skipped"])
def merge_kernel(
    OUT, T_OUT, O, T_O, LSE, MU, O_I, T_O_I, LSE_I, MU_I, H, L, start, tiles, skipped,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head. Row `start` of the total is the part's first. A part
    without tO and μ has zeros."""
    pid = tl.program_id(0)
    bh = pid // tiles
    b, h = bh // H, bh % H
    i = (pid % tiles + skipped) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, there = i < L, (i < L) & (i >= start)
    row = bh.to(tl.int64) * L + i
    row_i = bh.to(tl.int64) * (L - start) + i - start
    d = tl.arange(0, BLOCK_DV)[None, :]
    i = i[:, None]
    column, column_i = inside[:, None] & (d < DV), there[:, None] & (d < DV)

    lse = tl.load(LSE + row, mask=inside, other=float("-inf"))
    lse_i = tl.load(LSE_I + row_i, mask=there, other=float("-inf"))
    # a row that sees nothing of the part, and perhaps nothing at all, stays as it is
    w = tl.where(lse_i == float("-inf"), 0.0, 1.0 / (1.0 + tl.exp(lse - lse_i)))
    base = tl.maximum(lse, lse_i)
    base = tl.where(base == float("-inf"), 0.0, base)
    o = tl.load(row_at(O, b, h, i) + d, mask=column, other=0.0).to(tl.float32)
    o_i = tl.load(row_at(O_I, b, h, i - start) + d, mask=column_i, other=0.0).to(tl.float32)
    delta_o = o_i - o
    if T_O is not None:
        mu = tl.load(MU + row, mask=inside, other=0.0)
        delta = -mu
        t_o = tl.load(row_at(T_O, b, h, i) + d, mask=column, other=0.0).to(tl.float32)
        delta_t = -t_o
        if T_O_I is not None:
            delta += tl.load(MU_I + row_i, mask=there, other=0.0)
            at_i = row_at(T_O_I, b, h, i - start) + d
            delta_t += tl.load(at_i, mask=column_i, other=0.0).to(tl.float32)
        c = w * (1.0 - w) * delta
        t_out = t_o + w[:, None] * delta_t + c[:, None] * delta_o

    # warps hold rows of one another: none may store what another one has yet to load
    tl.debug_barrier()
    tl.store(LSE + row, base + tl.log(tl.exp(lse - base) + tl.exp(lse_i - base)), mask=inside)
    out = (o + w[:, None] * delta_o).to(OUT[0].dtype.element_ty)
    tl.store(row_at(OUT, b, h, i) + d, out, mask=column)
    if T_O is not None:
        tl.store(MU + row, mu + w * delta, mask=inside)
        at = row_at(T_OUT, b, h, i) + d
        tl.store(at, t_out.to(T_OUT[0].dtype.element_ty), mask=column)


def merge(
    total: Saved,
    part: Saved,
    start: int,
    dtype: torch.dtype,
    into: tuple[Tensor, Tensor | None] | None = None,
) -> Saved:
    """Both together; LSE and μ of the total are overwritten. O and tO go to `into`, where that is
    given, else to the total's own where they have `dtype`. Row `start` is the first one of the
    part."""
    launch, merged = merge_launch(total, part, start, dtype, into)
    if launch.grid[0] > 0:
        with torch.cuda.device(merged.out.device) if merged.out.is_cuda else nullcontext():
            launch.run()
    return merged


def merge_launch(
    total: Saved, part: Saved, start: int, dtype: torch.dtype, into: Any = None
) -> tuple[Launch, Saved]:
    """What `merge` launches, and where the result will be."""
    out: Any = readable(total.out)
    t_out, o_i, t_o_i = map(readable, (total.t_out, part.out, part.t_out))
    lse, mu, lse_i, mu_i = map(maybe_contiguous, (total.lse, total.mu, part.lse, part.mu))
    B, H, L, DV = out.shape
    if into is None and out.dtype == dtype:
        into = out, t_out
    elif into is None:
        into = [None if x is None else torch.empty_like(x, dtype=dtype) for x in (out, t_out)]
    skipped = start // ROWS if into[0] is out else 0
    tiles = cdiv(L, ROWS) - skipped
    tensors = (*map(pointer, (*into, out, t_out)), lse, mu, pointer(o_i), pointer(t_o_i))
    constexprs = {"DV": DV, "BLOCK_DV": triton.next_power_of_2(DV), "BLOCK_M": ROWS}
    constexprs["num_warps"] = 4
    args = (*tensors, lse_i, mu_i, H, L, start, tiles, skipped)
    merged = Saved(into[0], lse, into[1], mu)
    return Launch(merge_kernel, (tiles * B * H,), args, constexprs), merged
