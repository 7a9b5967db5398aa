"""What the warp-specialised passes are written with: warp-scheduler barriers, work items,
products of tiles, masks, row sums in lanes.
"""

# What is known at compile time stands in an `if` of its own.
# ruff: noqa: SIM108

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import block_info

# block_info's functions, as Gluon's
(
    first_row, row_at, keys_begin, keys_end, listed_rows, listed_row, tiles_of, sequence_of,
    _is_valid,
) = (
    gluon.jit(function.fn)
    for function in (
        block_info.first_row, block_info.row_at, block_info.keys_begin, block_info.keys_end,
        block_info.listed_rows, block_info.listed_row, block_info.tiles_of, block_info.sequence_of,
        block_info.is_valid,
    )
)  # fmt: skip

ROWS = gl.constexpr(64)  # queries, or keys, of a warpgroup

# renamed in Triton 3.9
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _asm(code: gl.constexpr):
    z = gl.full([128], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise(code, "=r,r", [z], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def warp_scheduler_barrier_sync(WG: gl.constexpr):
    """Until the other warpgroup gives the tensor cores away: a barrier of 256 threads for each of
    the two."""
    if WG == 0:
        _asm("bar.sync 10, 256; mov.u32 $0, $1;")
    else:
        _asm("bar.sync 11, 256; mov.u32 $0, $1;")


@gluon.jit
def warp_scheduler_barrier_arrive(WG: gl.constexpr):
    """The tensor cores to the other warpgroup."""
    if WG == 0:
        _asm("bar.arrive 11, 256; mov.u32 $0, $1;")
    else:
        _asm("bar.arrive 10, 256; mov.u32 $0, $1;")


@gluon.jit
def allocate_stages(like, COUNT: gl.constexpr):
    """Buffers for COUNT tiles of a descriptor."""
    shape: gl.constexpr = [COUNT] + like.block_shape  # noqa: RUF005 (no star in a kernel)
    return gl.allocate_shared_memory(like.dtype, shape, like.layout)


@gluon.jit
def smem_tile(COLUMNS: gl.constexpr):
    """A tile (ROWS, COLUMNS) in float32 that passes from one warpgroup to the other."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    return gl.allocate_shared_memory(gl.float32, [ROWS, COLUMNS], layout)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """A pipeline's barriers; a phase ends with ARRIVALS arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def advance(slot, phase, STEP: gl.constexpr, COUNT: gl.constexpr):
    """The next slot of a pipeline, and the phase of its barrier, which flips with every round."""
    slot += STEP
    if slot == COUNT:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def await_stores(stored, free):
    """The last results are out of their slot, number `stored` - 1, which is free; 0: none are."""
    if stored > 0:
        tma.store_wait(0)
        mbarrier.arrive(free.index(stored - 1), count=1)
        stored = 0
    return stored


@gluon.jit
def keep_alive(x):
    """No instruction: ties the registers of x to this point, so that none is reused while a product
    still reads them."""
    return gl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=2)


@gluon.jit
def lane_sums(x, BLOCK_N: gl.constexpr):
    """Row sums over the registers of a lane: (64, BLOCK_N) -> (64, 4)."""
    return gl.sum(gl.sum(gl.reshape(x, [ROWS, BLOCK_N // 8, 4, 2]), 3), 1)


@gluon.jit
def declare_flag(FLAG: gl.constexpr):
    """A register of this role, 0, by which inline assembly returns a scalar."""
    declare: gl.constexpr = ".reg .b32 " + FLAG + "; mov.b32 " + FLAG + ", 0; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(declare, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def any_above(x, THRESHOLD: gl.constexpr, FLAG: gl.constexpr):
    """Whether an element of this warp's rows exceeds the threshold, as a scalar uniform in the
    warp."""
    above: gl.constexpr = (
        "{ .reg .pred a, b; setp.gt.f32 a, $2, " + THRESHOLD + "; setp.gt.f32 b, $3, " + THRESHOLD
        + "; or.pred a, a, b; vote.sync.any.pred a, a, 0xffffffff; selp.b32 " + FLAG
        + ", 1, 0, a; mov.b32 $0, " + FLAG + "; mov.b32 $1, $0; }"
    )  # fmt: skip
    read: gl.constexpr = "mov.b32 $0, " + FLAG + ";"
    gl.inline_asm_elementwise(above, "=r,=r,f,f", [x], dtype=gl.int32, is_pure=False, pack=2)
    return gl.inline_asm_elementwise(read, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def sequence_numbers(SEQUENCES: gl.constexpr, WARPS: gl.constexpr):
    """0, 1, ... for `sequence_of`, all of them in each warp, whose maximum then needs no other."""
    each: gl.constexpr = max(SEQUENCES // 32, 1)
    return gl.arange(0, SEQUENCES, layout=gl.BlockedLayout([each], [32], [WARPS], [0]))


@gluon.jit
def work_items(items, PAIRS: gl.constexpr):
    """How many work items this block has."""
    pid = gl.program_id(0)
    blocks = gl.num_programs(0)
    if PAIRS:
        pairs = (items + 1) // 2
        mine = 2 * ((pairs - pid + blocks - 1) // blocks)
        if (items % 2 == 1) & ((pairs - 1) % blocks == pid):
            mine -= 1
    else:
        mine = (items - pid + blocks - 1) // blocks
    return mine


@gluon.jit
def work_item(e, tiles, H, PAIRS: gl.constexpr, heads=None, turn=None):
    """Batch entry, head and tile of this block's e-th work item, of `tiles` tiles a head. PAIRS:
    the first, the last, the second, the last but one ..., two to a block, whose costs under a
    causal mask add up to the same. heads: of all batch entries, where a tile of all heads comes
    before the next tile: each block then meets every packed sequence about as often. turn: after so
    many heads their tiles begin with the next one, so that each block meets last tiles, which are
    cut, as often as the others."""
    pid = gl.program_id(0)
    blocks = gl.num_programs(0)
    if PAIRS:
        w = 2 * (e // 2 * blocks + pid) + e % 2
    else:
        w = e * blocks + pid
    if heads is None:
        bh = w // tiles
        tile = w % tiles if turn is None else (w + bh // turn) % tiles
    else:
        bh = w % heads
        tile = w // heads
    if PAIRS:
        tile = gl.where(tile % 2 == 0, tile // 2, tiles - 1 - tile // 2)
    return bh // H, bh % H, tile


@gluon.jit
def let_pass(ready, free, slot, phase, STAGES: gl.constexpr):
    """Frees a tile that this warpgroup, which has no rows of its own, does not read."""
    mbarrier.wait(ready.index(slot), phase)
    mbarrier.arrive(free.index(slot), count=1)
    return advance(slot, phase, 1, STAGES)


@gluon.jit
def matrix(buffers, slot, N: gl.constexpr, D: gl.constexpr):
    """The tile in a slot as a matrix (N, D)."""
    return buffers.index(slot).reshape((N, D))


@gluon.jit
def memory_as(buffers, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The memory of buffers in another shape and layout."""
    if RENAMED:
        x = buffers.reinterpret(buffers.dtype, SHAPE, LAYOUT)
    else:
        x = buffers._reinterpret(buffers.dtype, SHAPE, LAYOUT)
    return x


@gluon.jit
def _coordinates(x, b, h, row, column):
    """Of a tile in a descriptor, which may have heads by two (`launch.py`)."""
    if len(x.block_shape) == 5:
        at = (b, h // 2, h % 2, row, column)
    else:
        at = (b, h, row, column)
    return at


@gluon.jit
def load_at(x, b, h, row, column, bar, tile):
    """A tile of a head to shared memory, not awaited."""
    load(x, _coordinates(x, b, h, row, column), bar, tile)


@gluon.jit
def store_at(x, b, h, row, column, tile):
    """A tile of a head from shared memory, not awaited."""
    store(x, _coordinates(x, b, h, row, column), tile)


@gluon.jit
def piece_columns(x, h, D: gl.constexpr, D1: gl.constexpr):
    """The columns where the two pieces of a row of a descriptor's tensor begin."""
    first = 0
    second = D1
    if len(x.block_shape) == 5:
        first = h % 2 * (D - D1)
        second = D1 - h % 2 * D1
    return first, second


@gluon.jit
def tiles_as(buffers, COUNT: gl.constexpr, N: gl.constexpr, D: gl.constexpr, BYTES: gl.constexpr):
    """The memory of buffers as COUNT tiles (N, D) in 16 bits, with a swizzle of so many bytes."""
    return memory_as(buffers, [COUNT, N, D], gl.NVMMASharedLayout(BYTES, 16, 2))


@gluon.jit
def side_by_side(buffers, pair, COUNT: gl.constexpr, N: gl.constexpr, D: gl.constexpr):
    """Slots 2 pair and 2 pair + 1 of COUNT pairs as one matrix (N, 2 D): tiles as wide as
    their swizzle lie one after the other, as the column blocks of a wider one do."""
    return tiles_as(buffers, COUNT, N, 2 * D, 2 * D).index(pair)


@gluon.jit
def store_part(x, tile, b, h, row, rows, columns, D0: gl.constexpr, D: gl.constexpr):
    """The first `rows` rows of a tile in shared memory, for columns D0 ... D0 + D of a tensor
    (pointer, strides) of so many: where those behind belong to others, which TMA would
    overwrite."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    i = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), 1)
    column = D0 + gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, layout)), 0)
    inside = (i < rows) & (column < columns)
    gl.store(row_at(x, b, h, row + i) + column, tile.load(layout), mask=inside)
    fence_async_shared()  # all is read before TMA writes there again


@gluon.jit
def load_tile(x, buffers, slot, bar, b, h, row, D1: gl.constexpr):
    """A tile of an operand, in both pieces, to a slot, not awaited."""
    load_at(x[0], b, h, row, 0, bar, buffers[0].index(slot))
    if x[1] is not None:
        load_at(x[1], b, h, row, D1, bar, buffers[1].index(slot))


@gluon.jit
def store_tile(out, x, x2, buffers, slot, b, h, row, D1: gl.constexpr, D2: gl.constexpr):
    """A result of ROWS rows, in both pieces, through a slot that nothing reads any more."""
    tile = matrix(buffers[0], slot, ROWS, D1)
    tile.store(x.to(tile.dtype))
    if D2 > 0:
        tile2 = matrix(buffers[1], slot, ROWS, D2)
        tile2.store(x2.to(tile2.dtype))
    fence_async_shared()
    store_at(out[0], b, h, row, 0, buffers[0].index(slot))
    if D2 > 0:
        store_at(out[1], b, h, row, D1, buffers[1].index(slot))


@gluon.jit
def _store_sums(SUMS, at, x, tile, begin, COLUMNS: gl.constexpr, D: gl.constexpr):
    """Of a piece x and its tile, for COLUMNS columns from `begin` on."""
    L: gl.constexpr = x.type.layout
    ONES: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    WIDTH: gl.constexpr = tile.shape[1]
    ones = gl.full([ROWS, ROWS], 1.0, tile.dtype, layout=ONES)
    sums = gl.zeros([ROWS, WIDTH], gl.float32, L)
    sums = warpgroup_mma(ones, tile, sums, use_acc=False, is_async=True)
    sums = warpgroup_mma_wait(0, deps=[sums])
    keep_alive(ones)
    i = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, L)), 1)
    j = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, L)), 0)
    gl.store(SUMS + at * D + begin + j + 0 * i, sums, mask=(i == 0) & (j < COLUMNS))


@gluon.jit
def store_sums(
    SUMS, at, out, x, x2, buffers, slot, h, D: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr
):
    """Σ over the rows of a result that `store_tile` has just stored, to row `at` of SUMS, as a
    product of ones and its tile. Rows that do not exist must be 0 there."""
    column, column2 = piece_columns(out[0], h, D, D1)
    tile = matrix(buffers[0], slot, ROWS, D1)
    _store_sums(SUMS, at, x, tile, column, min(D, D1), D)
    if D2 > 0:
        tile2 = matrix(buffers[1], slot, ROWS, D2)
        _store_sums(SUMS, at, x2, tile2, column2, D - D1, D)


@gluon.jit
def scores(q, k, q2, k2, s, START: gl.constexpr):
    """s + q kᵀ over both pieces; START: s counts as zero."""
    s = warpgroup_mma(q, k.permute((1, 0)), s, use_acc=not START, is_async=True)
    if q2 is not None:
        s = warpgroup_mma(q2, k2.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def rows_times(o, a, L_O: gl.constexpr):
    """o scaled row by row."""
    return o * gl.expand_dims(gl.convert_layout(a, gl.SliceLayout(1, L_O), assert_trivial=True), 1)


@gluon.jit
def is_valid(
    m0, n0, S, BLOCK_N: gl.constexpr, S_L: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    shift=0,
):  # fmt: skip
    """Which pairs of a tile, queries by keys, count."""
    j = gl.expand_dims(n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_L)), 0)
    i = gl.expand_dims(m0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_L)), 1)
    return _is_valid(i, j, S, LEFT, RIGHT, shift)


@gluon.jit
def is_in_band(
    n0, m0, BLOCK_M: gl.constexpr, S_L: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr
):
    """Which pairs of a tile, keys by queries, lie in the band, which has a bound. A key's bounds
    are computed once, as those of a row in `is_valid`."""
    j = gl.expand_dims(n0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_L)), 1)
    i = gl.expand_dims(m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S_L)), 0)
    if RIGHT is None:
        inside = i <= j + LEFT
    else:
        inside = i >= j - RIGHT
        if LEFT is not None:
            inside = inside & (i <= j + LEFT)
    return inside


@gluon.jit
def is_crossed(
    m0, n0, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr
):
    """Whether a bound of the band crosses a tile, or leaves it out; there is a bound."""
    if RIGHT is None:
        crossed = n0 + LEFT < m0 + (BLOCK_M - 1)
    else:
        crossed = n0 + (BLOCK_N - 1) > m0 + RIGHT
        if LEFT is not None:
            crossed = crossed | (n0 + LEFT < m0 + (BLOCK_M - 1))
    return crossed


@gluon.jit
def key_tiles(
    m0, S, BLOCK_N: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SHIFTED: gl.constexpr
):
    """The first tile of keys that queries m0 ... m0 + ROWS see, and the one behind the last.
    SHIFTED: m0 is any number."""
    end = keys_end(m0, ROWS, S, RIGHT, SHIFTED)
    return keys_begin(m0, LEFT) // BLOCK_N, (end + BLOCK_N - 1) // BLOCK_N


@gluon.jit
def query_tiles(n0, L, BLOCK_M: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """The first tile of queries that sees keys n0 ... n0 + ROWS, and the one behind the last; n0 is
    any number."""
    begin = 0
    end = L
    if RIGHT is not None:
        begin = max(n0 - RIGHT, 0) // BLOCK_M
    if LEFT is not None:
        end = min(L, max(n0 + (ROWS + LEFT), 0))
    return begin, (end + BLOCK_M - 1) // BLOCK_M


@gluon.jit
def exponential(s, scale2, m, SCALED: gl.constexpr):
    """exp(S − m); SCALED: s is in base 2 already."""
    if not SCALED:
        s = s * scale2
    return gl.exp2(s - gl.expand_dims(m, 1))
