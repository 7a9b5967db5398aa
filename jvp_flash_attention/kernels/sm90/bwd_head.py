"""Gradients of O alone on Hopper, of heads of at most 256 queries and keys: one block holds a head,
and there is one launch.

    S  = s Q Kᵀ      P = exp(S − LSE)      dP = dO Vᵀ      dS = P ∘ (dP − w)      w = rowsum(dO ∘ O)
    dV = Pᵀ dO       dK = s dSᵀ Q          dQ = s dS K

Five products, where `bwd.py` computes S and dP twice. All queries stay, tiles of keys pass. Three
warpgroups divide the results, and P and dS pass between them in 16 bits, as tiles of keys by
queries:

    scores      S, dP: P and dS, to shared memory
    keys        dV, dK of one tile of keys, over all queries
    queries     dQ of all queries, over all keys, in four accumulators; w, ahead of the scores

So nothing is summed between blocks, and two runs are equal bit for bit. The scores' instructions
take the longest. LSE and w lie in shared memory, where they are read without a wait. Tiles of the
next head are fetched under this one's.

A head dim above 64 and up to 80 is two pieces, as in `forward.py`. Names of the second end in 2.
"""

# Each role unpacks all buffers and barriers, by name, and uses its own. What is known at compile
# time stands in an `if` of its own.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from ..portable.primitives import LOG2E
from .bwd_head_queries import add_product, queries_role
from .primitives import (
    ROWS,
    advance,
    allocate_stages,
    barriers,
    first_row,
    load_tile,
    matrix,
    memory_as,
    scores,
    store_sums,
    store_tile,
    work_item,
    work_items,
)


@gluon.jit
def _fetch(x, y, buffers, ready, free, b, h, row, slot, phase, D1: gl.constexpr):
    """A tile of each of two tensors into a slot, once it is free."""
    mbarrier.wait(free.index(slot), phase)
    bar = ready.index(slot)
    TWO: gl.constexpr = x[1] is not None
    BYTES: gl.constexpr = x[0].block_type.nbytes + (x[1].block_type.nbytes if TWO else 0)
    mbarrier.expect(bar, 2 * BYTES)
    load_tile(x, buffers[0], slot, bar, b, h, row, D1)
    load_tile(y, buffers[1], slot, bar, b, h, row, D1)


@gluon.jit
def _fetch_queries(
    queries, buffers, ready, free, n, count, H, D1: gl.constexpr, QUERIES: gl.constexpr,
    STAGES_Q: gl.constexpr,
):  # fmt: skip
    """The n-th tile of Q and dO of this block, if it has so many heads; the next one's number."""
    e = n // QUERIES
    if e < count:
        b, h, _tile = work_item(e, 1, H, False)
        row = n % QUERIES * ROWS
        phase = n // STAGES_Q & 1 ^ 1
        _fetch(*queries, buffers, ready, free, b, h, row, n % STAGES_Q, phase, D1)
    return n + 1


@gluon.jit
def _producer(
    given, D1: gl.constexpr, QUERIES: gl.constexpr, AHEAD: gl.constexpr, STAGES_Q: gl.constexpr,
    STAGES_K: gl.constexpr,
):  # fmt: skip
    """The warp that fetches. queries: Q and dO, keys: K and V, each in two pieces. Queries come
    AHEAD tiles before their head: the first tile of keys is not free before w so far ahead is
    computed."""
    queries, keys, buffers, bars, work = given
    q_buffers, k_buffers, _, _, _, _ = buffers
    q_ready, q_free, k_ready, k_free, _, _, _ = bars
    H, _, S, items = work
    count = work_items(items, False)
    n = 0
    for _ in range(AHEAD):
        n = _fetch_queries(queries, q_buffers, q_ready, q_free, n, count, H, D1, QUERIES, STAGES_Q)
    k_slot = 0
    k_phase = 1
    for e in range(count):
        b, h, _tile = work_item(e, 1, H, False)
        for n0 in range(0, S, ROWS):
            _fetch(*keys, k_buffers, k_ready, k_free, b, h, n0, k_slot, k_phase, D1)
            k_slot, k_phase = advance(k_slot, k_phase, 1, STAGES_K)
            if n0 == 0:
                for _ in range(QUERIES):
                    n = _fetch_queries(
                        queries, q_buffers, q_ready, q_free, n, count, H, D1, QUERIES, STAGES_Q
                    )


@gluon.jit
def _lse(LSE, e, count, H, L):
    """-LSE of the e-th head in base 2, which shared memory keeps; -inf behind the last query."""
    b, h, _tile = work_item(e, 1, H, False)
    i = gl.arange(0, 4 * ROWS, layout=gl.BlockedLayout([2], [32], [4], [0]))
    lse = gl.load(LSE + first_row(b, h, H, L) + i, mask=(i < L) & (e < count), other=float("inf"))
    return lse * -LOG2E


@gluon.jit
def _scores(
    given, D1: gl.constexpr, D2: gl.constexpr, QUERIES: gl.constexpr, STAGES_Q: gl.constexpr,
    STAGES_K: gl.constexpr, STAGES_P: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """The warpgroup of S and dP."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    KEY: gl.constexpr = gl.SliceLayout(1, S_L)
    QUERY: gl.constexpr = gl.SliceLayout(0, S_L)
    TWO: gl.constexpr = D2 > 0
    PIECES: gl.constexpr = 2 if TWO else 1
    _, LSE, _, _, buffers, bars, scale, work = given
    q_and_d_o, k_and_v, p_buffers, _, all_lse, all_w = buffers
    q_buffers, d_o_buffers = q_and_d_o
    k_buffers, v_buffers = k_and_v
    q_ready, q_free, k_ready, k_free, p_ready, p_free, w_ready = bars
    H, L, S, items = work
    scale2 = scale * LOG2E
    DT: gl.constexpr = p_buffers[0].dtype
    FLAT: gl.constexpr = all_lse.layout
    first = 0
    first_phase = 0
    k_slot = 0
    k_phase = 0
    p_slot = 0
    p_phase = 1
    count = work_items(items, False)
    next_lse = _lse(LSE, 0, count, H, L)
    for e in range(count):
        memory_as(all_lse, [4 * ROWS], FLAT).store(next_lse)
        next_lse = _lse(LSE, e + 1, count, H, L)
        q_slot = first
        q_phase = first_phase
        for n0 in range(0, S, ROWS):
            k = matrix(k_buffers[0], k_slot, ROWS, D1)
            v = matrix(v_buffers[0], k_slot, ROWS, D1)
            k2 = matrix(k_buffers[1], k_slot, ROWS, D2) if TWO else None
            v2 = matrix(v_buffers[1], k_slot, ROWS, D2) if TWO else None
            last = n0 + ROWS >= S
            q_slot = first
            q_phase = first_phase
            mbarrier.wait(k_ready.index(k_slot), k_phase)
            for m in range(QUERIES):
                q = matrix(q_buffers[0], q_slot, ROWS, D1)
                d_o = matrix(d_o_buffers[0], q_slot, ROWS, D1)
                q2 = matrix(q_buffers[1], q_slot, ROWS, D2) if TWO else None
                d_o2 = matrix(d_o_buffers[1], q_slot, ROWS, D2) if TWO else None
                zero = gl.zeros([ROWS, ROWS], gl.float32, S_L)
                mbarrier.wait(q_ready.index(q_slot), q_phase)
                s = scores(k, q, k2, q2, zero, True)
                d_p = scores(v, d_o, v2, d_o2, zero, True)
                s = warpgroup_mma_wait(PIECES, deps=[s])
                lse = all_lse.index(m).load(QUERY)
                p = gl.exp2(s * scale2 + gl.expand_dims(lse, 0))
                mbarrier.wait(p_free.index(p_slot), p_phase)
                p_buffers[0].index(p_slot).store(p.to(DT))
                if n0 == 0:
                    mbarrier.wait(w_ready.index(m), e & 1)
                w = all_w.index(e % 2 * 4 + m).load(QUERY)
                d_p = warpgroup_mma_wait(0, deps=[d_p])
                if last:
                    mbarrier.arrive(q_free.index(q_slot), count=1)
                d_s = p * (d_p + gl.expand_dims(w, 0))
                if EDGE:  # behind the last key P may be infinite, and 0 · inf is not 0
                    j = gl.expand_dims(n0 + gl.arange(0, ROWS, layout=KEY), 1)
                    d_s = gl.where(j < S, d_s, 0.0)
                p_buffers[1].index(p_slot).store(d_s.to(DT))
                fence_async_shared()
                mbarrier.arrive(p_ready.index(p_slot), count=1)
                p_slot, p_phase = advance(p_slot, p_phase, 1, STAGES_P)
                q_slot, q_phase = advance(q_slot, q_phase, 1, STAGES_Q)
            mbarrier.arrive(k_free.index(k_slot), count=1)
            k_slot, k_phase = advance(k_slot, k_phase, 1, STAGES_K)
        first = q_slot
        first_phase = q_phase


@gluon.jit
def _until(x, rows):
    """The first rows of a result, 0 behind them."""
    i = gl.arange(0, ROWS, layout=gl.SliceLayout(1, x.type.layout))
    return gl.where(gl.expand_dims(i, 1) < rows, x, 0.0)


@gluon.jit
def _keys(
    given, D: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, QUERIES: gl.constexpr,
    STAGES_Q: gl.constexpr, STAGES_P: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """The warpgroup of dV and dK, with Σ dV of each tile."""
    L1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    L2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, max(D2, 16), 16])
    TWO: gl.constexpr = D2 > 0
    results, _, _, SUMS, buffers, bars, scale, work = given
    _, d_k_out, d_v_out = results
    q_and_d_o, _, p_buffers, out_buffers, _, _ = buffers
    q_buffers, d_o_buffers = q_and_d_o
    q_ready, q_free, _, _, p_ready, p_free, _ = bars
    H, _, S, items = work
    first = 0
    first_phase = 0
    p_slot = 0
    p_phase = 0
    for e in range(work_items(items, False)):
        b, h, _tile = work_item(e, 1, H, False)
        q_slot = first
        q_phase = first_phase
        for n0 in range(0, S, ROWS):
            d_k = gl.zeros([ROWS, D1], gl.float32, L1)
            d_v = gl.zeros([ROWS, D1], gl.float32, L1)
            d_k2 = gl.zeros([ROWS, D2], gl.float32, L2) if TWO else 0
            d_v2 = gl.zeros([ROWS, D2], gl.float32, L2) if TWO else 0
            last = n0 + ROWS >= S
            q_slot = first
            q_phase = first_phase
            for _m in range(QUERIES):
                q = matrix(q_buffers[0], q_slot, ROWS, D1)
                d_o = matrix(d_o_buffers[0], q_slot, ROWS, D1)
                q2 = matrix(q_buffers[1], q_slot, ROWS, D2) if TWO else None
                d_o2 = matrix(d_o_buffers[1], q_slot, ROWS, D2) if TWO else None
                mbarrier.wait(q_ready.index(q_slot), q_phase)
                mbarrier.wait(p_ready.index(p_slot), p_phase)
                d_v, d_v2 = add_product(p_buffers[0].index(p_slot), d_o, d_o2, d_v, d_v2, False)
                d_k, d_k2 = add_product(p_buffers[1].index(p_slot), q, q2, d_k, d_k2, False)
                if TWO:
                    d_k, d_k2, d_v, d_v2 = warpgroup_mma_wait(0, deps=[d_k, d_k2, d_v, d_v2])
                else:
                    d_k, d_v = warpgroup_mma_wait(0, deps=[d_k, d_v])
                mbarrier.arrive(p_free.index(p_slot), count=1)
                if last:
                    mbarrier.arrive(q_free.index(q_slot), count=1)
                p_slot, p_phase = advance(p_slot, p_phase, 1, STAGES_P)
                q_slot, q_phase = advance(q_slot, q_phase, 1, STAGES_Q)
            d_k2 = d_k2 * scale if TWO else None
            tma.store_wait(0)
            store_tile(d_k_out, d_k * scale, d_k2, out_buffers, 1, b, h, n0, D1, D2)
            if EDGE and SUMS is not None:  # behind the last key dV may be infinite
                d_v = _until(d_v, S - n0)
                d_v2 = _until(d_v2, S - n0) if TWO else None
            store_tile(d_v_out, d_v, d_v2, out_buffers, 2, b, h, n0, D1, D2)
            if SUMS is not None:
                at = (2 * (b * QUERIES + n0 // ROWS) + 1) * H + h
                store_sums(SUMS, at, d_v_out, d_v, d_v2, out_buffers, 2, h, D, D1, D2)
        first = q_slot
        first_phase = q_phase
    tma.store_wait(0)


@gluon.jit(do_not_specialize=("H", "L", "S", "items"))
def bwd_head_kernel(
    Q, K, V, D_O, D_Q, D_K, D_V, Q2, K2, V2, D_O2, D_Q2, D_K2, D_V2, LSE, O, SUMS,
    scale, H, L, S, items,
    D: gl.constexpr, UNIT: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    QUERIES: gl.constexpr, STAGES_Q: gl.constexpr, STAGES_K: gl.constexpr, STAGES_P: gl.constexpr,
    EDGE: gl.constexpr,
):  # fmt: skip
    """D1 + D2 columns, of which D exist; QUERIES tiles of queries a head; STAGES_Q tiles of Q and
    dO, STAGES_K of K and V, STAGES_P of P and dS in flight; O: (pointer, strides), which count UNIT
    elements; SUMS: `Call.sums`; EDGE: the last tile of keys is cut."""
    AHEAD: gl.constexpr = min(QUERIES, STAGES_Q - QUERIES)  # as many as there is room for
    TWO: gl.constexpr = D2 > 0
    q_buffers = (
        (allocate_stages(Q, STAGES_Q), allocate_stages(Q2, STAGES_Q) if TWO else None),
        (allocate_stages(D_O, STAGES_Q), allocate_stages(D_O2, STAGES_Q) if TWO else None),
    )
    k_buffers = (
        (allocate_stages(K, STAGES_K), allocate_stages(K2, STAGES_K) if TWO else None),
        (allocate_stages(V, STAGES_K), allocate_stages(V2, STAGES_K) if TWO else None),
    )
    P_SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    p_buffers = (
        gl.allocate_shared_memory(Q.dtype, [STAGES_P, ROWS, ROWS], P_SHARED),
        gl.allocate_shared_memory(Q.dtype, [STAGES_P, ROWS, ROWS], P_SHARED),
    )
    out_buffers = (allocate_stages(Q, 3), allocate_stages(Q2, 3) if TWO else None)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    all_lse = gl.allocate_shared_memory(gl.float32, [4, ROWS], FLAT)
    all_w = gl.allocate_shared_memory(gl.float32, [8, ROWS], FLAT)  # of this head and the next
    buffers = (q_buffers, k_buffers, p_buffers, out_buffers, all_lse, all_w)
    bars = (
        barriers(STAGES_Q, 1),
        barriers(STAGES_Q, 2),
        barriers(STAGES_K, 1),
        barriers(STAGES_K, 2),
        barriers(STAGES_P, 1),
        barriers(STAGES_P, 2),
        barriers(4, 1),
    )
    work = (H, L, S, items)
    results = ((D_Q, D_Q2), (D_K, D_K2), (D_V, D_V2))
    given = (results, LSE, O, SUMS, buffers, bars, scale, work)
    fetched = (((Q, Q2), (D_O, D_O2)), ((K, K2), (V, V2)), buffers, bars, work)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_scores, (given, D1, D2, QUERIES, STAGES_Q, STAGES_K, STAGES_P, EDGE)),
            (_keys, (given, D, D1, D2, QUERIES, STAGES_Q, STAGES_P, EDGE)),
            (queries_role, (given, D, D1, D2, QUERIES, AHEAD, STAGES_Q, STAGES_K, STAGES_P, UNIT)),
            (_producer, (fetched, D1, QUERIES, AHEAD, STAGES_Q, STAGES_K)),
        ],
        [4, 4, 1],
        [112, 224, 24],
    )
