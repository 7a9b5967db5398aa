"""The third warpgroup of `bwd_head.py`: dQ of all queries, with Σ dQ, and w.

    dQ = s dS K      w = rowsum(dO ∘ O)

w is computed while the first tile of keys passes, where this warpgroup waits for the scores anyway:
O is awaited from memory under products, dO is in shared memory. It is w of the tile of queries that
comes AHEAD tiles later, as far ahead as dO is fetched: of the next head, or with four tiles a head
of the last two of this one and the first two of the next.
"""

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
    store_sums,
    store_tile,
    work_item,
    work_items,
)

# of O and dO, two lanes a row: a lane with several rows needs registers for their addresses
ROWS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))


@gluon.jit
def add_product(a, x, x2, d, d2, START: gl.constexpr):
    """d + a x, not awaited; START: d counts as zero."""
    d = warpgroup_mma(a, x, d, use_acc=not START, is_async=True)
    if x2 is not None:
        d2 = warpgroup_mma(a, x2, d2, use_acc=not START, is_async=True)
    return d, d2


@gluon.jit
def _load_rows(
    x, b, h, m, there, L, begin, COLUMNS: gl.constexpr, WIDTH: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """Columns of the m-th tile from `begin` on, 0 behind the first COLUMNS and the last row, and
    where nothing is there."""
    x = (x[0], x[1] * UNIT, x[2] * UNIT, x[3] * UNIT)
    i = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, ROWS_LAYOUT)), 1)
    j = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, ROWS_LAYOUT)), 0)
    mask = there & (i < L - m * ROWS) & (j < COLUMNS)
    first = row_at(x, b, h, m * ROWS) + begin
    # rows lie so close that these are counted in 32 bits (`problem.readable`)
    return gl.load(first + (i * x[3] + j), mask=mask, other=0.0)


@gluon.jit
def _load_o(given, e, m, D: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, UNIT: gl.constexpr):
    """The m-th tile of O of the e-th head in both pieces, 0 if there is none."""
    results, _, o, _, _, _, _, work = given
    H, L, _, items = work
    b, h, _tile = work_item(e, 1, H, False)
    there = e < work_items(items, False)
    column, column2 = piece_columns(results[0][0], h, D, D1)
    x = _load_rows(o, b, h, m, there, L, column, min(D, D1), D1, UNIT)
    x2 = 0
    if D2 > 0:
        x2 = _load_rows(o, b, h, m, there, L, column2, D - D1, D2, UNIT)
    return x, x2


@gluon.jit
def _store_w(
    o, o2, given, e, m, D1: gl.constexpr, D2: gl.constexpr, QUERIES: gl.constexpr,
    STAGES_Q: gl.constexpr,
):  # fmt: skip
    """-w of the m-th tile of the e-th head, if there is one, to the scores' warpgroup."""
    _, _, _, _, buffers, bars, _, work = given
    q_and_d_o, _, _, _, _, all_w = buffers
    _, d_o_buffers = q_and_d_o
    q_ready, _, _, _, _, _, w_ready = bars
    if e < work_items(work[3], False):
        n = e * QUERIES + m
        slot = n % STAGES_Q
        mbarrier.wait(q_ready.index(slot), n // STAGES_Q & 1)
        d_o = matrix(d_o_buffers[0], slot, ROWS, D1).load(ROWS_LAYOUT)
        w = gl.sum(o.to(gl.float32) * d_o.to(gl.float32), 1)
        if D2 > 0:
            d_o2 = matrix(d_o_buffers[1], slot, ROWS, D2).load(ROWS_LAYOUT)
            w += gl.sum(o2.to(gl.float32) * d_o2.to(gl.float32), 1)
        all_w.index(e % 2 * 4 + m).store(-w)
        fence_async_shared()  # dO has been read, and TMA may write there
        mbarrier.arrive(w_ready.index(m), count=1)


@gluon.jit
def _add_queries(
    d_q, d_q2, k, k2, given, e, p_slot, p_phase,
    M: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, D: gl.constexpr, D1: gl.constexpr,
    D2: gl.constexpr, QUERIES: gl.constexpr, AHEAD: gl.constexpr, STAGES_Q: gl.constexpr,
    STAGES_P: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """dQ of the M-th tile with one more tile of keys. Beside the first one w of the tile that comes
    AHEAD tiles later, in this head or the next, is computed. After the last one dQ is stored."""
    results, _, _, SUMS, buffers, bars, scale, work = given
    _, _, p_buffers, out_buffers, _, _ = buffers
    _, _, _, _, p_ready, p_free, _ = bars
    if M < QUERIES:
        if FIRST:
            W_TILE: gl.constexpr = (M + AHEAD) % QUERIES
            w_head = e + (M + AHEAD) // QUERIES
            o, o2 = _load_o(given, w_head, W_TILE, D, D1, D2, UNIT)
        mbarrier.wait(p_ready.index(p_slot), p_phase)
        d_s = p_buffers[1].index(p_slot).permute((1, 0))
        d_q, d_q2 = add_product(d_s, k, k2, d_q, d_q2, FIRST)
        if D2 > 0:
            d_q, d_q2 = warpgroup_mma_wait(0, deps=[d_q, d_q2])
        else:
            d_q = warpgroup_mma_wait(0, deps=[d_q])
        mbarrier.arrive(p_free.index(p_slot), count=1)
        p_slot, p_phase = advance(p_slot, p_phase, 1, STAGES_P)
        if FIRST:
            _store_w(o, o2, given, w_head, W_TILE, D1, D2, QUERIES, STAGES_Q)
        if LAST:
            b, h, _tile = work_item(e, 1, work[0], False)
            tma.store_wait(0)
            d_q = d_q * scale
            d_q2 = d_q2 * scale if D2 > 0 else 0
            store_tile(results[0], d_q, d_q2, out_buffers, 0, b, h, M * ROWS, D1, D2)
            if SUMS is not None:
                at = 2 * (b * QUERIES + M) * work[0] + h
                store_sums(SUMS, at, results[0], d_q, d_q2, out_buffers, 0, h, D, D1, D2)
    return d_q, d_q2, p_slot, p_phase


@gluon.jit
def _add_keys(
    y, given, e, k_slot, k_phase, p_slot, p_phase,
    FIRST: gl.constexpr, LAST: gl.constexpr, D: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    QUERIES: gl.constexpr, AHEAD: gl.constexpr, STAGES_Q: gl.constexpr, STAGES_K: gl.constexpr,
    STAGES_P: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """dQ of all tiles, each in two pieces, with the next tile of keys, which is then free."""
    _, _, _, _, buffers, bars, _, _ = given
    _, k_and_v, _, _, _, _ = buffers
    k_buffers, _ = k_and_v
    _, _, k_ready, k_free, _, _, _ = bars
    k = matrix(k_buffers[0], k_slot, ROWS, D1)
    k2 = matrix(k_buffers[1], k_slot, ROWS, D2) if D2 > 0 else None
    mbarrier.wait(k_ready.index(k_slot), k_phase)
    done = ()
    for m in gl.static_range(4):
        d_q, d_q2, p_slot, p_phase = _add_queries(
            y[2 * m], y[2 * m + 1], k, k2, given, e, p_slot, p_phase,
            m, FIRST, LAST, D, D1, D2, QUERIES, AHEAD, STAGES_Q, STAGES_P, UNIT,
        )  # fmt: skip
        done += (d_q, d_q2)
    mbarrier.arrive(k_free.index(k_slot), count=1)
    k_slot, k_phase = advance(k_slot, k_phase, 1, STAGES_K)
    return done, k_slot, k_phase, p_slot, p_phase


@gluon.jit
def queries_role(
    given, D: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, QUERIES: gl.constexpr,
    AHEAD: gl.constexpr, STAGES_Q: gl.constexpr, STAGES_K: gl.constexpr, STAGES_P: gl.constexpr,
    UNIT: gl.constexpr,
):  # fmt: skip
    """The warpgroup of dQ, with Σ dQ, and of w, ahead of the scores."""
    L1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    L2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, max(D2, 16), 16])
    _, _, _, _, _, _, _, work = given
    _, _, S, items = work
    for m in range(AHEAD):
        o, o2 = _load_o(given, 0, m, D, D1, D2, UNIT)
        _store_w(o, o2, given, 0, m, D1, D2, QUERIES, STAGES_Q)
    k_slot = 0
    k_phase = 0
    p_slot = 0
    p_phase = 0
    for e in range(work_items(items, False)):
        a = gl.zeros([ROWS, D1], gl.float32, L1)
        a2 = gl.zeros([ROWS, D2], gl.float32, L2) if D2 > 0 else 0
        y = (a, a2, a, a2, a, a2, a, a2)
        y, k_slot, k_phase, p_slot, p_phase = _add_keys(
            y, given, e, k_slot, k_phase, p_slot, p_phase,
            True, False, D, D1, D2, QUERIES, AHEAD, STAGES_Q, STAGES_K, STAGES_P, UNIT,
        )  # fmt: skip
        for _n0 in range(ROWS, S - ROWS, ROWS):
            y, k_slot, k_phase, p_slot, p_phase = _add_keys(
                y, given, e, k_slot, k_phase, p_slot, p_phase,
                False, False, D, D1, D2, QUERIES, AHEAD, STAGES_Q, STAGES_K, STAGES_P, UNIT,
            )  # fmt: skip
        y, k_slot, k_phase, p_slot, p_phase = _add_keys(
            y, given, e, k_slot, k_phase, p_slot, p_phase,
            False, True, D, D1, D2, QUERIES, AHEAD, STAGES_Q, STAGES_K, STAGES_P, UNIT,
        )  # fmt: skip
    tma.store_wait(0)
