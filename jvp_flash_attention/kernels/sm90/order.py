"""In which order the programs of a pass take the tiles of packed sequences: those that see most
first.

Programs share out the tiles at launch (`primitives.work_item`), when only the device knows the
lengths. A round of tiles goes to them from the first to the last and the next one back, so with
falling costs all get the same sum, up to about one tile. Two launches of a few microseconds: what
each tile sees, then its rank.
"""

# Triton's annotations name what a kernel receives, not what its caller passes.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Iterator

import triton
import triton.language as tl

from ... import call
from ..block_info import keys_begin, keys_end, sequence_of
from ..launch_cache import Launch
from ..problem import Call, Problem, cdiv

BLOCK = 128  # tiles that a program ranks, and those that it compares with at a time


@triton.jit(do_not_specialize=["rows", "others", "sequences"])
def seen_kernel(
    CU, CU_OTHER, ORDER, rows, others, sequences,
    ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, LOWER_RIGHT: tl.constexpr,
    SEQUENCES: tl.constexpr,
):  # fmt: skip
    """One program: how many rows of the other side a tile of ROWS sees, if it is a whole one; -1
    where no sequence needs it. LEFT and RIGHT bound the band as this side sees it. ORDER: (2,
    tiles), here its first row."""
    tile = tl.program_id(0)
    n = tl.arange(0, SEQUENCES)
    at, _, rows, _, others = sequence_of(CU, CU_OTHER, tile, n, rows, others, sequences, ROWS)
    first = at * ROWS
    shift = others - rows if LOWER_RIGHT else 0
    begin = keys_begin(first + shift, LEFT)
    end = keys_end(first + shift, ROWS, others, RIGHT, True)
    seen = tl.where(first < rows, max(end - begin, 0), -1)
    tl.store(ORDER + tile, seen)


@triton.jit(do_not_specialize=["tiles"])
def order_kernel(ORDER, tiles, BLOCK: tl.constexpr):
    """One program: the places of BLOCK tiles among all, by how much they see."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = tl.load(ORDER + i, mask=i < tiles, other=-2)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, tiles, BLOCK):
        j = start + tl.arange(0, BLOCK)
        other = tl.load(ORDER + j, mask=j < tiles, other=-3)
        more = other[None, :] > seen[:, None]
        before = (other[None, :] == seen[:, None]) & (j[None, :] < i[:, None])
        place += tl.sum((more | before).to(tl.int32), 1)
    tl.store(ORDER + tiles + place, i, mask=i < tiles)


def launches(p: Problem, c: Call, queries: bool, rows: int) -> Iterator[Launch]:
    """Those that rank the tiles of so many queries, or keys, where that is asked for."""
    left, right = call.band(p.spec)
    own, other = c.x.cu_q, c.x.cu_q if c.x.cu_k is None else c.x.cu_k
    sizes, order = (p.L, p.S), c.q_order
    if not queries:  # which see the queries from j - right to j + left
        left, right, own, other, sizes, order = right, left, other, own, (p.S, p.L), c.k_order
    if order is None:
        return
    tiles = order.shape[1]
    constexprs = {"ROWS": rows, "LEFT": left, "RIGHT": right, "LOWER_RIGHT": p.spec.lower_right}
    constexprs |= {"SEQUENCES": p.sequence_slots, "num_warps": 1}
    yield Launch(seen_kernel, (tiles,), (own, other, order, *sizes, p.sequences), constexprs)
    yield Launch(order_kernel, (cdiv(tiles, BLOCK),), (order, tiles), {"BLOCK": BLOCK})
