"""First launch of the backward of O, and of (O, tO): row sums, O(L D) and no matrix product.

    h = rowsum(dtO ∘ O)          w = rowsum(dO ∘ O) + rowsum(dtO ∘ tO)

w is what FlashAttention calls delta.
"""

import triton
import triton.language as tl

from ..block_info import first_row
from .primitives import (
    LOG2E,
    head_of,
    load_tile,
)


@triton.jit(do_not_specialize=["H", "L"])
def bwd_preprocess_kernel(
    D_O, D_T_O, O, T_O, LSE, MU, H_SUM, W_SUM, STATISTICS, H, L,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: h and w of BLOCK_M queries of one head. STATISTICS, for sm90: by head four rows,
    LSE in base 2, μ, h and w, padded to a multiple of BLOCK_M with LSE = inf."""
    b, h, tile = head_of(tl.program_id(0), tl.cdiv(L, BLOCK_M), H, False)
    m0 = tile * BLOCK_M
    i = m0 + tl.arange(0, BLOCK_M)
    row = first_row(b, h, H, L) + i
    o = load_tile(O, b, h, m0, L, BLOCK_M, DV, BLOCK_DV, True, False).to(tl.float32)
    w = tl.zeros([BLOCK_M], tl.float32)
    if D_O is not None:
        d_o = load_tile(D_O, b, h, m0, L, BLOCK_M, DV, BLOCK_DV, True, False).to(tl.float32)
        w += tl.sum(d_o * o, 1)
    if D_T_O is not None:
        t_o = load_tile(T_O, b, h, m0, L, BLOCK_M, DV, BLOCK_DV, True, False).to(tl.float32)
        d_t_o = load_tile(D_T_O, b, h, m0, L, BLOCK_M, DV, BLOCK_DV, True, False).to(tl.float32)
        h_sum = tl.sum(d_t_o * o, 1)
        w += tl.sum(d_t_o * t_o, 1)
        tl.store(H_SUM + row, h_sum, mask=i < L)
    tl.store(W_SUM + row, w, mask=i < L)
    if STATISTICS is not None:
        padded = tl.cdiv(L, BLOCK_M) * BLOCK_M
        at = STATISTICS + first_row(b, h, H, 4) * padded + i
        tl.store(at, tl.load(LSE + row, mask=i < L, other=float("inf")) * LOG2E)
        tl.store(at + padded, tl.load(MU + row, mask=i < L, other=0.0))
        tl.store(at + 2 * padded, h_sum)
        tl.store(at + 3 * padded, w)
