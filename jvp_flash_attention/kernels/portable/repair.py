"""The second launch of a forward with its JVP on Hopper: tiles that a hidden value has spoiled.

A warp-specialised kernel (sm90/forward.py) multiplies P by V and tV as they lie in shared memory,
and by tS as K, tK and a mask's tangent make it. P is 0 where a pair is hidden, but 0 · NaN and
0 · inf are NaN. It leaves LSE = NaN in rows whose O or
tO is not finite. This kernel looks for such rows and computes their tiles anew by `forward.py`,
which keeps hidden values out. Rows that see NaN are NaN again.
"""

import triton
import triton.language as tl

from ..block_info import first_row, sequence_of, tiles_of
from .forward import forward_kernel
from .primitives import UNSPECIALIZED


@triton.jit
def row_of(
    item, CU_Q, CU_K, H, L, S, sequences, tiles, SEQUENCES: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Where an item, counted in the order of rows, begins in what is kept by row, (B, H, L)."""
    tile = item % tiles
    row = tile * BLOCK_M
    if CU_Q is not None:
        tile, q0, rows, _, _ = sequence_of(
            CU_Q, CU_Q if CU_K is None else CU_K, tile, tl.arange(0, SEQUENCES), L, S, sequences,
            BLOCK_M,
        )  # fmt: skip
        row = q0 + tl.minimum(tile * BLOCK_M, rows)
    return first_row(0, item // tiles, H, L) + row


@triton.jit
def any_nan(LSE, begin, end, MOST: tl.constexpr, SPLIT: tl.constexpr):
    """Whether one of these rows, MOST or fewer, has LSE = NaN."""
    row = begin + tl.arange(0, MOST)
    lse = tl.load(LSE + (2 if SPLIT else 1) * row, mask=row < end, other=0.0)
    return tl.max(tl.where(lse == lse, 0, 1), 0) > 0


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "items", "share"))
def repair_kernel(
    Q, K, V, T_Q, T_K, T_V, MASK, T_MASK, SEED, CU_Q, CU_K, KV_BLOCKS, O, T_O, LSE, MU,
    scale, softcap, threshold, keep_scale, batch_per_seed, H, L, S, sequences, items, share,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, LOWER_RIGHT: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BOOL: tl.constexpr, WHOLE: tl.constexpr,
    PRESCALE: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """One program: `share` of the `items` tiles of `forward_kernel`, at most MOST."""
    SPLIT: tl.constexpr = MASK is not None and not BOOL
    tiles = tiles_of(CU_Q, L, BLOCK_M, sequences)
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, items)
    row = row_of(first, CU_Q, CU_K, H, L, S, sequences, tiles, SEQUENCES, BLOCK_M)
    last = row_of(end, CU_Q, CU_K, H, L, S, sequences, tiles, SEQUENCES, BLOCK_M)
    if not any_nan(LSE, row, last, MOST * BLOCK_M, SPLIT):
        return
    for item in range(first, end):
        after = row_of(item + 1, CU_Q, CU_K, H, L, S, sequences, tiles, SEQUENCES, BLOCK_M)
        if any_nan(LSE, row, after, BLOCK_M, SPLIT):
            pid = item
            if RIGHT is not None:  # as `head_of` counts
                pid = item // tiles * tiles + (tiles - 1 - item % tiles)
            forward_kernel(
                Q, K, V, T_Q, T_K, T_V, MASK, T_MASK, SEED, CU_Q, CU_K, KV_BLOCKS, O, T_O, LSE, MU,
                scale, softcap, threshold, keep_scale, batch_per_seed, H, L, S, sequences, pid,
                GROUP, D, DV, BLOCK_D, BLOCK_DV, LEFT, RIGHT, LOWER_RIGHT, SEQUENCES,
                BLOCK_Q, BLOCK_K, BOOL, WHOLE, PRESCALE, PRECISION, PARTS, TMA, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        row = after
