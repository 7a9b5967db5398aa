"""A product times the derivative of GELU on Hopper, one role a warp.

    t_h = (t_x Aᵀ) ∘ gelu'(z)
    d_z = (d_y B) ∘ gelu'(z),    Σ d_z over the rows of a warp

A work item is 256 rows and 128 columns of the result, 128 rows a warpgroup. The tensor cores are
full as long as one of both warpgroups multiplies. So they keep apart, and each pauses while the
other does not: to compute gelu'(z) in two halves, to store its last sums, at its end. The ring of
the weight, which both read, is as deep as they may be apart. The ring of a warpgroup's rows passes
z too, and two slots of it take the results until they are stored.

gelu'(z), whose tanh is an approximation (`tanh.approx`), waits for its product in float16. Both add
1 % to the error that rounding to bfloat16 makes.

X (M, K) is t_x or d_y, W its weight, (N, K) or (K, N). A step is 64 columns of X.
"""

# What is known at compile time stands in an `if` of its own.
# ruff: noqa: SIM102

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from jvp_flash_attention.kernels.sm90.primitives import (
    advance,
    allocate_stages,
    barriers,
    load,
    store,
    tiles_as,
    work_items,
)

ROWS = gl.constexpr(128)  # of a warpgroup
COLUMNS = gl.constexpr(128)
INNER = gl.constexpr(64)  # of a step
HALF = gl.constexpr(64)  # rows of an instruction
STAGES_X = gl.constexpr(4)  # of each warpgroup's rows
STAGES_W = gl.constexpr(6)
CUBE = gl.constexpr(0.044715)
ROOT = gl.constexpr(0.7978845608028654)  # √(2/π)


@gluon.jit
def _place(e, tiles_n):
    """The first row and column of this block's e-th work item."""
    tile = e * gl.num_programs(0) + gl.program_id(0)
    return tile // tiles_n * (2 * ROWS), tile % tiles_n * COLUMNS


@gluon.jit
def _halves(buffers):
    """Slots of (ROWS, INNER) as those of half a result (HALF, COLUMNS)."""
    return tiles_as(buffers, STAGES_X, HALF, COLUMNS, 128)


@gluon.jit
def _fetch_weight(given, TRANSPOSED: gl.constexpr):
    """The warp that fetches the weight."""
    W, buffers, ready, free, steps, tiles_n, items = given
    slot = 0
    phase = 1
    for e in range(work_items(items, False)):
        _, n = _place(e, tiles_n)
        for i in range(steps):
            mbarrier.wait(free.index(slot), phase)
            mbarrier.expect(ready.index(slot), INNER * COLUMNS * 2)
            if TRANSPOSED:
                load(W, [n, i * INNER], ready.index(slot), buffers.index(slot))
            else:
                load(W, [i * INNER, n], ready.index(slot), buffers.index(slot))
            slot, phase = advance(slot, phase, 1, STAGES_W)


@gluon.jit
def _fetch_rows(WG: gl.constexpr, given):
    """The warp that fetches a warpgroup's rows, z between them, and leaves room for the results."""
    X, Z, buffers, ready, free, pauses, steps, tiles_n, items = given
    _first, upper, lower = pauses
    halves = _halves(buffers)
    slot = 0
    phase = 1
    for e in range(work_items(items, False)):
        m, n = _place(e, tiles_n)
        m += WG * ROWS
        for i in range(steps):
            mbarrier.wait(free.index(slot), phase)
            mbarrier.expect(ready.index(slot), ROWS * INNER * 2)
            load(X, [m, i * INNER], ready.index(slot), buffers.index(slot))
            slot, phase = advance(slot, phase, 1, STAGES_X)
            for half in gl.static_range(2):
                if i + 1 == (upper if half == 0 else lower):
                    mbarrier.wait(free.index(slot), phase)
                    mbarrier.expect(ready.index(slot), HALF * COLUMNS * 2)
                    load(Z, [m + half * HALF, n], ready.index(slot), halves.index(slot))
                    slot, phase = advance(slot, phase, 1, STAGES_X)
        for _ in gl.static_range(2):
            mbarrier.wait(free.index(slot), phase)
            mbarrier.arrive(ready.index(slot), count=1)
            slot, phase = advance(slot, phase, 1, STAGES_X)


@gluon.jit
def _derivative(z):
    """gelu'(z) = σ + 2 z u' (σ - σ²), σ = σ(2u) = (1 + tanh u) / 2, u = √(2/π) (z + c z³)."""
    u = z * (z * z * (CUBE * ROOT) + ROOT)
    tanh = gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=gl.float32, is_pure=True, pack=1
    )
    s = 0.5 * tanh + 0.5
    return s + z * (z * z * (6.0 * CUBE * ROOT) + 2.0 * ROOT) * (s - s * s)


@gluon.jit
def _pairs(x):
    """Columns 2 j and columns 2 j + 1."""
    return gl.split(gl.reshape(x, [HALF, COLUMNS // 2, 2]))


@gluon.jit
def _after_step(at):
    """Where a warpgroup is in both rings: the next slots, their phases, and the slots that the
    products of the last step hold."""
    slot, phase, _held, w_slot, w_phase, _w_held = at
    next, phase = advance(slot, phase, 1, STAGES_X)
    w_next, w_phase = advance(w_slot, w_phase, 1, STAGES_W)
    return next, phase, slot, w_next, w_phase, w_slot


@gluon.jit
def _after_tile(at):
    """The same behind a slot that no product reads."""
    slot, phase, held, w_slot, w_phase, w_held = at
    slot, phase = advance(slot, phase, 1, STAGES_X)
    return slot, phase, held, w_slot, w_phase, w_held


@gluon.jit
def _free_held(rings, at):
    """The slots of a step whose products are over."""
    mbarrier.arrive(rings[2].index(at[2]), count=1)
    mbarrier.arrive(rings[5].index(at[5]), count=1)


@gluon.jit
def _factor(halves, ready, free, at, L: gl.constexpr):
    """gelu' of z in the next slot, which is free then, two columns a register."""
    slot = at[0]
    mbarrier.wait(ready.index(slot), at[1])
    z = halves.index(slot).load(L)
    fence_async_shared()  # all is read before TMA writes there again
    mbarrier.arrive(free.index(slot), count=1)
    even, odd = _pairs(_derivative(z.to(gl.float32)))
    factor = gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip
    return factor, _after_tile(at)


@gluon.jit
def _times(x, factor):
    even, odd = _pairs(x)
    first, second = gl.inline_asm_elementwise(
        "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }",
        "=f,=f,r", [factor], dtype=(gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip
    joined = gl.reshape(gl.join(even * first, odd * second), [HALF, COLUMNS])
    return gl.convert_layout(joined, x.type.layout, assert_trivial=True)


def _scattering() -> str:
    """PTX that adds 32 numbers of each lane to those of the seven lanes that differ from it in bits
    2 to 4, and leaves it four of the sums, at the places that these bits name. The other 28
    results are zero.
    """
    code = "{ .reg .pred p; .reg .b32 lane, s, k; .reg .b32 v<32>; mov.u32 lane, %laneid; "
    code += "".join(f"mov.b32 v{i}, ${32 + i}; " for i in range(32))
    for n in (16, 8, 4):  # half of what is left goes to the lane that differs in this bit
        code += f"and.b32 s, lane, {n}; setp.ne.b32 p, s, 0; "
        for i in range(n):
            code += f"selp.b32 s, v{i}, v{i + n}, p; selp.b32 k, v{i + n}, v{i}, p; "
            code += f"shfl.sync.bfly.b32 s, s, {n}, 0x1f, 0xffffffff; add.f32 v{i}, k, s; "
    code += "".join(f"mov.b32 ${i}, {f'v{i}' if i < 4 else '0'}; " for i in range(32))
    return code + "}"


SCATTER = gl.constexpr(_scattering())
SCATTERED = gl.constexpr(",".join(["=f"] * 32 + ["f"] * 32))


@gluon.jit
def _lane_sums(x):
    """Sums over the two rows of a lane: (64, COLUMNS) -> (4 warps, 8, COLUMNS)."""
    return gl.sum(gl.reshape(x, [4, 2, 8, COLUMNS]), 1)


@gluon.jit
def _along(DIM: gl.constexpr, COUNT: gl.constexpr, L: gl.constexpr):
    """0 ... COUNT along one of three dimensions."""
    A: gl.constexpr = 1 if DIM == 0 else 0
    B: gl.constexpr = 1 if DIM == 2 else 2
    i = gl.arange(0, COUNT, layout=gl.SliceLayout(A, gl.SliceLayout(B, L)))
    return gl.expand_dims(gl.expand_dims(i, A), B)


@gluon.jit
def _store_sums(SUMS, sums, WG: gl.constexpr, e, N, tiles_n):
    """Those of the e-th work item, by warps."""
    total = gl.inline_asm_elementwise(
        SCATTER, SCATTERED, [sums], dtype=gl.float32, is_pure=True, pack=32
    )
    total = gl.sum(gl.reshape(total, [4, 8, 8, 16]), 2)
    L: gl.constexpr = total.type.layout
    m, n = _place(e, tiles_n)
    column = n + 16 * _along(1, 8, L) + _along(2, 16, L)
    row = (m // ROWS + WG) * 4 + _along(0, 4, L)
    gl.store(SUMS + row.to(gl.int64) * N + column, total, mask=column < N)


@gluon.jit
def _start(rings, at, acc, acc2, TRANSPOSED: gl.constexpr):
    """The products of a step, not awaited."""
    x_buffers, x_ready, _, w_buffers, w_ready, _ = rings
    slot, phase, _held, w_slot, w_phase, _w_held = at
    mbarrier.wait(w_ready.index(w_slot), w_phase)
    mbarrier.wait(x_ready.index(slot), phase)
    x = x_buffers.index(slot)
    w = w_buffers.index(w_slot)
    if TRANSPOSED:
        w = w.permute((1, 0))
    acc = warpgroup_mma(x.slice(0, HALF), w, acc, is_async=True)
    acc2 = warpgroup_mma(x.slice(HALF, HALF), w, acc2, is_async=True)
    return acc, acc2


@gluon.jit
def _first_step(rings, at, acc, e, TRANSPOSED: gl.constexpr):
    """The first step of an item, under which the last results leave their slots."""
    free = rings[2]
    slot = at[0]
    acc, acc2 = _start(rings, at, acc, acc, TRANSPOSED)
    if e > 0:
        tma.store_wait(0)
        for i in gl.static_range(2):
            mbarrier.arrive(free.index((slot + STAGES_X - 1 - i) % STAGES_X), count=1)
    acc, acc2 = warpgroup_mma_wait(2, deps=[acc, acc2])  # waits for nothing, names them
    return acc, acc2, _after_step(at)


@gluon.jit
def _steps(begin, end, rings, at, acc, acc2, TRANSPOSED: gl.constexpr):
    """So many steps; the last one is not awaited, and holds its slots."""
    for _ in range(begin, end):
        acc, acc2 = _start(rings, at, acc, acc2, TRANSPOSED)
        acc, acc2 = warpgroup_mma_wait(2, deps=[acc, acc2])
        _free_held(rings, at)
        at = _after_step(at)
    return acc, acc2, at


@gluon.jit
def _finish(rings, at, acc, acc2):
    """Awaits the last step."""
    acc, acc2 = warpgroup_mma_wait(0, deps=[acc, acc2])
    _free_held(rings, at)
    return acc, acc2


@gluon.jit
def _fill(x, halves, ready, at):
    """A result into the next slot."""
    tile = halves.index(at[0])
    mbarrier.wait(ready.index(at[0]), at[1])
    tile.store(x.to(tile.dtype))
    return tile, _after_tile(at)


@gluon.jit
def _put(out, x, x2, halves, ready, at, row, column):
    """Both halves of a result, through the next two slots."""
    tile, at = _fill(x, halves, ready, at)
    tile2, at = _fill(x2, halves, ready, at)
    fence_async_shared()
    store(out, [row, column], tile)
    store(out, [row + HALF, column], tile2)
    return at


@gluon.jit
def _consumer(WG: gl.constexpr, given, TRANSPOSED: gl.constexpr):
    """A warpgroup: 128 rows of each work item."""
    OUT, SUMS, apart, rings, pauses, N, steps, tiles_n, items = given
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    ready = rings[1]
    free = rings[2]
    halves = _halves(rings[0])
    first, upper, lower = pauses
    at = (0, 0, 0, 0, 0, 0)
    sums = _lane_sums(gl.zeros([HALF, COLUMNS], gl.float32, L)) if SUMS is not None else 0
    for e in range(work_items(items, False)):
        m, n = _place(e, tiles_n)
        m += WG * ROWS
        if WG == 1:
            mbarrier.wait(apart, e & 1)
        acc = gl.zeros([HALF, COLUMNS], gl.float32, L)
        acc, acc2, at = _first_step(rings, at, acc, e, TRANSPOSED)
        acc, acc2, at = _steps(1, first, rings, at, acc, acc2, TRANSPOSED)
        if WG == 0:
            mbarrier.arrive(apart, count=1)
        if SUMS is not None:
            if e > 0:
                _store_sums(SUMS, sums, WG, e - 1, N, tiles_n)
        acc, acc2, at = _steps(first, upper, rings, at, acc, acc2, TRANSPOSED)
        factor, at = _factor(halves, ready, free, at, L)
        acc, acc2, at = _steps(upper, lower, rings, at, acc, acc2, TRANSPOSED)
        factor2, at = _factor(halves, ready, free, at, L)
        acc, acc2, at = _steps(lower, steps, rings, at, acc, acc2, TRANSPOSED)
        acc, acc2 = _finish(rings, at, acc, acc2)
        acc = _times(acc, factor)
        acc2 = _times(acc2, factor2)
        at = _put(OUT, acc, acc2, halves, ready, at, m, n)
        if SUMS is not None:
            sums = _lane_sums(acc) + _lane_sums(acc2)
    tma.store_wait(0)
    if SUMS is not None:
        _store_sums(SUMS, sums, WG, work_items(items, False) - 1, N, tiles_n)


@gluon.jit(do_not_specialize=("pauses0", "pauses1", "N", "steps", "tiles_n", "items"))
def gelu_derivative_product_kernel(
    X, W, Z, OUT, SUMS, pauses0, pauses1, N, steps, tiles_n, items, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """W (N, K) if TRANSPOSED, else (K, N). SUMS (M / 32, N) or None. pauses: before which steps
    each warpgroup stores its sums, and computes the upper and the lower half of gelu'(z). The
    second begins when the first is at its first pause, which is before step STAGES_W, and is there
    once an item only as an item has STAGES_W steps and more."""
    x0 = allocate_stages(X, STAGES_X)
    x1 = allocate_stages(X, STAGES_X)
    w = allocate_stages(W, STAGES_W)
    x0_ready = barriers(STAGES_X, 1)
    x0_free = barriers(STAGES_X, 1)
    x1_ready = barriers(STAGES_X, 1)
    x1_free = barriers(STAGES_X, 1)
    w_ready = barriers(STAGES_W, 1)
    w_free = barriers(STAGES_W, 2)
    apart = barriers(1, 1)
    rings0 = (x0, x0_ready, x0_free, w, w_ready, w_free)
    rings1 = (x1, x1_ready, x1_free, w, w_ready, w_free)
    given0 = (OUT, SUMS, apart.index(0), rings0, pauses0, N, steps, tiles_n, items)
    given1 = (OUT, SUMS, apart.index(0), rings1, pauses1, N, steps, tiles_n, items)
    fetched0 = (X, Z, x0, x0_ready, x0_free, pauses0, steps, tiles_n, items)
    fetched1 = (X, Z, x1, x1_ready, x1_free, pauses1, steps, tiles_n, items)
    fetched = (W, w, w_ready, w_free, steps, tiles_n, items)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (0, given0, TRANSPOSED)),
            (_consumer, (1, given1, TRANSPOSED)),
            (_fetch_rows, (0, fetched0)),
            (_fetch_rows, (1, fetched1)),
            (_fetch_weight, (fetched, TRANSPOSED)),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )
