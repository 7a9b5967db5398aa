"""Attention over some keys and over others, put together in one pass over memory.

    w  = 1 / (1 + exp(LSE − LSEᵢ))         δ = μᵢ − μ         ΔO = Oᵢ − O         ΔtO = tOᵢ − tO
    O  ← O + w ΔO                          LSE ← log(exp LSE + exp LSEᵢ)
    tO ← tO + w ΔtO + w (1 − w) δ ΔO       μ ← μ + w δ

Where it comes from is in distributed/merge.py, which computes the same in plain PyTorch. Sums are
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

from .launch import cdiv, packed

ROWS = 16  # of a program


@triton.jit(do_not_specialize=["L", "start", "tiles", "skipped"])
def merge_kernel(
    OUT, T_OUT, O, T_O, LSE, MU, O_I, T_O_I, LSE_I, MU_I, L, start, tiles, skipped,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of one head. Row `start` of the total is the first one of the part."""
    pid = tl.program_id(0)
    bh = (pid // tiles).to(tl.int64)
    i = (pid % tiles + skipped) * BM + tl.arange(0, BM)
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


def merge(total: tuple, part: tuple, start: int, dtype: torch.dtype) -> tuple:
    """(O, tO, LSE, μ) of both; LSE and μ of the total are overwritten, O and tO where they have
    `dtype`. tO and μ may be None. Row `start` is the first one of the part."""
    given: Any = map(packed, total)
    out, t_out, lse, mu = given
    B, H, L, DV = out.shape
    in_place = out.dtype == dtype
    new = out if in_place else torch.empty_like(out, dtype=dtype)
    t_new = t_out
    if t_out is not None and not in_place:
        t_new = torch.empty_like(t_out, dtype=dtype)
    skipped = start // ROWS if in_place else 0
    tiles = cdiv(L, ROWS) - skipped
    if tiles * B * H > 0:
        with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
            merge_kernel[(tiles * B * H,)](
                *(new, t_new, out, t_out, lse, mu, *map(packed, part), L, start, tiles, skipped),
                DV=DV, BLOCK_DV=triton.next_power_of_2(DV), BM=ROWS, num_warps=4,
            )  # fmt: skip
    return new, t_new, lse, mu
