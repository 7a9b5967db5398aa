"""First launch of the backward of O, and of (O, tO): row sums, O(L D) and no matrix product.

    h = rowsum(dtO ∘ O)          w = rowsum(dO ∘ O) + rowsum(dtO ∘ tO)

w is what FlashAttention calls delta.
"""

import triton
import triton.language as tl

from ..block_info import first_row, sequence_of, tiles_of
from .primitives import (
    LOG2E,
    head_of,
    load_tile,
)


@triton.jit(do_not_specialize=["H", "L", "sequences"])
def bwd_preprocess_kernel(
    D_O, D_T_O, O, T_O, LSE, MU, H_SUM, W_SUM, STATISTICS, CU_Q, H, L, sequences,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """One program: h and w of BLOCK_M queries of one head. STATISTICS, for sm90: by head four rows,
    LSE in base 2, μ, h and w, in which each packed sequence begins a new tile and the last one is
    padded with LSE = inf."""
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
    o = load_tile(O, b, h, m0, end, BLOCK_M, DV, BLOCK_DV, True, False).to(tl.float32)
    w = tl.zeros([BLOCK_M], tl.float32)
    if D_O is not None:
        d_o = load_tile(D_O, b, h, m0, end, BLOCK_M, DV, BLOCK_DV, True, False).to(tl.float32)
        w += tl.sum(d_o * o, 1)
    if D_T_O is not None:
        t_o = load_tile(T_O, b, h, m0, end, BLOCK_M, DV, BLOCK_DV, True, False).to(tl.float32)
        d_t_o = load_tile(D_T_O, b, h, m0, end, BLOCK_M, DV, BLOCK_DV, True, False).to(tl.float32)
        h_sum = tl.sum(d_t_o * o, 1)
        w += tl.sum(d_t_o * t_o, 1)
        tl.store(H_SUM + row, h_sum, mask=i < end)
    tl.store(W_SUM + row, w, mask=i < end)
    if STATISTICS is not None:
        padded = tiles * BLOCK_M
        at = STATISTICS + first_row(b, h, H, 4) * padded + place + tl.arange(0, BLOCK_M)
        tl.store(at, tl.load(LSE + row, mask=i < end, other=float("inf")) * LOG2E)
        tl.store(at + padded, tl.load(MU + row, mask=i < end, other=0.0))
        tl.store(at + 2 * padded, h_sum)
        tl.store(at + 3 * padded, w)
