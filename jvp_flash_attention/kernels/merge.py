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

from ..call import Saved
from .launch_cache import Launch
from .problem import cdiv, maybe_contiguous

ROWS = 16  # of a program


@triton.jit(do_not_specialize=["L", "start", "tiles", "skipped"])
def merge_kernel(
    OUT, T_OUT, O, T_O, LSE, MU, O_I, T_O_I, LSE_I, MU_I, L, start, tiles, skipped,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head. Row `start` of the total is the part's first."""
    pid = tl.program_id(0)
    bh = (pid // tiles).to(tl.int64)
    i = (pid % tiles + skipped) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DV)
    inside, there = i < L, (i < L) & (i >= start)
    row, row_i = bh * L + i, bh * (L - start) + i - start
    at, at_i = row[:, None] * DV + d[None, :], row_i[:, None] * DV + d[None, :]
    column = d[None, :] < DV

    lse = tl.load(LSE + row, mask=inside, other=float("-inf"))
    lse_i = tl.load(LSE_I + row_i, mask=there, other=float("-inf"))
    # a row that sees nothing of the part, and perhaps nothing at all, stays as it is
    w = tl.where(lse_i == float("-inf"), 0.0, 1.0 / (1.0 + tl.exp(lse - lse_i)))
    base = tl.maximum(lse, lse_i)
    base = tl.where(base == float("-inf"), 0.0, base)
    tl.store(LSE + row, base + tl.log(tl.exp(lse - base) + tl.exp(lse_i - base)), mask=inside)

    o = tl.load(O + at, mask=inside[:, None] & column, other=0.0).to(tl.float32)
    o_i = tl.load(O_I + at_i, mask=there[:, None] & column, other=0.0).to(tl.float32)
    delta_o = o_i - o
    out = o + w[:, None] * delta_o
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=inside[:, None] & column)
    if T_O is not None:
        mu = tl.load(MU + row, mask=inside, other=0.0)
        delta = tl.load(MU_I + row_i, mask=there, other=0.0) - mu
        tl.store(MU + row, mu + w * delta, mask=inside)
        t_o = tl.load(T_O + at, mask=inside[:, None] & column, other=0.0).to(tl.float32)
        t_o_i = tl.load(T_O_I + at_i, mask=there[:, None] & column, other=0.0).to(tl.float32)
        c = w * (1.0 - w) * delta
        t_out = t_o + w[:, None] * (t_o_i - t_o) + c[:, None] * delta_o
        tl.store(T_OUT + at, t_out.to(T_OUT.dtype.element_ty), mask=inside[:, None] & column)


def merge(total: Saved, part: Saved, start: int, dtype: torch.dtype) -> Saved:
    """Both together; LSE and μ of the total are overwritten, O and tO where they have `dtype`. Row
    `start` is the first one of the part."""
    launch, merged = merge_launch(total, part, start, dtype)
    if launch.grid[0] > 0:
        with torch.cuda.device(merged.out.device) if merged.out.is_cuda else nullcontext():
            launch.run()
    return merged


def merge_launch(total: Saved, part: Saved, start: int, dtype: torch.dtype) -> tuple[Launch, Saved]:
    """What `merge` launches, and where the result will be."""
    given: Any = map(maybe_contiguous, total)
    out, lse, t_out, mu = given
    o_i, lse_i, t_o_i, mu_i = map(maybe_contiguous, part)
    B, H, L, DV = out.shape
    in_place = out.dtype == dtype
    new = out if in_place else torch.empty_like(out, dtype=dtype)
    t_new = t_out
    if t_out is not None and not in_place:
        t_new = torch.empty_like(t_out, dtype=dtype)
    skipped = start // ROWS if in_place else 0
    tiles = cdiv(L, ROWS) - skipped
    tensors = (new, t_new, out, t_out, lse, mu, o_i, t_o_i, lse_i, mu_i)
    constexprs = {"DV": DV, "BLOCK_DV": triton.next_power_of_2(DV), "BLOCK_M": ROWS}
    constexprs["num_warps"] = 4
    args = (*tensors, L, start, tiles, skipped)
    return Launch(merge_kernel, (tiles * B * H,), args, constexprs), Saved(new, lse, t_new, mu)
