"""The third warpgroup of `bwd_head.py`: dQ of all queries, with Σ dQ, and w, a head ahead.

    dQ = s dS K      w = rowsum(dO ∘ O)

dQ of a tile is stored under the products of the next one. dO is in shared memory by then, before
the scores' warpgroup asks for w. And what the keys' warpgroup shares with it.
"""

# What is known at compile time stands in an `if` of its own.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .primitives import (
    ROWS,
    advance,
    matrix,
    piece_columns,
    row_at,
    store_tile,
    work_item,
    work_items,
)

# of O and dO, two lanes a row
ROWS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))


@gluon.jit
def add_product(a, x, x2, d, d2):
    """d + a x, not awaited."""
    d = warpgroup_mma(a, x, d, is_async=True)
    if x2 is not None:
        d2 = warpgroup_mma(a, x2, d2, is_async=True)
    return d, d2


@gluon.jit
def store_sums(SUMS, sums, at, begin, COLUMNS: gl.constexpr, D: gl.constexpr):
    """Σ over the rows of a result, for COLUMNS columns from `begin` on."""
    j = gl.arange(0, sums.shape[0], layout=sums.type.layout)
    gl.store(SUMS + at * D + begin + j, sums, mask=j < COLUMNS)


@gluon.jit
def _load_rows(
    O, b, h, rows, there, begin, COLUMNS: gl.constexpr, WIDTH: gl.constexpr, UNIT: gl.constexpr
):
    """Columns of O from `begin` on, 0 behind the first COLUMNS and where a row is not there."""
    O = (O[0], O[1] * UNIT, O[2] * UNIT, O[3] * UNIT)
    i = gl.expand_dims(rows, 1)
    j = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, ROWS_LAYOUT)), 0)
    mask = gl.expand_dims(there, 1) & (j < COLUMNS)
    return gl.load(row_at(O, b, h, i) + begin + j, mask=mask, other=0.0)


@gluon.jit
def _store_w(
    O, d_q, buffers, bars, work, e, m, count, D: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    QUERIES: gl.constexpr, STAGES_Q: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """-w of the m-th tile of the e-th head, if there is one, to the scores' warpgroup. d_q: a
    descriptor of a result."""
    q_and_d_o, _, _, _, _, all_w = buffers
    _, d_o_buffers = q_and_d_o
    q_ready, _, _, _, _, _, w_ready = bars
    H, L, _, _ = work
    b, h, _tile = work_item(e, 1, H, False)
    i = m * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, ROWS_LAYOUT))
    there = (i < L) & (e < count)
    column, column2 = piece_columns(d_q, h, D, D1)
    o = _load_rows(O, b, h, i, there, column, min(D, D1), D1, UNIT)
    o2 = _load_rows(O, b, h, i, there, column2, D - D1, D2, UNIT) if D2 > 0 else None
    if e < count:
        n = e * QUERIES + m
        slot = n % STAGES_Q
        mbarrier.wait(q_ready.index(slot), n // STAGES_Q & 1)
        d_o = matrix(d_o_buffers[0], slot, ROWS, D1).load(ROWS_LAYOUT)
        w = gl.sum(o.to(gl.float32) * d_o.to(gl.float32), 1)
        if D2 > 0:
            d_o2 = matrix(d_o_buffers[1], slot, ROWS, D2).load(ROWS_LAYOUT)
            w += gl.sum(o2.to(gl.float32) * d_o2.to(gl.float32), 1)
        all_w.index(m).store(-w)
        fence_async_shared()  # dO has been read, and TMA may write there
        mbarrier.arrive(w_ready.index(m), count=1)


@gluon.jit
def _add_queries(
    d_q, d_q2, k, k2, given, e, p_slot, p_phase,
    M: gl.constexpr, LAST: gl.constexpr, D: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    QUERIES: gl.constexpr, STAGES_Q: gl.constexpr, STAGES_P: gl.constexpr,
    UNIT: gl.constexpr,
):  # fmt: skip
    """dQ of the M-th tile with one more tile of keys. After the last one it is stored, and w of the
    same tile of the next head is computed."""
    results, _, O, _, buffers, bars, scale, work = given
    _, _, p_buffers, out_buffers, _, _ = buffers
    _, _, _, _, p_ready, p_free, _ = bars
    H, _, _, items = work
    count = work_items(items, False)
    if M < QUERIES:
        mbarrier.wait(p_ready.index(p_slot), p_phase)
        d_s = p_buffers[1].index(p_slot).permute((1, 0))
        d_q, d_q2 = add_product(d_s, k, k2, d_q, d_q2)
        if D2 > 0:
            d_q, d_q2 = warpgroup_mma_wait(0, deps=[d_q, d_q2])
        else:
            d_q = warpgroup_mma_wait(0, deps=[d_q])
        mbarrier.arrive(p_free.index(p_slot), count=1)
        p_slot, p_phase = advance(p_slot, p_phase, 1, STAGES_P)
        if LAST:
            _store_w(
                O, results[0][0], buffers, bars, work, e + 1, M, count,
                D, D1, D2, QUERIES, STAGES_Q, UNIT,
            )  # fmt: skip
            b, h, _tile = work_item(e, 1, H, False)
            tma.store_wait(0)
            d_q = d_q * scale
            d_q2 = d_q2 * scale if D2 > 0 else 0
            store_tile(results[0], d_q, d_q2, out_buffers, 0, b, h, M * ROWS, D1, D2)
    return d_q, d_q2, p_slot, p_phase


@gluon.jit
def _add_keys(
    y, given, e, k_slot, k_phase, p_slot, p_phase,
    LAST: gl.constexpr, D: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, QUERIES: gl.constexpr,
    STAGES_Q: gl.constexpr, STAGES_K: gl.constexpr, STAGES_P: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """dQ of all tiles with the next tile of keys, which is then free. Registers have no index, so
    each tile has a name of its own, y and, for its second piece, z."""
    _, _, _, _, buffers, bars, _, _ = given
    _, k_and_v, _, _, _, _ = buffers
    k_buffers, _ = k_and_v
    _, _, k_ready, k_free, _, _, _ = bars
    k = matrix(k_buffers[0], k_slot, ROWS, D1)
    k2 = matrix(k_buffers[1], k_slot, ROWS, D2) if D2 > 0 else None
    mbarrier.wait(k_ready.index(k_slot), k_phase)
    y0, z0, y1, z1, y2, z2, y3, z3 = y
    y0, z0, p_slot, p_phase = _add_queries(
        y0, z0, k, k2, given, e, p_slot, p_phase,
        0, LAST, D, D1, D2, QUERIES, STAGES_Q, STAGES_P, UNIT,
    )  # fmt: skip
    y1, z1, p_slot, p_phase = _add_queries(
        y1, z1, k, k2, given, e, p_slot, p_phase,
        1, LAST, D, D1, D2, QUERIES, STAGES_Q, STAGES_P, UNIT,
    )  # fmt: skip
    y2, z2, p_slot, p_phase = _add_queries(
        y2, z2, k, k2, given, e, p_slot, p_phase,
        2, LAST, D, D1, D2, QUERIES, STAGES_Q, STAGES_P, UNIT,
    )  # fmt: skip
    y3, z3, p_slot, p_phase = _add_queries(
        y3, z3, k, k2, given, e, p_slot, p_phase,
        3, LAST, D, D1, D2, QUERIES, STAGES_Q, STAGES_P, UNIT,
    )  # fmt: skip
    mbarrier.arrive(k_free.index(k_slot), count=1)
    k_slot, k_phase = advance(k_slot, k_phase, 1, STAGES_K)
    return (y0, z0, y1, z1, y2, z2, y3, z3), k_slot, k_phase, p_slot, p_phase


@gluon.jit
def queries_role(
    given, D: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, QUERIES: gl.constexpr,
    STAGES_Q: gl.constexpr, STAGES_K: gl.constexpr, STAGES_P: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """The warpgroup of dQ, with Σ dQ, and of w, a head ahead."""
    L1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    L2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, max(D2, 16), 16])
    TWO: gl.constexpr = D2 > 0
    results, _, O, SUMS, buffers, bars, _, work = given
    d_q = results[0][0]
    H, _, S, items = work
    count = work_items(items, False)
    for m in range(QUERIES):
        _store_w(O, d_q, buffers, bars, work, 0, m, count, D, D1, D2, QUERIES, STAGES_Q, UNIT)
    k_slot = 0
    k_phase = 0
    p_slot = 0
    p_phase = 0
    for e in range(count):
        a = gl.zeros([ROWS, D1], gl.float32, L1)
        a2 = gl.zeros([ROWS, D2], gl.float32, L2) if TWO else 0
        y = (a, a2, a, a2, a, a2, a, a2)
        for _n0 in range(0, S - ROWS, ROWS):
            y, k_slot, k_phase, p_slot, p_phase = _add_keys(
                y, given, e, k_slot, k_phase, p_slot, p_phase,
                False, D, D1, D2, QUERIES, STAGES_Q, STAGES_K, STAGES_P, UNIT,
            )  # fmt: skip
        y, k_slot, k_phase, p_slot, p_phase = _add_keys(
            y, given, e, k_slot, k_phase, p_slot, p_phase,
            True, D, D1, D2, QUERIES, STAGES_Q, STAGES_K, STAGES_P, UNIT,
        )  # fmt: skip
        if SUMS is not None:
            # once a head, as those of its first tile
            y0, z0, y1, z1, y2, z2, y3, z3 = y
            b, h, _tile = work_item(e, 1, H, False)
            x = gl.sum(y0 + y1 + y2 + y3, 0)
            x2 = gl.sum(z0 + z1 + z2 + z3, 0) if TWO else None
            column, column2 = piece_columns(d_q, h, D, D1)
            for tile in gl.static_range(QUERIES):
                at = 2 * (b * QUERIES + tile) * H + h
                y = x if tile == 0 else gl.zeros_like(x)
                store_sums(SUMS, y, at, column, min(D, D1), D)
                if TWO:
                    y2 = x2 if tile == 0 else gl.zeros_like(x2)
                    store_sums(SUMS, y2, at, column2, D - D1, D)
    tma.store_wait(0)
