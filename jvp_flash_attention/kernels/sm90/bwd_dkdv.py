"""Gradients of keys and values of (O, tO) on Hopper: the second launch of `backward.py`, with one
role a warp. Tiles are transposed, keys by queries.

    S   = s Q Kᵀ                  tS = s (tQ Kᵀ + Q tKᵀ)
    P   = exp(S − LSE)            R  = P ∘ (tS − μ)
    Hm  = dtO Vᵀ − h              G  = dO Vᵀ + dtO tVᵀ
    dtS = P ∘ Hm                  dS = P ∘ (G − w) + R ∘ Hm
    dK  = s (dSᵀ Q + dtSᵀ tQ)     dtK = s dtSᵀ Q              dV = Pᵀ dO + Rᵀ dtO     dtV = Pᵀ dtO

The two warpgroups share 64 keys and divide the outputs: one takes S, tS, dV and dtV, the other Hm,
G, dK and dtK, six products each, and P and R pass from the one to the other through shared memory,
in float32. So each holds two accumulators and two tiles of scores, at any head dim up to 128, no
product is computed twice, and what one computes between its products runs under those of the other
without any order between them.
"""

# Each role unpacks all buffers and barriers, by name, and uses its own. What is known at compile
# time stands in an `if` of its own.
# ruff: noqa: RUF059, SIM102

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..portable.primitives import LOG2E
from .bwd_primitives import (
    add_products,
    bwd_barriers,
    clear_behind,
    fetch,
    load_p,
    seen_row,
    seen_rows,
    store_p,
    store_rows,
    tile_of,
)
from .primitives import (
    ROWS,
    advance,
    allocate_stages,
    first_row,
    is_crossed,
    is_in_band,
    keep_alive,
    matrix,
    query_tiles,
    smem_tile,
    tiles_of,
    work_items,
)


@gluon.jit
def _producer(
    queries, keys, buffers, bars, work,
    BLOCK_M: gl.constexpr, STAGES_Q: gl.constexpr, GROUP: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOWER_RIGHT: gl.constexpr, PAIRS: gl.constexpr,
    SEQUENCES: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """The warp that fetches. queries: Q, tQ, dtO, dO; keys: K, tK, V, tV."""
    q, t_q, d_o, d_t_o, k, t_k, v, t_v = buffers
    q_ready, q_free, k_ready, k_free, p_ready, p_free = bars
    slot = 0
    phase = 1
    k_phase = 1
    for e in range(work_items(work[8], PAIRS)):
        b, hk, _n, n0, k0, S, q0, L = tile_of(e, work, PAIRS, SEQUENCES, 1)
        fetch(keys, (k, t_k, v, t_v), k_ready, k_free, [b, hk, k0 + n0, 0], 0, k_phase)
        k_phase ^= 1
        shift = S - L if LOWER_RIGHT else 0
        for h in range(hk * GROUP, (hk + 1) * GROUP):
            blocks, seen = seen_rows(work[2], b, h, n0, L, BLOCK_K, BLOCK_Q)
            first, end = query_tiles(n0 - shift, seen, BLOCK_M, LEFT, RIGHT)
            for j in range(first, end):
                m0 = seen_row(work[2], blocks, j * BLOCK_M, BLOCK_Q)
                at = [b, h, q0 + m0, 0]
                fetch(queries, (q, t_q, d_t_o, d_o), q_ready, q_free, at, slot, phase)
                slot, phase = advance(slot, phase, 1, STAGES_Q)


@gluon.jit
def _clear_cotangents(d_o_buffers, d_t_o, slot, rows, BLOCK_M: gl.constexpr, D: gl.constexpr):
    """What belongs to the next packed sequence, before any product: its P is 0, but 0 · NaN would
    not be. Each warpgroup does so before its own products, and the other finds the same."""
    clear_behind(d_t_o, rows, D)
    if d_o_buffers is not None:
        clear_behind(matrix(d_o_buffers, slot, BLOCK_M, D), rows, D)


@gluon.jit
def _keep_band(
    x, y, n0, m0, BLOCK_M: gl.constexpr, S_L: gl.constexpr, D: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Two tiles of pairs, 0 outside of the band. Whether a bound crosses a tile is not asked where
    that takes registers which D = 128 lacks."""
    if LEFT is not None or RIGHT is not None:
        if D > 64 or is_crossed(m0, n0, BLOCK_M, ROWS, LEFT, RIGHT):
            valid = is_in_band(n0, m0, BLOCK_M, S_L, LEFT, RIGHT)
            x = gl.where(valid, x, 0.0)
            y = gl.where(valid, y, 0.0)
    return x, y


@gluon.jit
def _values(
    d_v_out, d_t_v_out, STATISTICS, buffers, bars, p_tile, r_tile, scale, work,
    D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES_Q: gl.constexpr, GROUP: gl.constexpr,
    HAS_D_O: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, LOWER_RIGHT: gl.constexpr,
    PAIRS: gl.constexpr, SEQUENCES: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """The warpgroup of S, tS, dV and dtV. STATISTICS: by head four rows, LSE in base 2, μ, h and w,
    padded with LSE = inf, hence P = 0."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    D_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, D_L, 2)
    QUERY: gl.constexpr = gl.SliceLayout(0, S_L)
    DT: gl.constexpr = buffers[0].dtype
    (
        q_buffers, t_q_buffers, d_o_buffers, d_t_o_buffers,
        k_buffers, t_k_buffers, v_buffers, t_v_buffers,
    ) = buffers  # fmt: skip
    q_ready, q_free, k_ready, k_free, p_ready, p_free = bars
    scale2 = scale * LOG2E
    CU, _, lists, sequences, Hk, _, L_all, _, items = work
    padded = tiles_of(CU, L_all, ROWS, sequences) * ROWS
    slot = 0
    phase = 0
    k_phase = 0
    p_phase = 1
    for e in range(work_items(items, PAIRS)):
        b, hk, n, n0, k0, S, q0, L = tile_of(e, work, PAIRS, SEQUENCES, 4)
        shift = S - L if LOWER_RIGHT else 0
        d_v = gl.zeros([ROWS, D], gl.float32, D_L)
        d_t_v = gl.zeros([ROWS, D], gl.float32, D_L)
        k = matrix(k_buffers, 0, ROWS, D)
        t_k = matrix(t_k_buffers, 0, ROWS, D)
        mbarrier.wait(k_ready.index(0), k_phase)
        for h in range(hk * GROUP, (hk + 1) * GROUP):
            row = STATISTICS + first_row(b, h, Hk * GROUP, 4) * padded + (q0 // ROWS + n) * ROWS
            blocks, seen = seen_rows(lists, b, h, n0, L, BLOCK_K, BLOCK_Q)
            first, end = query_tiles(n0 - shift, seen, BLOCK_M, LEFT, RIGHT)
            for j in range(first, end):
                m0 = seen_row(lists, blocks, j * BLOCK_M, BLOCK_Q)
                i = m0 + gl.arange(0, BLOCK_M, layout=QUERY)
                lse = gl.load(row + i)
                q = matrix(q_buffers, slot, BLOCK_M, D)
                t_q = matrix(t_q_buffers, slot, BLOCK_M, D)
                d_t_o = matrix(d_t_o_buffers, slot, BLOCK_M, D)
                zero = gl.zeros([ROWS, BLOCK_M], gl.float32, S_L)
                mbarrier.wait(q_ready.index(slot), phase)
                if CU is not None:
                    if m0 + BLOCK_M > L:
                        clear_behind(q, L - m0, D)
                        clear_behind(t_q, L - m0, D)
                        _clear_cotangents(d_o_buffers, d_t_o, slot, L - m0, BLOCK_M, D)
                s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
                t_s = warpgroup_mma(k, t_q.permute((1, 0)), zero, use_acc=False, is_async=True)
                t_s = warpgroup_mma(t_k, q.permute((1, 0)), t_s, is_async=True)
                s = warpgroup_mma_wait(2, deps=[s])
                p = gl.exp2(s * scale2 - gl.expand_dims(lse, 0))
                mu = gl.load(row + padded + i)
                t_s = warpgroup_mma_wait(0, deps=[t_s])
                r = p * (t_s * scale - gl.expand_dims(mu, 0))
                p, r = _keep_band(p, r, n0, m0 + shift, BLOCK_M, S_L, D, LEFT, RIGHT)
                store_p(p, r, p_tile, r_tile, p_ready, p_free, p_phase)
                p_phase ^= 1
                p16 = gl.convert_layout(p.to(DT), P_L, assert_trivial=True)
                r16 = gl.convert_layout(r.to(DT), P_L, assert_trivial=True)
                d_t_v = warpgroup_mma(p16, d_t_o, d_t_v, is_async=True)
                d_v = warpgroup_mma(r16, d_t_o, d_v, is_async=True)
                if HAS_D_O:
                    d_o = matrix(d_o_buffers, slot, BLOCK_M, D)
                    d_v = warpgroup_mma(p16, d_o, d_v, is_async=True)
                d_v, d_t_v = warpgroup_mma_wait(0, deps=[d_v, d_t_v])
                p16 = keep_alive(p16)
                r16 = keep_alive(r16)
                mbarrier.arrive(q_free.index(slot), count=1)
                slot, phase = advance(slot, phase, 1, STAGES_Q)
        # through the buffers of K and tK, which this warpgroup alone reads
        k.store(d_v.to(DT))
        t_k.store(d_t_v.to(DT))
        fence_async_shared()
        store_rows(*d_v_out, k, k_buffers.index(0), b, hk, k0 + n0, S - n0, D)
        store_rows(*d_t_v_out, t_k, t_k_buffers.index(0), b, hk, k0 + n0, S - n0, D)
        tma.store_wait(0)
        mbarrier.arrive(k_free.index(0), count=1)
        k_phase ^= 1


@gluon.jit
def _keys(
    d_k_out, d_t_k_out, STATISTICS, buffers, bars, p_tile, r_tile, scale, work,
    D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES_Q: gl.constexpr, GROUP: gl.constexpr,
    HAS_D_O: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, LOWER_RIGHT: gl.constexpr,
    PAIRS: gl.constexpr, SEQUENCES: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """The warpgroup of Hm, G, dK and dtK."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    D_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, D_L, 2)
    QUERY: gl.constexpr = gl.SliceLayout(0, S_L)
    DT: gl.constexpr = buffers[0].dtype
    (
        q_buffers, t_q_buffers, d_o_buffers, d_t_o_buffers,
        k_buffers, t_k_buffers, v_buffers, t_v_buffers,
    ) = buffers  # fmt: skip
    q_ready, q_free, k_ready, k_free, p_ready, p_free = bars
    CU, _, lists, sequences, Hk, _, L_all, _, items = work
    padded = tiles_of(CU, L_all, ROWS, sequences) * ROWS
    slot = 0
    phase = 0
    k_phase = 0
    p_phase = 0
    for e in range(work_items(items, PAIRS)):
        b, hk, n, n0, k0, S, q0, L = tile_of(e, work, PAIRS, SEQUENCES, 4)
        shift = S - L if LOWER_RIGHT else 0
        d_k = gl.zeros([ROWS, D], gl.float32, D_L)
        d_t_k = gl.zeros([ROWS, D], gl.float32, D_L)
        v = matrix(v_buffers, 0, ROWS, D)
        t_v = matrix(t_v_buffers, 0, ROWS, D)
        mbarrier.wait(k_ready.index(0), k_phase)
        for h in range(hk * GROUP, (hk + 1) * GROUP):
            row = STATISTICS + first_row(b, h, Hk * GROUP, 4) * padded + (q0 // ROWS + n) * ROWS
            blocks, seen = seen_rows(lists, b, h, n0, L, BLOCK_K, BLOCK_Q)
            first, end = query_tiles(n0 - shift, seen, BLOCK_M, LEFT, RIGHT)
            for j in range(first, end):
                m0 = seen_row(lists, blocks, j * BLOCK_M, BLOCK_Q)
                i = m0 + gl.arange(0, BLOCK_M, layout=QUERY)
                h_sum = gl.load(row + 2 * padded + i)
                q = matrix(q_buffers, slot, BLOCK_M, D)
                t_q = matrix(t_q_buffers, slot, BLOCK_M, D)
                d_t_o = matrix(d_t_o_buffers, slot, BLOCK_M, D)
                d_t_o_t = d_t_o.permute((1, 0))
                zero = gl.zeros([ROWS, BLOCK_M], gl.float32, S_L)
                mbarrier.wait(q_ready.index(slot), phase)
                if CU is not None:  # Q and tQ, read behind P, are the other warpgroup's to clear
                    if m0 + BLOCK_M > L:
                        _clear_cotangents(d_o_buffers, d_t_o, slot, L - m0, BLOCK_M, D)
                h_m = warpgroup_mma(v, d_t_o_t, zero, use_acc=False, is_async=True)
                g = warpgroup_mma(t_v, d_t_o_t, zero, use_acc=False, is_async=True)
                if HAS_D_O:
                    d_o = matrix(d_o_buffers, slot, BLOCK_M, D)
                    g = warpgroup_mma(v, d_o.permute((1, 0)), g, is_async=True)
                h_m = warpgroup_mma_wait(2 if HAS_D_O else 1, deps=[h_m])
                h_m = h_m - gl.expand_dims(h_sum, 0)
                w = gl.load(row + 3 * padded + i)
                g = warpgroup_mma_wait(0, deps=[g])
                g = g - gl.expand_dims(w, 0)
                d_t_s, d_s = load_p(h_m, g, p_tile, r_tile, p_ready, p_free, p_phase, S_L)
                p_phase ^= 1
                d_t_s, d_s = _keep_band(d_t_s, d_s, n0, m0 + shift, BLOCK_M, S_L, D, LEFT, RIGHT)
                d_k, d_t_k = add_products(d_s, d_t_s, q, t_q, d_k, d_t_k, P_L)
                mbarrier.arrive(q_free.index(slot), count=1)
                slot, phase = advance(slot, phase, 1, STAGES_Q)
        v.store((d_k * scale).to(DT))
        t_v.store((d_t_k * scale).to(DT))
        fence_async_shared()
        store_rows(*d_k_out, v, v_buffers.index(0), b, hk, k0 + n0, S - n0, D)
        store_rows(*d_t_k_out, t_v, t_v_buffers.index(0), b, hk, k0 + n0, S - n0, D)
        tma.store_wait(0)
        mbarrier.arrive(k_free.index(0), count=1)
        k_phase ^= 1


@gluon.jit(do_not_specialize=("Hk", "L", "S", "sequences", "tiles", "items"))
def bwd_dkdv_jvp_kernel(
    Q, K, V, T_Q, T_K, T_V, D_O, D_T_O, STATISTICS, CU_Q, CU_K, Q_BLOCKS,
    D_K, D_T_K, D_V, D_T_V, D_K_ROWS, D_T_K_ROWS, D_V_ROWS, D_T_V_ROWS,
    scale, Hk, L, S, sequences, tiles, items,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES_Q: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOWER_RIGHT: gl.constexpr, PAIRS: gl.constexpr,
    SEQUENCES: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """STAGES_Q tiles of queries in flight, one set of keys; dO may be absent. D_K_ROWS and
    the like: as `bwd_primitives.store_rows` takes them."""
    HAS_D_O: gl.constexpr = D_O is not None
    buffers = (
        allocate_stages(Q, STAGES_Q),
        allocate_stages(Q, STAGES_Q),
        allocate_stages(Q, STAGES_Q) if HAS_D_O else None,
        allocate_stages(Q, STAGES_Q),
        allocate_stages(K, 1),
        allocate_stages(K, 1),
        allocate_stages(V, 1),
        allocate_stages(V, 1),
    )
    bars = bwd_barriers(STAGES_Q, 1)
    p_tile = smem_tile(BLOCK_M)
    r_tile = smem_tile(BLOCK_M)
    if CU_K is None:
        work = (CU_Q, CU_Q, Q_BLOCKS, sequences, Hk, S, L, tiles, items)
    else:
        work = (CU_K, CU_Q, Q_BLOCKS, sequences, Hk, S, L, tiles, items)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _values,
                ((D_V, D_V_ROWS), (D_T_V, D_T_V_ROWS), STATISTICS, buffers, bars, p_tile, r_tile,
                 scale, work, D, BLOCK_M, STAGES_Q, GROUP, HAS_D_O, LEFT, RIGHT, LOWER_RIGHT, PAIRS,
                 SEQUENCES, BLOCK_Q, BLOCK_K),
            ),
            (
                _keys,
                ((D_K, D_K_ROWS), (D_T_K, D_T_K_ROWS), STATISTICS, buffers, bars, p_tile, r_tile,
                 scale, work, D, BLOCK_M, STAGES_Q, GROUP, HAS_D_O, LEFT, RIGHT, LOWER_RIGHT, PAIRS,
                 SEQUENCES, BLOCK_Q, BLOCK_K),
            ),
            (
                _producer,
                ((Q, T_Q, D_T_O, D_O), (K, T_K, V, T_V), buffers, bars, work, BLOCK_M, STAGES_Q,
                 GROUP, LEFT, RIGHT, LOWER_RIGHT, PAIRS, SEQUENCES, BLOCK_Q, BLOCK_K),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
