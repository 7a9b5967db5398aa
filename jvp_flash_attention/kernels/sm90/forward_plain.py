"""Forward without a tangent on Hopper: one role a warp, as in `forward.py`.

    S = s Q Kᵀ      m = row maximum of S so far      P̃ = exp(S − m)
    l ← α l + Σ P̃   O ← α O + P̃ V                    α = exp(m_before − m)
    O / l           LSE = m + log l

A work item is 128 or 192 queries of a head, 64 a warpgroup. The scores of the next tile of keys and
the values of this one are started together. The next softmax runs while the values are multiplied:

    S(j + 1), P(j) V(j) │ softmax of S(j + 1) under P(j) V(j) │ ...

Warpgroups share no result. Two take the tensor cores by turns (ORDER) where exponentials, and not
products, take the longest. Three, of 192 queries, wait less, and pay where a head has many
(`configs.plain`).

m is kept in base 2. O and l are brought to a new maximum only where a row of the warp outgrew its
old one by 2^THRESHOLD, as in `forward.py`. Results are stored under the next item's first scores.

A head dim above 64 and up to 96 is two pieces. Names of the second end in 2.
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

from ..portable.primitives import LN2, LOG2E
from .primitives import (
    ROWS,
    advance,
    allocate_stages,
    any_above,
    await_stores,
    barriers,
    declare_flag,
    exponential,
    first_row,
    keep_alive,
    lane_sums,
    let_pass,
    load_tile,
    matrix,
    rows_times,
    scores,
    store_at,
    warp_scheduler_barrier_arrive,
    warp_scheduler_barrier_sync,
    work_item,
    work_items,
)


@gluon.jit
def _producer(
    given, GROUP: gl.constexpr, GROUPS: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES_K: gl.constexpr, STAGES_V: gl.constexpr, STAGES_Q: gl.constexpr,
):  # fmt: skip
    """The warp that fetches Q, K and V."""
    ROW_BYTES: gl.constexpr = (D1 + D2) * 2
    x, buffers, bars, work = given
    q_ready, q_free, k_ready, k_free, v_ready, v_free = bars
    H, _L, S, tiles, turn, items = work
    kj = 0
    vj = 0
    qj = 0
    k_phase = 1
    v_phase = 1
    q_phase = 1
    for e in range(work_items(items, False)):
        b, h, tile = work_item(e, tiles, H, False, turn=turn)
        for n0 in range(0, S, BLOCK_N):
            mbarrier.wait(k_free.index(kj), k_phase)
            mbarrier.expect(k_ready.index(kj), BLOCK_N * ROW_BYTES)
            load_tile(x[1], buffers[1], kj, k_ready.index(kj), b, h // GROUP, n0, D1)
            kj, k_phase = advance(kj, k_phase, 1, STAGES_K)
            if n0 == 0:  # after the first keys, which need not wait until results are stored
                for g in gl.static_range(GROUPS):
                    mbarrier.wait(q_free.index(qj + g), q_phase)
                    mbarrier.expect(q_ready.index(qj + g), ROWS * ROW_BYTES)
                    at = (tile * GROUPS + g) * ROWS
                    load_tile(x[0], buffers[0], qj + g, q_ready.index(qj + g), b, h, at, D1)
                qj, q_phase = advance(qj, q_phase, GROUPS, GROUPS * STAGES_Q)
            mbarrier.wait(v_free.index(vj), v_phase)
            mbarrier.expect(v_ready.index(vj), BLOCK_N * ROW_BYTES)
            load_tile(x[2], buffers[2], vj, v_ready.index(vj), b, h // GROUP, n0, D1)
            vj, v_phase = advance(vj, v_phase, 1, STAGES_V)


@gluon.jit
def _seen(s, n0, S, BLOCK_N: gl.constexpr, EDGE: gl.constexpr):
    """Scores of a tile, without those behind the last key."""
    if EDGE:
        if n0 + BLOCK_N > S:
            j = gl.expand_dims(
                n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s.type.layout)), 0
            )
            s = gl.where(j < S, s, -float("inf"))
    return s


@gluon.jit
def _start_scores(
    q, q2, keys, kj, k_ready, k_phase, D1: gl.constexpr, D2: gl.constexpr, BLOCK_N: gl.constexpr
):
    """S of the tile of keys in slot kj, not awaited."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    k = matrix(keys[0], kj, BLOCK_N, D1)
    k2 = matrix(keys[1], kj, BLOCK_N, D2) if D2 > 0 else None
    mbarrier.wait(k_ready.index(kj), k_phase)
    return scores(q, k, q2, k2, gl.zeros([ROWS, BLOCK_N], gl.float32, S_L), True)


@gluon.jit
def _start_values(
    p16, values, vj, v_ready, v_phase, o, o2, D1: gl.constexpr, D2: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """O + P̃ V with the values in slot vj, not awaited."""
    v = matrix(values[0], vj, BLOCK_N, D1)
    mbarrier.wait(v_ready.index(vj), v_phase)
    o = warpgroup_mma(p16, v, o, is_async=True)
    if D2 > 0:
        v2 = matrix(values[1], vj, BLOCK_N, D2)
        P2: gl.constexpr = gl.DotOperandLayout(0, o2.type.layout, 2)
        o2 = warpgroup_mma(gl.convert_layout(p16, P2, assert_trivial=True), v2, o2, is_async=True)
    return o, o2


@gluon.jit
def _await_values(p16, o, o2, TWO: gl.constexpr):
    if TWO:
        o, o2 = warpgroup_mma_wait(0, deps=[o, o2])
    else:
        o = warpgroup_mma_wait(0, deps=[o])
    keep_alive(p16)
    return o, o2


@gluon.jit
def _consumer(
    WG: gl.constexpr, given, ORDER: gl.constexpr, EDGE: gl.constexpr, THRESHOLD: gl.constexpr,
    GROUPS: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES_K: gl.constexpr, STAGES_V: gl.constexpr, STAGES_Q: gl.constexpr,
):  # fmt: skip
    """64 queries of each work item against all keys."""
    out, LSE, buffers, bars, scale, work = given
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    L1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    L2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, max(D2, 16), 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_L)
    P1: gl.constexpr = gl.DotOperandLayout(0, L1, 2)
    TWO: gl.constexpr = D2 > 0
    PIECES: gl.constexpr = 2 if TWO else 1
    FLAG: gl.constexpr = "grown0" if WG == 0 else ("grown1" if WG == 1 else "grown2")
    q_ready, q_free, k_ready, k_free, v_ready, v_free = bars
    H, L, S, tiles, turn, items = work
    scale2 = scale * LOG2E
    kj = 0
    vj = 0
    qj = 0
    k_phase = 0
    v_phase = 0
    q_phase = 0
    stored = 0  # number + 1 of the buffers that the last stores may still read
    declare_flag(FLAG)
    if ORDER:
        if WG == 1:
            warp_scheduler_barrier_arrive(WG)
    for e in range(work_items(items, False)):
        b, h, tile = work_item(e, tiles, H, False, turn=turn)
        m0 = (tile * GROUPS + WG) * ROWS
        at = qj + WG
        if (m0 < L) | ORDER:
            q = matrix(buffers[0][0], at, ROWS, D1)
            q2 = matrix(buffers[0][1], at, ROWS, D2) if TWO else None
            o = gl.zeros([ROWS, D1], gl.float32, L1)
            o2 = gl.zeros([ROWS, D2], gl.float32, L2) if TWO else 0
            mbarrier.wait(q_ready.index(at), q_phase)
            s = _start_scores(q, q2, buffers[1], kj, k_ready, k_phase, D1, D2, BLOCK_N)
            stored = await_stores(stored, q_free)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_free.index(kj), count=1)
            kj, k_phase = advance(kj, k_phase, 1, STAGES_K)
            s = _seen(s, 0, S, BLOCK_N, EDGE)
            m = gl.max(s, 1) * scale2
            p = exponential(s, scale2, m, False)
            l = lane_sums(p, BLOCK_N)
            p16 = gl.convert_layout(p.to(q.dtype), P1, assert_trivial=True)
            for n0 in range(BLOCK_N, S, BLOCK_N):
                if ORDER:
                    warp_scheduler_barrier_sync(WG)
                s = _start_scores(q, q2, buffers[1], kj, k_ready, k_phase, D1, D2, BLOCK_N)
                o, o2 = _start_values(p16, buffers[2], vj, v_ready, v_phase, o, o2, D1, D2, BLOCK_N)
                if ORDER:
                    warp_scheduler_barrier_arrive(WG)
                s = warpgroup_mma_wait(PIECES, deps=[s])
                mbarrier.arrive(k_free.index(kj), count=1)
                kj, k_phase = advance(kj, k_phase, 1, STAGES_K)
                s = _seen(s, n0, S, BLOCK_N, EDGE)
                m_new = gl.maximum(m, gl.max(s, 1) * scale2)
                grown = any_above(m_new - m, THRESHOLD, FLAG)
                alpha = gl.full([ROWS], 1.0, gl.float32, ROW)
                if grown:
                    alpha = gl.exp2(m - m_new)
                    m = m_new
                p = exponential(s, scale2, m, False)
                sums = lane_sums(p, BLOCK_N)
                o, o2 = _await_values(p16, o, o2, TWO)
                mbarrier.arrive(v_free.index(vj), count=1)
                vj, v_phase = advance(vj, v_phase, 1, STAGES_V)
                p16 = gl.convert_layout(p.to(q.dtype), P1, assert_trivial=True)
                if grown:
                    alpha4 = gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout))
                    l = l * gl.expand_dims(alpha4, 1)
                    o = rows_times(o, alpha, L1)
                    if TWO:
                        o2 = rows_times(o2, alpha, L2)
                l = l + sums
            o, o2 = _start_values(p16, buffers[2], vj, v_ready, v_phase, o, o2, D1, D2, BLOCK_N)
            l_row = gl.convert_layout(gl.sum(l, 1), ROW)
            o, o2 = _await_values(p16, o, o2, TWO)
            mbarrier.arrive(v_free.index(vj), count=1)
            vj, v_phase = advance(vj, v_phase, 1, STAGES_V)
            inverse = 1.0 / l_row
            q.store(rows_times(o, inverse, L1).to(q.dtype))
            if TWO:
                q2.store(rows_times(o2, inverse, L2).to(q.dtype))
            fence_async_shared()
            store_at(out[0], b, h, m0, 0, buffers[0][0].index(at))
            if TWO:
                store_at(out[1], b, h, m0, D1, buffers[0][1].index(at))
            i = m0 + gl.arange(0, ROWS, layout=ROW)
            row = first_row(b, h, H, L) + i
            gl.store(LSE + row, (m + gl.log2(l_row)) * LN2, mask=i < L)
        else:  # in the last tile, without turns
            mbarrier.wait(q_ready.index(at), q_phase)
            stored = await_stores(stored, q_free)
            for _ in range(0, S, BLOCK_N):
                kj, k_phase = let_pass(k_ready, k_free, kj, k_phase, STAGES_K)
                vj, v_phase = let_pass(v_ready, v_free, vj, v_phase, STAGES_V)
        stored = at + 1
        qj, q_phase = advance(qj, q_phase, GROUPS, GROUPS * STAGES_Q)
    tma.store_wait(0)
    if ORDER:
        if WG == 0:  # the named barriers end balanced
            warp_scheduler_barrier_sync(WG)


@gluon.jit(do_not_specialize=("H", "L", "S", "tiles", "turn", "items"))
def forward_kernel(
    Q, K, V, O, Q2, K2, V2, O2, LSE, scale, H, L, S, tiles, turn, items,
    GROUP: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES_K: gl.constexpr, STAGES_V: gl.constexpr, STAGES_Q: gl.constexpr, GROUPS: gl.constexpr,
    ORDER: gl.constexpr, EDGE: gl.constexpr, THRESHOLD: gl.constexpr,
):  # fmt: skip
    """D1 + D2 columns; STAGES_K tiles of keys, STAGES_V of values and STAGES_Q query tiles of each
    of GROUPS warpgroups in flight; EDGE: the last tile of keys is cut."""
    TWO: gl.constexpr = D2 > 0
    TILES: gl.constexpr = GROUPS * STAGES_Q
    buffers = (
        (allocate_stages(Q, TILES), allocate_stages(Q2, TILES) if TWO else None),
        (allocate_stages(K, STAGES_K), allocate_stages(K2, STAGES_K) if TWO else None),
        (allocate_stages(V, STAGES_V), allocate_stages(V2, STAGES_V) if TWO else None),
    )
    bars = (
        barriers(TILES, 1),
        barriers(TILES, 1),
        barriers(STAGES_K, 1),
        barriers(STAGES_K, GROUPS),
        barriers(STAGES_V, 1),
        barriers(STAGES_V, GROUPS),
    )
    work = (H, L, S, tiles, turn, items)
    given = ((O, O2), LSE, buffers, bars, scale, work)
    fetched = (((Q, Q2), (K, K2), (V, V2)), buffers, bars, work)
    fence_async_shared()
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (0, given, ORDER, EDGE, THRESHOLD,
                     GROUPS, D1, D2, BLOCK_N, STAGES_K, STAGES_V, STAGES_Q),
                ),
                (
                    _consumer,
                    (1, given, ORDER, EDGE, THRESHOLD,
                     GROUPS, D1, D2, BLOCK_N, STAGES_K, STAGES_V, STAGES_Q),
                ),
                (
                    _producer,
                    (fetched, GROUP, GROUPS, D1, D2, BLOCK_N, STAGES_K, STAGES_V, STAGES_Q),
                ),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (0, given, ORDER, EDGE, THRESHOLD,
                     GROUPS, D1, D2, BLOCK_N, STAGES_K, STAGES_V, STAGES_Q),
                ),
                (
                    _consumer,
                    (1, given, ORDER, EDGE, THRESHOLD,
                     GROUPS, D1, D2, BLOCK_N, STAGES_K, STAGES_V, STAGES_Q),
                ),
                (
                    _consumer,
                    (2, given, ORDER, EDGE, THRESHOLD,
                     GROUPS, D1, D2, BLOCK_N, STAGES_K, STAGES_V, STAGES_Q),
                ),
                (
                    _producer,
                    (fetched, GROUP, GROUPS, D1, D2, BLOCK_N, STAGES_K, STAGES_V, STAGES_Q),
                ),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip
