"""What the warp-specialised gradient passes (`bwd_dkdv.py`, `bwd_dq.py`) share: which rows a tile
sees, their barriers, what their producers fetch, how P and R pass from one warpgroup to the other,
what the second makes of them, and how results are stored.

A pass walks with a tile of one side, queries or keys, along the other; the side that stays has one
slot, the other several.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .primitives import (
    ROWS,
    barriers,
    keep_alive,
    lane_sums,
    listed_row,
    listed_rows,
    load,
    row_at,
    sequence_numbers,
    sequence_of,
    store,
    store_part,
    work_item,
)


@gluon.jit
def tile_of(e, work, PAIRS: gl.constexpr, SEQUENCES: gl.constexpr, WARPS: gl.constexpr):
    """A work item: batch entry and head, the number of its sequence, the first row of its tile;
    where the sequence begins on its own side, the rows of that, and the same of the other side, of
    which a tile that no sequence needs sees none."""
    CU, CU_OTHER, _lists, sequences, heads, rows, others, tiles, items = work
    b, h, tile = work_item(e, tiles, heads, PAIRS, None if CU is None else items // tiles)
    n = 0
    first = 0
    first_other = 0
    if CU is not None:
        all_n = sequence_numbers(SEQUENCES, WARPS)
        n = tile
        tile, first, rows, first_other, others = sequence_of(
            CU, CU_OTHER, tile, all_n, rows, others, sequences, ROWS
        )
        n -= tile + first // ROWS
        others = gl.where(tile * ROWS < rows, others, 0)
    return b, h, n, tile * ROWS, first, rows, first_other, others


@gluon.jit
def seen_rows(lists, b, h, at, rows, BLOCK: gl.constexpr, BLOCK_OTHER: gl.constexpr):
    """The list of blocks of the other side that the block of row `at` sees, and how many rows they
    have; without lists that is all of them."""
    blocks = 0
    if lists is not None:
        blocks = row_at(lists, b, h, at // BLOCK)
        rows = listed_rows(blocks, rows, BLOCK_OTHER)
    return blocks, rows


@gluon.jit
def seen_row(lists, blocks, x, BLOCK_OTHER: gl.constexpr):
    """Which row is the x-th of them."""
    if lists is not None:
        x = listed_row(blocks, x, BLOCK_OTHER)
    return x


@gluon.jit
def clear_behind(tile, rows, D: gl.constexpr):
    """0 behind the first rows of a tile in shared memory, which belong to the next sequence. Two
    warpgroups may clear the same tile, for they write the same, but then neither changes it
    otherwise."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    i = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), 1)
    x = tile.load(layout)
    tile.store(gl.where(i < rows, x, 0.0))
    fence_async_shared()


@gluon.jit
def store_rows(x, x_rows, tile, buffer, b, h, row, rows, D: gl.constexpr):
    """A tile of results from shared memory, of which so many rows belong to the sequence. x_rows:
    the results once more (pointer, strides), where sequences end inside of a tile."""
    if x_rows is None:
        store(x, [b, h, row, 0], buffer)
    else:
        if rows >= ROWS:
            store(x, [b, h, row, 0], buffer)
        else:
            store_part(x_rows, tile, b, h, row, rows, x.shape[3], 0, D)


@gluon.jit
def bwd_barriers(STAGES_Q: gl.constexpr, STAGES_K: gl.constexpr):
    """Ready and free: queries, keys, P and R. Both warpgroups free a tile, one frees P and R."""
    return (
        barriers(STAGES_Q, 1),
        barriers(STAGES_Q, 2),
        barriers(STAGES_K, 1),
        barriers(STAGES_K, 2),
        barriers(1, 1),
        barriers(1, 1),
    )


@gluon.jit
def fetch(x, buffers, ready, free, at, slot, phase):
    """Four tiles, of which the last may be absent, into a slot once it is free."""
    mbarrier.wait(free.index(slot), phase)
    bar = ready.index(slot)
    TILES: gl.constexpr = 3 if x[3] is None else 4
    mbarrier.expect(bar, TILES * x[0].block_type.nbytes)
    for i in gl.static_range(TILES):
        load(x[i], at, bar, buffers[i].index(slot))


@gluon.jit
def store_p(p, r, p_tile, r_tile, ready, free, phase):
    """P and R to the other warpgroup, once it has read the last ones."""
    mbarrier.wait(free.index(0), phase)
    p_tile.store(p)
    r_tile.store(r)
    mbarrier.arrive(ready.index(0), count=1)


@gluon.jit
def load_p(h_m, g, p_tile, r_tile, ready, free, phase, S_L: gl.constexpr):
    """dtS = P ∘ Hm and dS = P ∘ G + R ∘ Hm, with P and R from the other warpgroup."""
    mbarrier.wait(ready.index(0), phase)
    p = p_tile.load(S_L)
    r = r_tile.load(S_L)
    mbarrier.arrive(free.index(0), count=1)
    return p * h_m, p * g + r * h_m


@gluon.jit
def add_products(d_s, d_t_s, x, t_x, d_x, d_t_x, P_L: gl.constexpr):
    """dX + dS X + dtS tX and dtX + dtS X, of which X is the other side."""
    d_t_s16 = gl.convert_layout(d_t_s.to(x.dtype), P_L, assert_trivial=True)
    d_s16 = gl.convert_layout(d_s.to(x.dtype), P_L, assert_trivial=True)
    d_t_x = warpgroup_mma(d_t_s16, x, d_t_x, is_async=True)
    d_x = warpgroup_mma(d_t_s16, t_x, d_x, is_async=True)
    d_x = warpgroup_mma(d_s16, x, d_x, is_async=True)
    d_x, d_t_x = warpgroup_mma_wait(0, deps=[d_x, d_t_x])
    keep_alive(d_t_s16)
    keep_alive(d_s16)
    return d_x, d_t_x


@gluon.jit
def any_not_finite(s, t_s, BLOCK_N: gl.constexpr):
    """Whether a score of the warpgroup, (64, BLOCK_N), or its tangent is not finite, as a scalar
    uniform in it."""
    any_nan: gl.constexpr = (
        "{ .reg .pred a; setp.nan.f32 a, $2, $3; bar.red.or.pred a, 12, 128, a;"
        " selp.b32 spoiled, 1, 0, a; mov.b32 $0, spoiled; mov.b32 $1, $0; }"
    )
    sums = lane_sums((s + t_s) * 0.0, BLOCK_N)
    gl.inline_asm_elementwise(any_nan, "=r,=r,f,f", [sums], dtype=gl.int32, is_pure=False, pack=2)
    read: gl.constexpr = "mov.b32 $0, spoiled;"
    return gl.inline_asm_elementwise(read, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def make_finite(tile, LAYOUT: gl.constexpr):
    """0 for what is not finite in a tile in shared memory, which products read next."""
    x = tile.load(LAYOUT)
    tile.store(gl.where(gl.abs(x.to(gl.float32)) < float("inf"), x, 0.0))
    fence_async_shared()
