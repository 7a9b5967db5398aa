"""Which keys a query tile sees, which queries see a key tile, which pairs of both count, and where
rows lie in memory.

What is computed from positions is a band: query i sees key j where i − LEFT <= j <= i + RIGHT, None
for no bound (top-left aligned where the lengths differ). Causal is LEFT = None, RIGHT = 0. Both
bounds are known at compile time, and where either is negative or LEFT is given, rows may see
nothing. A range of tiles has three parts, so that only tiles at an edge pay for a check; kernels
take them in this order:

    PHASE 0     every pair counts
    PHASE 1     crossed by the right bound, or by the end of the keys
    PHASE 2     crossed by the left bound

A block mask lists the blocks that a block sees. Ranges are then of the rows of the listed blocks,
one after the other, and `listed_row` says which row that is. Tiles divide blocks.

Packed sequences lie behind one another in one row. CU, (sequences + 1,), says where each begins,
and None that there is one. A program has a tile of one sequence, and all ranges are of its queries
and keys. What lies behind the last one is a sequence whose other side is empty.

The functions are Triton's; the Gluon kernels of sm90 compile the same ones
(sm90/primitives.py).
"""

# Triton's annotations name what a kernel receives, not what its caller passes.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import triton
import triton.language as tl

from .. import call
from ..call import Spec

FAR = 2**30  # further than any row is long


def band(spec: Spec) -> dict[str, Any]:
    """The compile-time arguments of a kernel that say which pairs count. Kernels look for rows that
    see nothing where LEFT is given, so a negative RIGHT comes with one, and LOWER_RIGHT."""
    left, right = call.band(spec)
    if left is None and right is not None and (right < 0 or spec.lower_right):
        left = FAR
    return {"LEFT": left, "RIGHT": right, "LOWER_RIGHT": spec.lower_right}


@triton.jit
def tiles_of(CU, rows, BLOCK: tl.constexpr, sequences):
    """How many tiles the rows of a head have, at most: each packed sequence begins a new one."""
    tiles = tl.cdiv(rows, BLOCK) if CU is None else rows // BLOCK + sequences + 1
    return tiles


@triton.jit
def sequence_of(CU, CU_OTHER, tile, n, rows, others, sequences, BLOCK: tl.constexpr):
    """Of a tile among `tiles_of`, its sequence: (tile of it, its first row, its rows; the first row
    and the rows of its other side). Sequence n is given the tiles from cu[n] // BLOCK + n on; those
    that it does not need begin behind its rows. n: 0, 1, ... up to `sequences` or more."""
    begins = tl.load(CU + n, mask=n <= sequences, other=rows) // BLOCK + n
    n = tl.max(tl.where((begins <= tile) & (n <= sequences), n, 0))
    first = tl.load(CU + n)
    end = tl.load(CU + n + 1, mask=n < sequences, other=rows)
    first_other = tl.load(CU_OTHER + n)
    end_other = tl.load(CU_OTHER + n + 1, mask=n < sequences, other=0)
    end_other = tl.where(n < sequences, end_other, first_other)
    tile -= first // BLOCK + n
    return tile, first, end - first, first_other, end_other - first_other


@triton.jit
def listed_rows(LIST, rows, BLOCK: tl.constexpr):
    """How many rows the blocks of a list (`call.Blocks`) have; the last one of all ends with the
    rows."""
    n = tl.load(LIST)
    last = tl.load(LIST + n)
    return tl.where(n > 0, n * BLOCK - tl.maximum((last + 1) * BLOCK - rows, 0), 0)


@triton.jit
def listed_row(LIST, x, BLOCK: tl.constexpr):
    """Which row is the x-th of the blocks of a list."""
    return tl.load(LIST + 1 + x // BLOCK) * BLOCK + x % BLOCK


@triton.jit
def first_row(b, h, H, L):
    """Where the rows of a head begin in what is kept by row, (B, H, L): LSE, μ and row sums."""
    return (b * H + h).to(tl.int64) * L


@triton.jit
def head_at(X, b, h):
    """Where a head begins in a tensor (pointer, stride_b, stride_h, ...)."""
    return X[0] + tl.cast(b, tl.int64) * X[1] + tl.cast(h, tl.int64) * X[2]


@triton.jit
def row_at(X, b, h, row):
    """Where a row begins in a tensor (pointer, stride_b, stride_h, stride_row)."""
    return head_at(X, b, h) + tl.cast(row, tl.int64) * X[3]


@triton.jit
def pair_at(X, b, h, i, j):
    """Where the pairs of rows i and columns j lie in a mask (pointer, four strides)."""
    return row_at(X, b, h, i) + tl.cast(j, tl.int64) * X[4]


@triton.jit
def keys_end(m0, rows: tl.constexpr, S, RIGHT: tl.constexpr, SHIFTED: tl.constexpr = False):
    """The first key on the right of those that rows m0 ... m0 + rows see; of one row, how many keys
    it and all after it see. SHIFTED: m0 may be negative."""
    end = S
    if RIGHT is not None:
        end = min(S, m0 + (rows + RIGHT))
        if RIGHT < 0 or SHIFTED:
            end = max(end, 0)
    return end


@triton.jit
def keys_begin(m0, LEFT: tl.constexpr):
    """The first key that row m0, and no row after it, may see."""
    begin = 0
    if LEFT is not None:
        begin = max(m0 - LEFT, 0)
    return begin


@triton.jit
def key_parts(
    m0, S, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SHIFTED: tl.constexpr = False,
):  # fmt: skip
    """Where the keys that rows m0 ... m0 + BLOCK_M see begin and end, in phases 0, 1 and 2.
    SHIFTED: m0 is any number, as where rows are counted from the last one."""
    end = keys_end(m0, BLOCK_M, S, RIGHT, SHIFTED)
    clear_end = keys_end(m0, 1, S, RIGHT, SHIFTED) // BLOCK_N * BLOCK_N
    begin = 0
    clear = 0
    if LEFT is not None:
        begin = keys_begin(m0, LEFT) // BLOCK_N * BLOCK_N
        clear = tl.cdiv(keys_begin(m0 + (BLOCK_M - 1), LEFT), BLOCK_N) * BLOCK_N
        clear = max(min(clear, tl.cdiv(end, BLOCK_N) * BLOCK_N), begin)
        clear_end = max(clear_end, clear)
    return clear, clear_end, clear_end, end, begin, clear


@triton.jit
def query_parts(
    n0, L, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SHIFTED: tl.constexpr = False,
):  # fmt: skip
    """Where the queries that see keys n0 ... n0 + BLOCK_N begin and end, in phases 0, 1 and 2.
    SHIFTED: n0 is any number."""
    begin = 0
    clear = 0
    end = L
    clear_end = L
    if LEFT is not None:
        end = min(L, n0 + (BLOCK_N + LEFT))
        if LEFT < 0 or SHIFTED:
            end = max(end, 0)
    if RIGHT is not None:
        begin = n0 // BLOCK_M * BLOCK_M
        clear = n0 + BLOCK_N - 1
        if RIGHT != 0 or SHIFTED:
            begin = max(n0 - RIGHT, 0) // BLOCK_M * BLOCK_M
            clear = max(clear - RIGHT, 0)
        clear = min(tl.cdiv(clear, BLOCK_M) * BLOCK_M, tl.cdiv(end, BLOCK_M) * BLOCK_M)
    if LEFT is not None:
        clear = max(clear, begin)
        clear_end = max(min(L, n0 + (LEFT + 1)) // BLOCK_M * BLOCK_M, clear)
    return clear, clear_end, begin, clear, clear_end, end


@triton.jit
def is_valid(i, j, S, LEFT: tl.constexpr, RIGHT: tl.constexpr, shift=0):
    """Which pairs of queries i and keys j count: inside the keys and the band, in which the queries
    stand at i + shift. A row's bounds are computed once, and compared with its keys."""
    end = S + 0 * i
    if RIGHT is not None:
        end = tl.minimum(end, i + (shift + RIGHT + 1))
    valid = j < end
    if LEFT is not None:
        valid = valid & (j >= i + (shift - LEFT))
    return valid
