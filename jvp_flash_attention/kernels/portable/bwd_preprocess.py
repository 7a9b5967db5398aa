"""First launch of the backward of O, but for heads that fit a block (`sm90/bwd_head.py`), and of
(O, tO): row sums, O(L D) and no matrix product.

    h = rowsum(dtO ∘ O)          w = rowsum(dO ∘ O) + rowsum(dtO ∘ tO)

w is what FlashAttention calls delta. Where it is asked for, Σ dO over the rows too: it is Σ dV, for
the rows of P add to one.
"""

import triton
import triton.language as tl

from ..block_info import first_row, sequence_of, tiles_of
from .primitives import (
    LOG2E,
    head_of,
    load_tile,
)


@triton.jit
def _load(
    X, b, h, m0, end, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """Rows in float32. Strides count UNIT elements (`problem.in_units`)."""
    X = (X[0], X[1] * UNIT, X[2] * UNIT, X[3] * UNIT)
    x = load_tile(X, b, h, m0, end, BLOCK_M, D, BLOCK_D, True, False, False, COLUMN)
    return x.to(tl.float32)


@triton.jit
def _row_sums(
    D_O, D_T_O, O, T_O, SUMS, b, h, m0, end, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """w and h over BLOCK_D columns, of which D exist, from COLUMN on. Σ dO goes to SUMS."""
    o = _load(O, b, h, m0, end, UNIT, BLOCK_M, D, BLOCK_D, COLUMN)
    w = tl.zeros([BLOCK_M], tl.float32)
    h_sum = w
    if D_O is not None:
        d_o = _load(D_O, b, h, m0, end, UNIT, BLOCK_M, D, BLOCK_D, COLUMN)
        w += tl.sum(d_o * o, 1)
        if SUMS is not None:
            j = tl.arange(0, BLOCK_D)
            tl.store(SUMS + COLUMN + j, tl.sum(d_o, 0), mask=j < D)
    if D_T_O is not None:
        t_o = _load(T_O, b, h, m0, end, UNIT, BLOCK_M, D, BLOCK_D, COLUMN)
        d_t_o = _load(D_T_O, b, h, m0, end, UNIT, BLOCK_M, D, BLOCK_D, COLUMN)
        h_sum += tl.sum(d_t_o * o, 1)
        w += tl.sum(d_t_o * t_o, 1)
    return w, h_sum


@triton.jit(do_not_specialize=["H", "L", "sequences"])
def bwd_preprocess_kernel(
    D_O, D_T_O, O, T_O, LSE, MU, H_SUM, W_SUM, STATISTICS, SUMS, CU_Q, H, L, sequences,
    DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    SEQUENCES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: h and w of BLOCK_M queries of one head, whose columns are read in two pieces.
    STATISTICS, for sm90: by head four rows, LSE in base 2, μ, h and w, or without dtO two, LSE and
    w, in which each packed sequence begins a new tile and the last one is padded with
    LSE = inf. SUMS: `Call.sums`, of which dQ's part is another launch's."""
    tiles = tiles_of(CU_Q, L, BLOCK_M, sequences)
    b, h, tile = head_of(tl.program_id(0), tiles, H, False)
    place = tile * BLOCK_M
    m0 = place
    end = L
    if CU_Q is not None:
        n = tl.arange(0, SEQUENCES)
        tile, first, rows, _, _ = sequence_of(CU_Q, CU_Q, tile, n, L, L, sequences, BLOCK_M)
        m0 = first + tile * BLOCK_M
        end = first + rows
    i = m0 + tl.arange(0, BLOCK_M)
    row = first_row(b, h, H, L) + i
    if SUMS is not None:
        SUMS += (((b * tiles + tile) * 2 + 1) * H + h) * DV
    given = (D_O, D_T_O, O, T_O, SUMS, b, h, m0, end)
    w, h_sum = _row_sums(*given, UNIT, BLOCK_M, min(DV, D1), D1, 0)
    if D2 > 0:
        w2, h_sum2 = _row_sums(*given, UNIT, BLOCK_M, DV - D1, D2, D1)
        w += w2
        h_sum += h_sum2
    if D_T_O is not None:
        tl.store(H_SUM + row, h_sum, mask=i < end)
    tl.store(W_SUM + row, w, mask=i < end)
    if STATISTICS is not None:
        padded = tiles * BLOCK_M
        KINDS: tl.constexpr = 2 if D_T_O is None else 4
        at = STATISTICS + first_row(b, h, H, KINDS) * padded + place + tl.arange(0, BLOCK_M)
        tl.store(at, tl.load(LSE + row, mask=i < end, other=float("inf")) * LOG2E)
        if D_T_O is not None:
            tl.store(at + padded, tl.load(MU + row, mask=i < end, other=0.0))
            tl.store(at + 2 * padded, h_sum)
        tl.store(at + (KINDS - 1) * padded, w)
