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
from .primitives import UNSPECIALIZED, head_of


@triton.jit
def any_nan(LSE, row, inside, SPLIT: tl.constexpr):
    """Whether one of the rows has LSE = NaN."""
    lse = tl.load(LSE + (2 if SPLIT else 1) * row, mask=inside, other=0.0)
    return tl.max(tl.max(tl.where(lse == lse, 0, 1), 1), 0) > 0


@triton.jit
def any_spoiled(
    LSE, items, end, tiles, H, L, BLOCK_M: tl.constexpr, REVERSED: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Whether one of the items (n, 1) below `end` has a row with LSE = NaN."""
    b, h, tile = head_of(items, tiles, H, REVERSED)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    return any_nan(LSE, first_row(b, h, H, L) + i, (items < end) & (i < L), SPLIT)


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
    """One program: `share` of the `items` tiles of `forward_kernel`, at most MOST; of packed
    sequences one."""
    SPLIT: tl.constexpr = MASK is not None and not BOOL
    pid = tl.program_id(0)
    REVERSED: tl.constexpr = RIGHT is not None
    tiles = tiles_of(CU_Q, L, BLOCK_M, sequences)
    if CU_Q is not None:
        b, h, tile = head_of(pid, tiles, H, REVERSED)
        tile, q0, rows, _, _ = sequence_of(
            CU_Q, CU_Q if CU_K is None else CU_K, tile, tl.arange(0, SEQUENCES), L, S, sequences,
            BLOCK_M,
        )  # fmt: skip
        i = tile * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        if not any_nan(LSE, first_row(b, h, H, L) + q0 + i, i < rows, SPLIT):
            return
        forward_kernel(
            Q, K, V, T_Q, T_K, T_V, MASK, T_MASK, SEED, CU_Q, CU_K, KV_BLOCKS, O, T_O, LSE, MU,
            scale, softcap, threshold, keep_scale, batch_per_seed, H, L, S, sequences, pid,
            GROUP, D, DV, BLOCK_D, BLOCK_DV, LEFT, RIGHT, LOWER_RIGHT, SEQUENCES,
            BLOCK_Q, BLOCK_K, BOOL, WHOLE, PRESCALE, PRECISION, PARTS, TMA, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        first = pid * share
        end = tl.minimum(first + share, items)
        mine = first + tl.arange(0, MOST)[:, None]
        if not any_spoiled(LSE, mine, end, tiles, H, L, BLOCK_M, REVERSED, SPLIT):
            return
        for item in range(first, end):
            one = item + tl.zeros([1, 1], tl.int32)
            if any_spoiled(LSE, one, end, tiles, H, L, BLOCK_M, REVERSED, SPLIT):
                forward_kernel(
                    Q, K, V, T_Q, T_K, T_V, MASK, T_MASK, SEED, CU_Q, CU_K, KV_BLOCKS,
                    O, T_O, LSE, MU,
                    scale, softcap, threshold, keep_scale, batch_per_seed, H, L, S, sequences, item,
                    GROUP, D, DV, BLOCK_D, BLOCK_DV, LEFT, RIGHT, LOWER_RIGHT, SEQUENCES,
                    BLOCK_Q, BLOCK_K, BOOL, WHOLE, PRESCALE, PRECISION, PARTS, TMA,
                    BLOCK_M, BLOCK_N,
                )  # fmt: skip
